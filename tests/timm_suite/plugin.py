"""pytest plug-in: while timm's test module is collected, `timm.list_models` knows our models only."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import timm

_list_models = timm.list_models
_timm_names = set(_list_models())

import visionsel  # noqa: E402, F401  (registers the models; timm's own names had to be listed before)

OUR_NAMES = set(_list_models()) - _timm_names
if chosen := os.environ.get("TIMM_SUITE_NAMES"):
    OUR_NAMES &= set(chosen.split())


@functools.wraps(_list_models)
def _list_our_models(filter: str | Sequence[str] = "", module: Any = "", **kwargs: Any) -> list[str]:
    if kwargs.get("pretrained"):
        return []  # these tests download
    # `module` is left out: timm's tests of intermediates choose by the names of timm's own files
    return [name for name in _list_models(filter, "", **kwargs) if name.split(".")[0] in OUR_NAMES]


timm.list_models = _list_our_models
timm.list_pretrained = lambda *args, **kwargs: []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the one test that names a model of timm's."""
    foreign = [item for item in items if "torchscript_with_features_fx" in item.name]
    config.hook.pytest_deselected(items=foreign)
    items[:] = [item for item in items if item not in foreign]
