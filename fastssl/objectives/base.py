"""What an objective is: a head and a loss over the features of each view. It never sees labels.

Shapes: N batch, F features, D embedding, V views.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Objective(nn.Module):
    """`forward(features, index)`: V tensors (N, F) and the images' indices (N,) -> scalars, "loss"
    among them.

    `group`: the process group whose ranks' batches the loss takes as one; None alone.
    """

    group: Any = None

    def set_lr(self, lr: float) -> None:
        """Hear the learning rate of the step to come; only heads that update themselves listen."""

    def sharded_names(self) -> list[str]:
        """Parameters and buffers of which each rank holds its own part."""
        return []

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class ProjectedObjective(Objective):
    """A projector, then `loss` of the embeddings: all that a method without further state needs."""

    def __init__(self, features: int, width: int, layers: int = 3, out: int = 0):
        super().__init__()
        self.projector = projector(features, width, layers, out)

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        """V tensors (N, D) -> ()"""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss([self.projector(f) for f in features])}


def projector(features: int, width: int, layers: int, out: int = 0) -> nn.Sequential:
    """(N, F) -> (N, D): `layers` linear layers of `width`, batch norm and ReLU between them; D is
    `out`, or `width` where that is 0."""
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*modules, nn.Linear(features, out or width, bias=False))
