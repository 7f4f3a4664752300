"""VICReg (arXiv:2105.04906): invariance, variance and covariance of the embeddings of two or more
views.

    L = sim |z_a - z_b|^2 / D + std mean_i relu(1 - std_i) + cov sum_{i != j} Cov_ij^2 / D

pairing="mean" is the form of arXiv:2312.10725 for V > 2 views, as in its code: the loss of two
views, z_v and the mean of the others, averaged over v.

Shapes: N batch, D embedding, V views, n = V N rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.knobs import VICRegKnobs
from fastssl.objectives.base import GraphObjective, at_least_float32, graph_distance
from fastssl.objectives.default_weights import default_cov_coeff
from fastssl_kernels import vicreg_loss


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
