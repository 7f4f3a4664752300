"""Detect collapse during a run: features that become one point or span few directions.

The loss cannot show it (a collapsed run may have a very good one); the spectrum of recent features
does. Measured on the digits (n = 1 each, 2 CPU cores): both recipes retain 0.73 of their best
RankMe and 0.86 of their best spread over all 40 epochs; of all methods without warm-up at 8 px DIET
falls the furthest, to 0.40 and 0.50 in 3 epochs; VICReg without its variance and covariance terms
falls to 0.16 of its best RankMe in 12, features trained towards one point to 0.12 of both in 6. The
thresholds lie between. Barlow Twins with lambd 0 retains 0.6: batch norm keeps its features apart.

Shapes: N batch, F features.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.config import Config, flag
from fastssl.evaluation.spectrum import entropy_rank, feature_std, singular_values
from fastssl.objectives import METHODS, complete

RANK_SHARE = 0.25  # of the best RankMe so far: below it, directions have been lost
RANK_PART = 0.1  # of the dimensions: no warning above it, however high the rank once was
STD_SHARE = 0.2  # of the best spread so far
STD_PART = 0.1  # of isotropic features' spread: no warning above it
POINT_STD, POINT_RANK = 1e-3, 1.2  # one point, whatever it was before
FEW_DIMENSIONS = 8  # with fewer, a rank is not informative


class CollapseError(ArithmeticError):
    """The features collapsed and --on-collapse is 'stop'."""


class SpectrumQueue:
    """The last `capacity` feature rows of training, on their device, and their spectrum.

    `update` is one copy per step without a sync; `report` computes. It may be called at any rate:
    it returns {} where a report would take reports over `share` of the time since the first.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str,
        *,
        capacity: int = 2048,
        share: float = 0.01,
    ):
        self.rows = torch.zeros(capacity, features, dtype=torch.float32, device=device)
        self.count = 0  # rows written so far
        self._share = share
        self._due_at = 0.0  # of time.perf_counter()

    def update(self, features: Sequence[Tensor]) -> None:
        """Append the first view's features (N, F), any float dtype: one row per image, since
        the views of one image are alike."""
        new = features[0].detach()[-len(self.rows) :]
        at = self.count % len(self.rows)
        fits = min(len(new), len(self.rows) - at)
        self.rows[at : at + fits].copy_(new[:fits])
        if fits < len(new):
            self.rows[: len(new) - fits].copy_(new[fits:])
        self.count += len(new)

    def report(self, *, at_once: bool = False) -> dict[str, float]:
        """{"rankme", "feature_std"} of the stored rows, or {} where it is too early or too costly.

        Non-finite features give {}: the loss reports them. at_once: ignore the cost.
        """
        if self.count < 2 or (time.perf_counter() < self._due_at and not at_once):
            return {}
        rows = self.rows[: self.count]
        if self.rows.is_cuda:
            if not self._due_at:
                singular_values(rows)  # loads the solver once, outside the measured cost
            torch.cuda.synchronize(self.rows.device)  # pending steps are no cost either
        begin = time.perf_counter()
        std = float(feature_std(rows))
        if not torch.isfinite(rows).all():
            return {}
        rank = entropy_rank(singular_values(rows), 1e-7)
        now = time.perf_counter()
        self._due_at = now + (now - begin) / self._share
        return {"rankme": rank, "feature_std": std}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"].shape != self.rows.shape:
            raise ValueError(
                f"the queue has rows of shape {tuple(self.rows.shape)}, the state "
                f"{tuple(state['rows'].shape)}: it is of another backbone"
            )
        self.rows.copy_(state["rows"])
        self.count = state["count"]


class CollapseDetector:
    """Checks each report of a `SpectrumQueue`; on a collapse warns once, or stops the run.

    dimensions: F of the backbone. Its state is part of the run's checkpoints.
    """

    def __init__(self, config: Config, dimensions: int, log: Callable[[str], None]):
        self._config, self._dimensions, self._log = config, dimensions, log
        self._best_rank, self._best_std = 0.0, 0.0
        self._warned = False

    def check(self, step: int, report: dict[str, float]) -> None:
        """Check the report after `step` steps; {} is ignored. CollapseError on a collapse with
        --on-collapse stop."""
        if not report:
            return
        rank, std = report["rankme"], report["feature_std"]
        self._best_rank, self._best_std = max(self._best_rank, rank), max(self._best_std, std)
        what = self._collapse(rank, std)
        if what is None:
            self._warned = False  # recovered: warn again at the next collapse
            return
        if self._config.on_collapse == "stop":
            raise CollapseError(f"{self._message(step, what)}; --on-collapse warn continues")
        if self._config.on_collapse == "warn" and not self._warned:
            self._log(f"warning: {self._message(step, what)}")
            self._warned = True

    def _collapse(self, rank: float, std: float) -> str | None:
        """A description of the collapse, or None."""
        if std < max(POINT_STD, min(STD_PART, STD_SHARE * self._best_std)):
            return f"their spread is {std:.2g} (1 is isotropic; at best {self._best_std:.2g} here)"
        few = min(RANK_PART * self._dimensions, RANK_SHARE * self._best_rank)
        if self._dimensions >= FEW_DIMENSIONS and rank < max(POINT_RANK, few):
            return (
                f"their RankMe is {rank:.1f} of {self._dimensions} (at best "
                f"{self._best_rank:.1f} here)"
            )
        return None

    def _message(self, step: int, what: str) -> str:
        causes = "; ".join(likely_causes(self._config))
        return f"the features have collapsed at step {step}: {what}. Likely causes: {causes}"

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self._best_rank, "std": self._best_std, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best_rank, self._best_std = state["rank"], state["std"]
        self._warned = state["warned"]


def likely_causes(config: Config) -> list[str]:
    """The most frequent causes of collapse with this run's settings, likeliest first."""
    causes = [
        f"--lr {config.lr:g} is too high, or --warmup-epochs {config.warmup_epochs:g} too short",
        "a backbone or projector without normalisation layers",
    ]
    config = complete(config)
    names = METHODS[config.method].anti_collapse
    if names:
        named = ", ".join(f"{flag(n)} {_value(getattr(config.objective, n))}" for n in names)
        causes.insert(1, f"the terms against collapse are too weak ({named})")
    if config.batch_size < 64:
        causes.append(f"--batch-size {config.batch_size} is small for batch statistics")
    if config.precision == "bfloat16":
        causes.append("--precision bfloat16 (try float32)")
    return causes


def _value(knob: float | None) -> str:
    return "tuned" if knob is None else f"{knob:g}"
