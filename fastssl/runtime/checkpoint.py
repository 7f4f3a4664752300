"""Checkpoints: written atomically, verified before use, read without executing code.

A checkpoint is one file whose name holds its step and the checksum of its bytes, put in place by a
rename. Two are retained: where the newest does not match its checksum, the previous one is used.

It contains all that the next step depends on: modules, optimizer, random states of all ranks, steps
and seconds. The data's order and views depend only on the step and the seed.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from fastssl.device import is_out_of_memory
from fastssl.distributed import Ranks
from fastssl.schedule import TrainState

KEEP_LAST = 2  # checkpoints in a folder
NAME = re.compile(r"step-(\d{9,})-([0-9a-f]{16})\.pt")


class _HashingFile:
    """Writes to a file and hashes what is written."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Add the checkpoint of `step` to `folder`: tensors, numbers, strings and containers of them.

    Earlier checkpoints stay valid whenever the process or the machine stops; the oldest is deleted
    only when the new one is on the disk.
    """
    folder.mkdir(exist_ok=True)
    temporary = folder / "writing.tmp"
    try:
        digest = _write(temporary, state)
        os.replace(temporary, folder / f"step-{step:09d}-{digest[:16]}.pt")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    for path in checkpoints(folder)[KEEP_LAST:]:
        path.unlink()


def _write(path: Path, state: dict[str, Any]) -> str:
    """Write and sync a state; the checksum of the file. OSError where it cannot be written."""
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's writer raises one while it handles the file's
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())
    return hashing.hash.hexdigest()


def load_checkpoint(
    folder: Path, device: torch.device, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """The newest valid state in `folder`, or None where there are no checkpoints.

    Invalid checkpoints are logged. ValueError where all are invalid: to start again silently would
    lose the run. Pickled code is refused (`weights_only`).
    """
    paths = checkpoints(folder)
    for path in paths:
        try:
            _check(path)
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # whatever a damaged or hostile file makes the reader raise
            log(f"skipping {path}: {' '.join(str(error).split())[:200]}")
    if paths:
        raise ValueError(
            f"no checkpoint in {folder} is valid; delete {folder.parent} to start again"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files in `folder`, newest first."""
    found = [path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _check(path: Path) -> None:
    """ValueError where the checksum in the file's name does not match."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not path.name.endswith(f"-{digest[:16]}.pt"):
        raise ValueError("checksum mismatch, the file is damaged")


def _sync_folder(folder: Path) -> None:
    """Sync the folder, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Stateful(Protocol):
    """An object that can be saved and loaded: modules, optimizers, queues."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class TrainCheckpointer:
    """Saves and loads the parts of a run together. parts: name -> module, optimizer or queue."""

    def __init__(
        self,
        folder: Path,
        parts: Mapping[str, Stateful],
        *,
        device: torch.device,
        global_batch: int,
        seed: int,
        ranks: Ranks,
    ):
        self._folder, self._parts, self._device = folder, parts, device
        self._global_batch, self._seed, self._ranks = global_batch, seed, ranks

    def save(self, at: TrainState) -> None:
        """Write a checkpoint: a collective call, of which rank 0 writes the file."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state["random"] = self._ranks.gather(_random_state(self._device))
        state["global_batch"] = self._global_batch
        state["progress"] = asdict(at)
        if self._ranks.is_main:
            save_checkpoint(self._folder, at.step, state)
        self._ranks.barrier()  # else the others wait for rank 0 in a collective with a timeout

    def load(self, log: Callable[[str], None]) -> TrainState:
        """Restore the newest valid checkpoint; the initial state where there is none.

        ValueError where the global batch has changed. The number of ranks may change: then random
        states are seeded by (seed, step, rank).
        """
        saved = load_checkpoint(self._folder, self._device, log)
        if saved is None:
            return TrainState()
        if saved["global_batch"] != self._global_batch:
            raise ValueError(
                f"{self._folder} is of a run with {saved['global_batch']} images in a batch over "
                f"all ranks, this one has {self._global_batch}; set --global-batch "
                f"{saved['global_batch']}"
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
            at, ranks = TrainState(**saved["progress"]), self._ranks
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the checkpoint in {self._folder} is not of this network, method or version: "
                f"{reason}; pass another --run"
            ) from None
        if len(saved["random"]) == ranks.world:
            _set_random_state(saved["random"][ranks.rank], self._device)
        else:
            log(f"resuming on {ranks.world} ranks; the run had {len(saved['random'])}")
            torch.manual_seed(hash((self._seed, at.step, ranks.rank)) % 2**63)
        return at


class CheckpointTimer:
    """Decides when to save: `every_s` seconds after the last save, or later, so that saving takes
    under 2 % of the time."""

    def __init__(self, every_s: float):
        self._every_s = every_s
        self._last, self._cost_s = time.monotonic(), 0.0

    def is_due(self) -> bool:
        return time.monotonic() - self._last >= max(self._every_s, 50 * self._cost_s)

    def time(self, save: Callable[[], None]) -> None:
        begin = time.monotonic()
        save()
        self._last = time.monotonic()
        self._cost_s = self._last - begin


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)
