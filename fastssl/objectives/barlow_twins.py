"""Barlow Twins (arXiv:2103.03230): invariant and decorrelated embeddings of views.

    L = sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2

Shapes: N batch, D embedding, V views, n = V N rows.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fastssl.config import Config
from fastssl.knobs import BarlowTwinsKnobs
from fastssl.objectives.base import GraphObjective
from fastssl.objectives.default_weights import default_lambd
from fastssl_kernels import barlow_twins_loss


class BarlowTwins(GraphObjective):
    """A projector and the Barlow Twins loss over all pairs of views, or of each with their mean.

    views: the default of `lambd` depends on their number.
    """

    paper = "Barlow Twins, arXiv:2103.03230; many views: arXiv:2312.10725"
    formula = "sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2"
    Knobs = BarlowTwinsKnobs
    anti_collapse = ("lambd",)

    def __init__(self, features: int, knobs: BarlowTwinsKnobs, views: int = 2):
        super().__init__(features, knobs)
        default = default_lambd(knobs.embedding_width, views)
        self.lambd = default if knobs.lambd is None else knobs.lambd
        self.pairing = knobs.pairing

    @classmethod
    def from_config(
        cls, config: Config, knobs: Any, *, features: int, num_samples: int, group: Any = None
    ) -> Self:
        return cls(features, knobs, config.views)

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        return barlow_twins_loss(
            embeddings, lambd=self.lambd, pairing=self.pairing, group=self.group
        )

    def graph_loss(self, embeddings: Sequence[Tensor], p: Tensor) -> Tensor:
        """The penalty on C = h^T P h / n, columns of h standardised; allocates C (D, D)."""
        eps = 1e-5
        standard = [(v - v.mean(0)) / (v.var(0, unbiased=False) + eps).sqrt() for v in embeddings]
        h = torch.cat(standard)
        c = h.T @ (p.to(h.dtype) @ h) / len(h)
        diagonal = c.diagonal()
        invariance = (diagonal - 1).square().sum()
        return invariance + self.lambd * (c.square().sum() - diagonal.square().sum())
