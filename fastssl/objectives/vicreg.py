"""VICReg (arXiv:2105.04906): invariance, variance and covariance of the embeddings of two or more
views.

    L = sim |z_a - z_b|^2 / D + std mean_i relu(1 - std_i) + cov sum_{i != j} Cov_ij^2 / D

pairing="mean" is the form of arXiv:2312.10725 for V > 2 views, as in its code: the loss of two
views, z_v and the mean of the others, averaged over v.

Shapes: N batch, D embedding, V views, n = V N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl.objectives.base import (
    GraphObjective,
    ProjectorKnobs,
    at_least_float32,
    graph_distance,
    require_weights,
)
from fastssl.objectives.default_weights import default_cov_coeff
from fastssl.objectives.oracles import OracleKnobs
from fastssl_kernels import vicreg_loss


@dataclass(frozen=True)
class VarianceKnobs(ProjectorKnobs):
    """The weights of VICReg and of its variants."""

    sim_coeff: float = 25.0
    """Weight of invariance (arXiv:2105.04906)."""
    std_coeff: float = 25.0
    """Weight of variance (arXiv:2105.04906)."""
    cov_coeff: float | None = None
    """Weight of covariance; by default that tuned in arXiv:2312.10725 for the width, 1 at 256
    and 1/30 at 8192 (the first paper's is 1 at 8192); 1 for VICReg-exp and VICReg-ctr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self, "sim_coeff", "std_coeff", "cov_coeff")

    def weights(self, default_cov_coeff: float) -> dict[str, Any]:
        """The keyword arguments of `vicreg_loss` and its variants."""
        cov_coeff = default_cov_coeff if self.cov_coeff is None else self.cov_coeff
        return {"sim_coeff": self.sim_coeff, "std_coeff": self.std_coeff, "cov_coeff": cov_coeff}


@dataclass(frozen=True)
class VICRegKnobs(OracleKnobs, VarianceKnobs):
    """Knobs of VICReg, arXiv:2105.04906."""

    pairing: Literal["pairs", "mean"] = "pairs"
    """More than two views: all pairs, or each view with the mean of the others
    (arXiv:2312.10725)."""


class VICReg(GraphObjective):
    """A projector and the VICReg loss."""

    paper = "VICReg, arXiv:2105.04906; many views: arXiv:2312.10725"
    formula = "sim |z_a - z_b|^2 / D + std mean_i relu(1 - std_i) + cov sum_{i != j} Cov_ij^2 / D"
    Knobs = VICRegKnobs
    anti_collapse = ("sim_coeff", "std_coeff", "cov_coeff")

    def __init__(self, features: int, knobs: VICRegKnobs):
        super().__init__(features, knobs)
        self.weights = knobs.weights(default_cov_coeff(knobs.embedding_width, knobs.sim_coeff))
        self.pairing = knobs.pairing

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        if self.pairing == "pairs" or len(embeddings) == 2:
            return vicreg_loss(embeddings, group=self.group, **self.weights)
        z = at_least_float32(torch.stack(tuple(embeddings)))  # (V, N, D)
        others = (z.sum(0) - z) / (len(z) - 1)
        pairs = zip(z, others, strict=True)
        return torch.stack(
            [vicreg_loss(pair, group=self.group, **self.weights) for pair in pairs]
        ).mean()

    def graph_loss(self, embeddings: Sequence[Tensor], p: Tensor) -> Tensor:
        """sim mean_i sum_j P_ij |z_i - z_j|^2 / D + variance and covariance terms"""
        rows = torch.cat(tuple(embeddings))
        invariance = graph_distance(rows, p) / rows.shape[1]
        spread = vicreg_loss(embeddings, **{**self.weights, "sim_coeff": 0.0})
        return self.weights["sim_coeff"] * invariance + spread
