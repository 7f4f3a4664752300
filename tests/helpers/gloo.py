"""Run a function on several gloo processes of this machine, and collect what each returns.

    values = on_ranks(3, function, *arguments)  # function(rank, world, *arguments), module level

Inside the function torch.distributed is initialised; return tensors, numbers, strings or tuples.
`on_launched_ranks` leaves that to the function, in the environment that torchrun sets.
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


def on_launched_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`on_ranks` with torchrun's variables and its store in place of a process group: fastssl
    initialises it, as in a launch."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _run_launched,
            (world, store.port, folder, function, arguments),
            nprocs=world,
            start_method="spawn",
        )
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]


def _run_launched(
    rank: int,
    world: int,
    port: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.save(function(rank, world, *arguments), Path(folder) / f"{rank}.pt")


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
