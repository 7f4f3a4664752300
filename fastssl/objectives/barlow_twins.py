"""Barlow Twins (arXiv:2103.03230): embeddings of two or more views, alike and decorrelated."""

from collections.abc import Sequence

from torch import Tensor

from fastssl.objectives.base import ProjectedObjective
from fastssl_kernels import barlow_twins_loss
from fastssl_kernels.barlow_twins import Pairing


class BarlowTwins(ProjectedObjective):
    """A projector and the Barlow Twins loss over all pairs of views, or of each with their mean.

    lambd: `tuned_lambd` gives the one for a width and a number of views.
    """

    def __init__(
        self,
        features: int,
        width: int = 8192,
        layers: int = 3,
        lambd: float = 0.0051,
        *,
        out: int = 0,
        pairing: Pairing = "pairs",
    ):
        super().__init__(features, width, layers, out)
        self.lambd, self.pairing = lambd, pairing

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        return barlow_twins_loss(
            embeddings, lambd=self.lambd, pairing=self.pairing, group=self.group
        )
