"""The device of a run, the settings that follow from it, and the errors of its memory."""

from dataclasses import replace

import torch
from torch import nn

from fastssl.config import Config


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


def resolved(config: Config) -> Config:
    """`config` with `precision` "auto" and `compile` None replaced by what its device supports."""
    on_gpu = choose_device(config.device).type == "cuda"
    precision, compiled = config.precision, config.compile
    if precision == "auto":
        bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if bfloat16 else "float32"
    if compiled is None:
        compiled = on_gpu and config.accumulate == 1
    return replace(config, precision=precision, compile=compiled)


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
