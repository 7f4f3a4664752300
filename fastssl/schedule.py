"""How far a run has come, and what follows from it: the learning rate, the views, the end.

Everything here depends on the step and, under a time budget, on the seconds of training so far;
both are in the checkpoint.
"""

from dataclasses import dataclass, replace

from fastssl.config import Config
from fastssl.optim import learning_rate

FINE = 100_000  # parts into which a time budget is cut for the learning rate


@dataclass
class Progress:
    """Where a run stands: optimizer steps made, the seconds they took in all its sessions, and the
    last answer of its online probe."""

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

    def lr(self, at: Progress) -> float:
        """The learning rate of the step after `at`. Under a time budget the same curve runs over
        the seconds."""
        c, step, total, warmup = self._config, float(at.step), self.total, self._warmup
        if c.time_budget_s:
            step = FINE * min(1.0, at.train_s / c.time_budget_s)
            total, warmup = FINE, round(FINE * self._warmup / self.total)
        return learning_rate(step, total=total, warmup=warmup, peak=c.lr, final=c.final_lr)

    def is_probed(self, at: Progress) -> bool:
        """Whether the online probe is asked at this step."""
        return self._probed > 0 and at.step % self._probed == 0

    def is_over(self, at: Progress) -> bool:
        """Whether the last step is made, the time spent, or the target accuracy reached."""
        if 0 < self._config.target_accuracy <= at.knn:
            return True
        if self._config.time_budget_s:
            return at.train_s >= self._config.time_budget_s
        return at.step >= self.total

    def steps(self, at: Progress) -> int:
        """All steps of the run, as far as can be told at `at`."""
        if not self._config.time_budget_s or not at.step or not at.train_s:
            return self.total
        return max(at.step, round(at.step * self._config.time_budget_s / at.train_s))


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
