import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_one_seed_and_the_workers_share_of_threads: None) -> None:
    """Threads cost more than tiny models have to share."""
    torch.set_num_threads(1)
