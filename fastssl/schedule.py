"""The position of a run and what follows from it: the learning rate, the views, the end.

Everything here depends on the step and, under a time budget, on the seconds of training so far;
both are in the checkpoint.
"""

import math
from dataclasses import dataclass, replace

from fastssl.config import Config

LR_RESOLUTION = 100_000  # parts into which a time budget is cut for the learning rate


@dataclass
class TrainState:
    """The position of a run: optimizer steps made, the seconds they took in all its sessions, and
    the last accuracy of its online probe."""

    step: int = 0
    train_s: float = 0.0
    knn: float = 0.0


class Schedule:
    """Learning rate and end of a run of `batches` steps per epoch."""

    def __init__(self, config: Config, batches: int):
        self.total = config.epochs * batches
        self._warmup = round(config.warmup_epochs * batches)
        self._config = config
        self._probed = config.probe_epochs * batches  # steps between two probes

    def lr(self, state: TrainState) -> float:
        """The learning rate of the step after `state`. Under a time budget the same curve runs over
        the seconds."""
        c, step, total, warmup = self._config, float(state.step), self.total, self._warmup
        if c.time_budget_s:
            step = LR_RESOLUTION * min(1.0, state.train_s / c.time_budget_s)
            total, warmup = LR_RESOLUTION, round(LR_RESOLUTION * self._warmup / self.total)
        return learning_rate(step, total=total, warmup=warmup, peak=c.lr, final=c.final_lr)

    def is_probed(self, state: TrainState) -> bool:
        """Whether the online probe is asked at this step."""
        return self._probed > 0 and state.step % self._probed == 0

    def is_over(self, state: TrainState) -> bool:
        """Whether the last step is made, the time spent, or the target accuracy reached."""
        if 0 < self._config.target_accuracy <= state.knn:
            return True
        if self._config.time_budget_s:
            return state.train_s >= self._config.time_budget_s
        return state.step >= self.total

    def steps(self, state: TrainState) -> int:
        """All steps of the run, as far as can be told at `state`."""
        if not self._config.time_budget_s or not state.step or not state.train_s:
            return self.total
        return max(state.step, round(state.step * self._config.time_budget_s / state.train_s))


def ramp(config: Config, epoch: int) -> Config:
    """`config` with the views and the image size of this epoch.

    From `start_views` and `start_size` they grow evenly over `ramp_epochs`, sizes in steps of 4 px.
    """
    if epoch >= config.ramp_epochs:
        return config
    share = epoch / config.ramp_epochs
    views, size = config.start_views or config.views, config.start_size or config.image_size
    return replace(
        config,
        views=views + int(share * (config.views - views)),
        image_size=size + 4 * int(share * (config.image_size - size) / 4),
    )


def learning_rate(step: float, *, total: int, warmup: int, peak: float, final: float) -> float:
    """Linear from peak / warmup to `peak` over `warmup` steps, then a cosine to `final` * peak at
    the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
