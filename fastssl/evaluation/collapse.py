"""Collapse: features that become one point or a few directions, seen while a run goes on.

The loss cannot show it (a collapsed run may have a very good one), the spectrum of recent features
does. Measured on the digits (n = 1 each, 2 CPU cores): both recipes keep 0.73 of their best RankMe
and 0.86 of their best spread over all 40 epochs; of all methods without warm-up at 8 px DIET falls
the furthest, to 0.40 and 0.50 in 3 epochs; VICReg without its variance and covariance terms falls
to 0.16 of its best RankMe in 12, features pulled to one point to 0.12 of both in 6. The thresholds
lie between. Barlow Twins with lambd 0 keeps 0.6: batch norm holds its features apart.
"""

from collections.abc import Callable
from typing import Any

from fastssl.config import Config
from fastssl.methods import METHODS

RANK_SHARE = 0.25  # of the best RankMe so far: below it, directions have been lost
RANK_PART = 0.1  # of the dimensions: no warning above it, however high the rank once was
STD_SHARE = 0.2  # of the best spread so far
STD_PART = 0.1  # of isotropic features' spread: no warning above it
POINT_STD, POINT_RANK = 1e-3, 1.2  # one point, whatever it was before
FEW_DIMENSIONS = 8  # with fewer, a rank says nothing
# knobs that weigh what keeps images, or dimensions, apart
APART = {
    *("lambd", "sim_coeff", "std_coeff", "cov_coeff", "temperature", "orthogonality"),
    *("patch_coeff", "label_smoothing"),
}


class CollapseError(ArithmeticError):
    """The features collapsed and --on-collapse is 'stop'."""


class CollapseWatcher:
    """Judges each report of a `SpectrumQueue`; warns once when the features collapse, or stops.

    dimensions: F of the backbone. Its state belongs in the run's checkpoints.
    """

    def __init__(self, config: Config, dimensions: int, say: Callable[[str], None]):
        self._config, self._dimensions, self._say = config, dimensions, say
        self._best_rank, self._best_std = 0.0, 0.0
        self._warned = False

    def check(self, step: int, report: dict[str, float]) -> None:
        """Take note of a report, {} included, after `step` steps. Raises CollapseError with
        --on-collapse stop."""
        if not report:
            return
        rank, std = report["rankme"], report["feature_std"]
        self._best_rank, self._best_std = max(self._best_rank, rank), max(self._best_std, std)
        what = self._collapse(rank, std)
        if what is None:
            self._warned = False  # it has recovered: warn again if it falls again
            return
        if self._config.on_collapse == "stop":
            raise CollapseError(f"{self._message(step, what)}; --on-collapse warn would go on")
        if self._config.on_collapse == "warn" and not self._warned:
            self._say(f"warning: {self._message(step, what)}")
            self._warned = True

    def _collapse(self, rank: float, std: float) -> str | None:
        """What has collapsed, in words, or None."""
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
    """What most often makes features collapse, the settings of this run named, likeliest first."""
    causes = [
        f"--lr {config.lr:g} is too high, or --warmup-epochs {config.warmup_epochs:g} too short",
        "a backbone or projector without normalisation layers",
    ]
    knobs = [knob for knob in METHODS[config.method].knobs if knob in APART]
    if knobs:
        named = ", ".join(
            f"--{knob.replace('_', '-')} {_value(getattr(config, knob))}" for knob in knobs
        )
        causes.insert(1, f"the weights leave too little that keeps images apart ({named})")
    if config.batch_size < 64:
        causes.append(f"--batch-size {config.batch_size} is small for statistics of a batch")
    if config.precision == "bfloat16":
        causes.append("--precision bfloat16 (float32 rules it out)")
    return causes


def _value(knob: float | None) -> str:
    return "tuned" if knob is None else f"{knob:g}"
