"""Guard against non-finite losses and gradients: they never reach the weights; the step is skipped,
or the run stops.

`Step` skips it on the device, without a sync; this guard reads the flags when metrics are read
anyway, and reports the step and its images.

Shapes: N batch.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

LISTED = 8  # images of a bad batch that the message lists
MAX_CONSECUTIVE_SKIPS = 10


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite; the weights did not."""


class NonFiniteGuard:
    """Records whether steps were finite, until `check`. policy: "stop" raises, "skip" does not."""

    def __init__(
        self, model: nn.Module, policy: Literal["skip", "stop"], log: Callable[[str], None]
    ):
        self._policy, self._log = policy, log
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._steps: list[tuple[int, Tensor, Tensor]] = []
        self._consecutive = 0  # bad steps
        self.skipped = 0
        self._snapshot()

    def add(self, step: int, index: Tensor, finite: Tensor) -> None:
        """Record whether the step on the images `index` (N,) was finite, () bool on the device. On
        a CPU the flag is read at once, which costs nothing."""
        self._steps.append((step, index, finite))
        if not finite.is_cuda:
            self.check()

    def check(self) -> None:
        """Read the flags since the last check: a sync with the device.

        NonFiniteLossError with policy "stop", and after MAX_CONSECUTIVE_SKIPS skips in a row.
        """
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        flags = torch.stack([finite for _, _, finite in steps]).tolist()
        for (step, index, _), finite in zip(steps, flags, strict=True):
            self._consecutive = 0 if finite else self._consecutive + 1
            if not finite:
                self._report(step, index)
        if all(flags):
            self._snapshot()
        else:  # the forward pass updated batch norms by non-finite values
            self._restore()

    def _report(self, step: int, index: Tensor) -> None:
        self.skipped += 1
        images = ", ".join(str(i) for i in index[:LISTED].tolist())
        more = f" and {len(index) - LISTED} more" if len(index) > LISTED else ""
        what = f"the loss or its gradient is not finite at step {step}, images {images}{more}"
        if self._policy == "stop":
            raise NonFiniteLossError(
                f"{what}; try a lower --lr, or --on-nonfinite skip if it is rare"
            )
        if self._consecutive >= MAX_CONSECUTIVE_SKIPS:
            raise NonFiniteLossError(
                f"{what}: {MAX_CONSECUTIVE_SKIPS} steps in a row; try a lower --lr"
            )
        self._log(f"{what}; the step was skipped")

    def _snapshot(self) -> None:
        self._saved = [(_stats(norm), [x.clone() for x in _stats(norm)]) for norm in self._norms]

    def _restore(self) -> None:
        with torch.no_grad():
            for now, saved in self._saved:
                for x, y in zip(now, saved, strict=True):
                    x.copy_(y)


def _stats(norm: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    return [x for x in (norm.running_mean, norm.running_var) if x is not None]
