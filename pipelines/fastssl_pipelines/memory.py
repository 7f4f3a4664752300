"""How much memory a device has free, and the error where something does not fit."""

import torch

GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """The bytes that `device` has free: those of the GPU, else what Linux calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024  # listed in KiB


def require_memory(needed: int, what: str, remedy: str, device: torch.device | None = None) -> None:
    """ValueError where `what`, of `needed` bytes, does not fit into the free memory of `device`.

    device: None is the CPU. remedy: what the caller can change.
    """
    free = free_bytes(device or torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{what} needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; {remedy}"
        )
