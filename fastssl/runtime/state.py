"""What a checkpoint holds of a run, and when to write one.

Everything the next step depends on is in it: modules, optimizer, random states of all ranks, steps
and seconds. The data's order and views depend on the step and the seed alone.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastssl.distributed import Ranks
from fastssl.runtime.checkpoint import load_checkpoint, save_checkpoint
from fastssl.schedule import Progress


class Stateful(Protocol):
    """What can be saved and loaded: modules, optimizers, queues."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class RunState:
    """A run's parts, to be saved together. parts: name -> what holds state."""

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

    def save(self, at: Progress) -> None:
        """Write a checkpoint; a collective call, which the first rank alone writes."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state["random"] = self._ranks.gather(_random_state(self._device))
        state["global_batch"] = self._global_batch
        state["progress"] = asdict(at)
        if self._ranks.first:
            save_checkpoint(self._folder, at.step, state)

    def load(self, say: Callable[[str], None]) -> Progress:
        """Go on from the newest valid checkpoint; from the beginning where there is none.

        The number of ranks may have changed, the global batch may not: ValueError. Ranks that a
        checkpoint does not know draw from (seed, step, rank) from there on.
        """
        saved = load_checkpoint(self._folder, self._device, say)
        if saved is None:
            return Progress()
        if saved["global_batch"] != self._global_batch:
            raise ValueError(
                f"{self._folder} is of a run with {saved['global_batch']} images in a batch over "
                f"all ranks, this one has {self._global_batch}; set --global-batch "
                f"{saved['global_batch']}"
            )
        for name, part in self._parts.items():
            part.load_state_dict(saved[name])
        at, ranks = Progress(**saved["progress"]), self._ranks
        if len(saved["random"]) == ranks.world:
            _set_random_state(saved["random"][ranks.rank], self._device)
        else:
            say(f"the run goes on with {ranks.world} ranks; it had {len(saved['random'])}")
            torch.manual_seed(hash((self._seed, at.step, ranks.rank)) % 2**63)
        return at


class SaveClock:
    """Says when to save: `every_s` seconds after the last time, or later, to stay under 2 % of the
    time."""

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


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)
