"""The device of a run."""

import torch
from torch import nn


def choose_device(name: str) -> torch.device:
    """The torch device of --device; 'auto' is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try 'cpu'"
        ) from error
    return device


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next(module.parameters()).device
