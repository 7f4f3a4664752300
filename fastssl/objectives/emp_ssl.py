"""EMP-SSL (arXiv:2304.03977): many patches of one image, each near their mean, spread out by coding
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

from fastssl.objectives.base import Objective, projector
from fastssl_kernels import coding_rate


class EMPSSL(Objective):
    """A projector over the patches of all images at once, and the loss above.

    out: D; 0 takes a quarter of the width, as its repository (4096 and 1024).
    """

    def __init__(
        self,
        features: int,
        width: int = 4096,
        layers: int = 3,
        patch_coeff: float = 200.0,
        eps_sq: float = 0.2,
        *,
        out: int = 0,
    ):
        super().__init__()
        self.projector = projector(features, width, layers, out or width // 4)
        self.patch_coeff, self.eps_sq = patch_coeff, eps_sq

    def hidden(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, width): the projector's first layer, batch norm and ReLU, on which the
        paper's own evaluation is made; its features (N, F) where there is one layer alone."""
        return self.projector[:3](features) if len(self.projector) > 1 else features

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        rows = self.projector(torch.cat(tuple(features)))  # one batch norm for all, as published
        z = normalize(rows, dim=1).unflatten(0, (len(features), -1))  # (V, N, D)
        rate = coding_rate(z, eps_sq=self.eps_sq, group=self.group)
        likeness = cosine_similarity(z, z.mean(0, keepdim=True), dim=2).mean()
        return {
            "loss": -rate - self.patch_coeff * likeness,
            "coding_rate": rate.detach(),
            "likeness": likeness.detach(),
        }
