"""Floor 2: torch modules that hold parameters and call the operators; one file a layer."""

from visionsel.layers.bilevel_routing_attention import BilevelRoutingAttention
from visionsel.layers.focal_modulation import FocalModulation
from visionsel.layers.halo_attention import HaloAttention
from visionsel.layers.neighborhood_attention import NeighborhoodAttention

__all__ = ["BilevelRoutingAttention", "FocalModulation", "HaloAttention", "NeighborhoodAttention"]
