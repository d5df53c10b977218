"""pytest plug-in: while timm's test module is collected, `timm.list_models` knows our models only.

With `TIMM_SUITE_SMALLEST` in the environment these are those of `SMALLEST`, built with few blocks.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import timm

_list_models = timm.list_models
_timm_names = set(_list_models())

import visionsel  # noqa: E402, F401  (registers the models; timm's own names had to be listed before)

# the smallest of each class, and those whose tags or options change what is built, with a block of each kind
_dilated = {"depths": (2, 2, 1, 1), "dilations": ((1, 8), (1, 4), (2,), (1,))}
SMALLEST: dict[str, dict[str, Any]] = {
    "biformer_tiny": {"depths": (1, 1, 1, 1)},
    "biformer_stl": {"depths": (1, 1, 1, 1)},
    "nat_mini": {"depths": (1, 1, 1, 1)},
    "nat_small": {"depths": (1, 1, 1, 1)},
    "dinat_mini": _dilated,
    "dinat_s_tiny": _dilated,
    "halonet_h0_256": {"depths": (1, 1, 1, 1)},
    "halonet_h3_320": {"depths": (1, 1, 1, 1)},
    "focalnet_tiny_iso_16": {"depth": 3},
    "selectformer_nano": {"depths": (2, 1, 1, 1)},
}
SHORTENED = "TIMM_SUITE_SMALLEST" in os.environ
OUR_NAMES = set(SMALLEST) if SHORTENED else set(_list_models()) - _timm_names


@functools.wraps(_list_models)
def _list_our_models(filter: str | Sequence[str] = "", module: Any = "", **kwargs: Any) -> list[str]:
    if kwargs.get("pretrained"):
        return []  # these tests download
    # `module` is left out: timm's tests of intermediates choose by the names of timm's own files
    return [name for name in _list_models(filter, "", **kwargs) if name.split(".")[0] in OUR_NAMES]


_create_model = timm.create_model


@functools.wraps(_create_model)
def _create_with_few_blocks(model_name: str, *args: Any, **kwargs: Any) -> Any:
    return _create_model(model_name, *args, **{**SMALLEST.get(model_name.split(".")[0], {}), **kwargs})


timm.list_models = _list_our_models
if SHORTENED:
    timm.create_model = _create_with_few_blocks
timm.list_pretrained = lambda *args, **kwargs: []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of timm's own models."""

    def foreign(item: pytest.Item) -> bool:
        arguments = getattr(item, "callspec", None)
        named = arguments is not None and "model_name" in arguments.params
        return not named or "torchscript_with_features_fx" in item.name  # this one names a model of timm's

    config.hook.pytest_deselected(items=[item for item in items if foreign(item)])
    items[:] = [item for item in items if not foreign(item)]
