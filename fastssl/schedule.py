"""The state of a run and what depends on it: the learning rate, the views, the end.

Everything here depends on the step and, under a time budget, on the seconds of training so far;
both are in the checkpoint.
"""

import math
from dataclasses import dataclass, replace

from fastssl.config import Config

LR_RESOLUTION = 100_000  # parts into which a time budget is divided for the learning rate


@dataclass
class TrainState:
    """Optimizer steps of a run so far, their seconds over all its sessions, and the last accuracy
    of its online probe."""

    step: int = 0
    train_s: float = 0.0
    knn: float = 0.0


class Schedule:
    """Learning rate and end of a run of `batches` steps per epoch."""

    def __init__(self, config: Config, batches: int):
        self.total = config.epochs * batches
        self._warmup = round(config.warmup_epochs * batches)
        self._config = config
        self._probe_every = config.probe_epochs * batches  # steps

    def lr(self, state: TrainState) -> float:
        """The learning rate of the step after `state`. Under a time budget the same curve runs over
        the seconds."""
        c, step, total, warmup = self._config, float(state.step), self.total, self._warmup
        if c.time_budget_s:
            step = LR_RESOLUTION * min(1.0, state.train_s / c.time_budget_s)
            total, warmup = LR_RESOLUTION, round(LR_RESOLUTION * self._warmup / self.total)
        return learning_rate(step, total=total, warmup=warmup, peak=c.lr, final=c.final_lr)

    def is_probed(self, state: TrainState) -> bool:
        """Whether the online probe runs at this step."""
        return self._probe_every > 0 and state.step % self._probe_every == 0

    def is_over(self, state: TrainState) -> bool:
        """Whether all steps are done, the time is spent, or the target accuracy is reached."""
        if 0 < self._config.target_accuracy <= state.knn:
            return True
        if self._config.time_budget_s:
            return state.train_s >= self._config.time_budget_s
        return state.step >= self.total

    def steps(self, state: TrainState) -> int:
        """Total steps of the run; under a time budget estimated from the pace so far."""
        if not self._config.time_budget_s or not state.step or not state.train_s:
            return self.total
        return max(state.step, round(state.step * self._config.time_budget_s / state.train_s))


def ramp(config: Config, epoch: int, step: int = 4) -> Config:
    """`config` with the views and the image size of this epoch.

    They grow linearly from `start_views` and `start_size` over `ramp_epochs`, sizes by `step` px.
    """
    if epoch >= config.ramp_epochs:
        return config
    share = epoch / config.ramp_epochs
    views, size = config.start_views or config.views, config.start_size or config.image_size
    return replace(
        config,
        views=views + int(share * (config.views - views)),
        image_size=size + step * int(share * (config.image_size - size) / step),
    )


def learning_rate(step: float, *, total: int, warmup: int, peak: float, final: float) -> float:
    """Linear from peak / warmup to `peak` over `warmup` steps, then a cosine to `final` * peak at
    the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
