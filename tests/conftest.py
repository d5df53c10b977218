import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_seed_and_the_workers_share_of_threads() -> None:
    torch.manual_seed(0)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("natten"):
            try:
                import natten  # noqa: F401
            except ImportError:
                item.add_marker(pytest.mark.skip(reason="needs the natten extra"))
