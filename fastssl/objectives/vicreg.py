"""VICReg (arXiv:2105.04906): invariance, variance and covariance of the embeddings of two or more
views.

pairing="mean" is the form of arXiv:2312.10725 for V > 2 views, as its code has it: the loss of two
views, z_v and the mean of the others, averaged over v.

Shapes: N batch, D embedding, V views.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.objectives.base import ProjectedObjective
from fastssl_kernels import vicreg_loss
from fastssl_kernels.barlow_twins import Pairing


class VICReg(ProjectedObjective):
    """A projector and the VICReg loss. `tuned_cov_coeff` gives cov_coeff for a width."""

    def __init__(
        self,
        features: int,
        width: int = 8192,
        layers: int = 3,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        *,
        out: int = 0,
        pairing: Pairing = "pairs",
    ):
        super().__init__(features, width, layers, out)
        self.weights: dict[str, Any] = {
            "sim_coeff": sim_coeff,
            "std_coeff": std_coeff,
            "cov_coeff": cov_coeff,
        }
        self.pairing = pairing

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        if self.pairing == "pairs" or len(embeddings) == 2:
            return vicreg_loss(embeddings, **self.weights, group=self.group)
        z = torch.stack(tuple(embeddings))  # (V, N, D)
        others = (z.sum(0) - z) / (len(z) - 1)
        pairs = zip(z, others, strict=True)
        return torch.stack(
            [vicreg_loss(pair, **self.weights, group=self.group) for pair in pairs]
        ).mean()
