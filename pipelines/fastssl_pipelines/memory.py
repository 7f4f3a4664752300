"""How much memory a device has free, and the error where something does not fit."""

from pathlib import Path

import torch

GIB = 2**30


def free_bytes(device: torch.device) -> int:
    """The bytes that `device` has free: those of the GPU, else what Linux calls available, or what
    the control group of this process (a container, a SLURM job) leaves of its limit, if less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _host_free(Path("/"))


def _host_free(root: Path) -> int:
    """The free bytes of the host whose file system is at `root`."""
    with open(root / "proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024  # listed in KiB
    return max(0, min([available, *_cgroup_free(root)]))


def _cgroup_free(root: Path) -> list[int]:
    """What each control group of this process, from its own to the root, leaves of its limit.

    Version 2 has one hierarchy ("0::/path"), version 1 one of its own for memory
    ("9:memory:/path"). Inside a container the path may be the host's: then the mount point itself
    is the container's group. Cached pages that are not in use count as free.
    """
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder != mount and mount not in folder.parents:
                break
            limit, used = (_text(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():  # "max" is no limit
                found.append(int(limit) - int(used) + _inactive(folder))
    return found


def _inactive(folder: Path) -> int:
    """The bytes of a group's cached pages that the kernel can drop."""
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def require_memory(needed: int, what: str, remedy: str, device: torch.device | None = None) -> None:
    """ValueError where `what`, of `needed` bytes, does not fit into the free memory of `device`.

    device: None is the CPU. remedy: what the caller can change.
    """
    free = free_bytes(device or torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{what} needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; {remedy}"
        )
