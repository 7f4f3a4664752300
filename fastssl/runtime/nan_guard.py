"""Losses and gradients that are not finite: kept from the weights, named, and skipped or fatal.

The optimizer itself skips such a step on the device (`Step`), so that nothing waits for the host;
this guard reads the verdicts when metrics are read anyway, and says which step and images it was.

Shapes: N batch.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

NAMED = 8  # images of a bad batch that are named
HOPELESS = 10  # steps skipped one after another


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite; the weights did not."""


class FiniteGuard:
    """Remembers the last steps' verdicts until `check`. policy: "stop" raises, "skip" goes on."""

    def __init__(
        self, model: nn.Module, policy: Literal["skip", "stop"], say: Callable[[str], None]
    ):
        self._policy, self._say = policy, say
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._steps: list[tuple[int, Tensor, Tensor]] = []
        self._row = 0  # bad steps, one after another
        self.skipped = 0
        self._keep()

    def add(self, step: int, index: Tensor, finite: Tensor) -> None:
        """The step on the images `index` (N,) had this verdict, () bool on the device. On a CPU it
        is read at once, which costs nothing."""
        self._steps.append((step, index, finite))
        if not finite.is_cuda:
            self.check()

    def check(self) -> None:
        """Read the verdicts since the last check, the one sync with the device.

        NonFiniteLossError with policy "stop", and where ten steps in a row were skipped.
        """
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        verdicts = torch.stack([finite for _, _, finite in steps]).tolist()
        for (step, index, _), finite in zip(steps, verdicts, strict=True):
            self._row = 0 if finite else self._row + 1
            if not finite:
                self._report(step, index)
        if all(verdicts):
            self._keep()
        else:  # batch norms saw what was not finite on the way forward
            self._restore()

    def _report(self, step: int, index: Tensor) -> None:
        self.skipped += 1
        images = ", ".join(str(i) for i in index[:NAMED].tolist())
        more = f" and {len(index) - NAMED} more" if len(index) > NAMED else ""
        what = f"the loss or its gradient is not finite at step {step}, images {images}{more}"
        if self._policy == "stop":
            raise NonFiniteLossError(
                f"{what}; try a lower --lr, or --on-nonfinite skip if it is rare"
            )
        if self._row >= HOPELESS:
            raise NonFiniteLossError(f"{what}: {HOPELESS} steps in a row; try a lower --lr")
        self._say(f"{what}; the step was skipped")

    def _keep(self) -> None:
        self._kept = [(_stats(norm), [x.clone() for x in _stats(norm)]) for norm in self._norms]

    def _restore(self) -> None:
        with torch.no_grad():
            for now, kept in self._kept:
                for x, y in zip(now, kept, strict=True):
                    x.copy_(y)


def _stats(norm: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    return [x for x in (norm.running_mean, norm.running_var) if x is not None]
