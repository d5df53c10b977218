"""Where models run."""

import torch

__all__ = ["choose_device"]


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """A device that this machine has.

    Args:
        name: such as `"cpu"`, `"cuda"` or `"cuda:1"`; None: cuda if there is one, else cpu.

    Raises:
        ValueError: for a name that is no device, or of one that is not here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # "meta" has no values
    except Exception as error:  # each kind of device is missing in a way of its own
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"no device {str(name)!r} on this machine; there is {', '.join(here)}") from error
    return device
