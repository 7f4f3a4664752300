"""Run a function on several gloo processes of this machine, and collect what each returns.

    values = on_ranks(3, function, *arguments)  # function(rank, world, *arguments), module level

Inside the function torch.distributed is initialised; return tensors, numbers, strings or tuples.
"""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(rank, world, *arguments) for each rank], each run in its own process of one thread.

    A rank that raises fails the call with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _run, (world, folder, function, arguments), nprocs=world, start_method="spawn"
        )
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]


def _run(
    rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    torch.save(function(rank, world, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
