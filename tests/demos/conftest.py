import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _what_gradio_leaves_open_is_collected_here() -> Iterator[None]:
    """Its loops and sockets would else be found by a later test, which fails by the warning."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(3):
            gc.collect()
