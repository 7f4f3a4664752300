"""Free memory: what Linux has available, and what the limits of control groups leave of it."""

from pathlib import Path

import pytest
import torch

from fastssl_pipelines import memory
from fastssl_pipelines.memory import require_memory

MIB = 2**20


def host(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A file system with 8 GiB available, this line in /proc/self/cgroup, and these files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "free_mib"),
    [
        ("", {}, 8192),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "1048576\n"}, 8192),
        # a container: the mount point is its group; 100 MiB of 300 are droppable pages
        (
            "0::/docker/abc\n",
            {
                "memory.max": f"{1024 * MIB}\n",
                "memory.current": f"{300 * MIB}\n",
                "memory.stat": f"anon 7\ninactive_file {100 * MIB}\n",
            },
            824,
        ),
        # a job whose parent has the lower limit
        (
            "0::/slurm/job\n",
            {
                "slurm/memory.max": f"{512 * MIB}\n",
                "slurm/memory.current": f"{12 * MIB}\n",
                "slurm/job/memory.max": f"{2048 * MIB}\n",
                "slurm/job/memory.current": f"{12 * MIB}\n",
            },
            500,
        ),
        # version 1; its "no limit" is a huge number
        (
            "4:cpu,cpuacct:/x\n9:memory:/job\n",
            {
                "memory/job/memory.limit_in_bytes": f"{256 * MIB}\n",
                "memory/job/memory.usage_in_bytes": f"{100 * MIB}\n",
                "memory/job/memory.stat": f"total_inactive_file {40 * MIB}\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": f"{900 * MIB}\n",
            },
            196,
        ),
        # over its limit already
        ("0::/\n", {"memory.max": "5\n", "memory.current": "9\n"}, 0),
        # a limit above what the machine has
        ("0::/\n", {"memory.max": f"{2**40}\n", "memory.current": "0\n"}, 8192),
    ],
)
def test_limits_of_control_groups_count(
    cgroup: str, files: dict[str, str], free_mib: int, tmp_path: Path
) -> None:
    assert memory._host_free(host(tmp_path, cgroup, files)) == free_mib * MIB


def test_what_exceeds_a_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": f"{512 * MIB}\n", "memory.current": "0\n"}
    root, found = host(tmp_path, "0::/\n", files), memory._host_free
    monkeypatch.setattr(memory, "_host_free", lambda _: found(root))
    assert memory.free_bytes(torch.device("cpu")) == 512 * MIB
    require_memory(512 * MIB, "an array", "make it smaller")
    with pytest.raises(ValueError, match=r"needs 1\.0 GiB, 0\.5 GiB are free; make it smaller"):
        require_memory(1024 * MIB, "an array", "make it smaller")
