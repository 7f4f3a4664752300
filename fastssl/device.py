"""The device of a run, and the errors of its memory."""

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left. On a CPU torch's is a RuntimeError
    that only its text tells from others."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # CPU, GPU, and libraries on the GPU
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def out_of_memory_reason(error: BaseException) -> str:
    """What such an error says, as a part of a sentence."""
    text = " ".join(str(error).split())
    return (text.partition("DefaultCPUAllocator: ")[2] or text).split(". ")[0]
