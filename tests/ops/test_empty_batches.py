"""A batch of no maps has an output of no maps and a gradient, as it has in PyTorch's own layers."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor

import visionsel  # noqa: F401  registers the models
from visionsel import ops

TABLE = torch.zeros(11, 8)
KERNELS = [torch.zeros(16, 1, 3, 3), torch.zeros(16, 1, 5, 5)]
OPERATORS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "neighborhood": lambda x, backend: ops.neighborhood_attention(x, x, x, 3, backend=backend),
    "neighborhood with bias, grids that differ": lambda x, backend: ops.neighborhood_attention(
        x, x, x, 5, 3, torch.zeros(2, 9, 9), backend=backend
    ),
    "bilevel routing": lambda x, backend: ops.bilevel_routing_attention(x, x, x, 4, 2, backend=backend),
    "bilevel routing, most windows": lambda x, backend: ops.bilevel_routing_attention(
        x, x, x, 8, 40, backend=backend
    ),
    "halo": lambda x, backend: ops.halo_attention(x, x, x, 4, 1, backend=backend),
    "halo with tables": lambda x, backend: ops.halo_attention(
        x, x, x, 8, 2, TABLE.repeat(3, 1)[:23], TABLE.repeat(3, 1)[:23], backend=backend
    ),
    "focal modulation": lambda x, backend: ops.focal_modulation(
        x.flatten(3), x.flatten(3), x[..., 0, :3], KERNELS, torch.zeros(16, 16, 1, 1), backend=backend
    ),
}


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_take_empty_batches(name: str, backend: str) -> None:
    x = torch.zeros(0, 16, 16, 2, 8, requires_grad=True)
    out = OPERATORS[name](x, backend)
    assert out.shape[:3] == (0, 16, 16)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    with torch.inference_mode():
        assert OPERATORS[name](x, backend).shape == out.shape


@pytest.mark.parametrize("name", ["nat_mini", "biformer_tiny", "selectformer_nano", "focalnet_tiny_iso_16"])
def test_models_take_empty_batches(name: str) -> None:
    model = timm.create_model(name).eval()
    with torch.inference_mode():
        assert model(torch.zeros(0, 3, 224, 224)).shape == (0, 1000)
