"""Floor 3: the backbones, registered with timm when this package is imported; one file a family."""

from visionsel.models import biformer, dinat_s, focalnets, halonets, nat, selectformer

__all__ = ["biformer", "dinat_s", "focalnets", "halonets", "nat", "selectformer"]
