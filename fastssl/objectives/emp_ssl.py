"""EMP-SSL (arXiv:2304.03977): many patches per image, each close to their mean, and a high coding
rate.

    L = -mean_v [ R(z_v) + patch_coeff * mean_i cos(z_vi, zbar_i) ],   rows of z of length 1

R is the coding rate with eps_sq, zbar the mean over the V patches (eq. 2; `main.py`, `loss.py` of
its repository).

Shapes: N batch, F features, D embedding, V patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fastssl.knobs import EMPSSLKnobs
from fastssl.objectives.base import ProjectedObjective, at_least_float32, without_autocast
from fastssl_kernels import coding_rate


class EMPSSL(ProjectedObjective):
    """A projector over the patches of all images at once, and the loss above."""

    paper = "EMP-SSL, arXiv:2304.03977"
    formula = "-mean_v [1/2 logdet(I + D/(N eps_sq) z_v z_v^T) + patch_coeff cos(z_v, mean z)]"
    Knobs = EMPSSLKnobs
    max_views = 200
    anti_collapse = ("patch_coeff",)

    def __init__(self, features: int, knobs: EMPSSLKnobs):
        super().__init__(features, knobs)
        self.patch_coeff, self.eps_sq = knobs.patch_coeff, knobs.eps_sq

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        rows = self.projector(torch.cat(tuple(features)))  # one batch norm for all, as published
        with without_autocast(rows):
            z = normalize(at_least_float32(rows), dim=1)
            z = z.unflatten(0, (len(features), -1))  # (V, N, D)
            rate = coding_rate(z, eps_sq=self.eps_sq, group=self.group)
            likeness = cosine_similarity(z, z.mean(0, keepdim=True), dim=2).mean()
        return {
            "loss": -rate - self.patch_coeff * likeness,
            "coding_rate": rate.detach(),
            "likeness": likeness.detach(),
        }
