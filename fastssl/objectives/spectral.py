"""The idealised loss behind Barlow Twins and VICReg (arXiv:2312.10725, section 2).

    L = mean_{a < b} E |z_a - z_b|^2 + orthogonality * |E[z z^T] - I|_F^2

The first term is twice |T f - f|^2 of the augmentation operator T, the mean over views; the second
asks the D features to be orthonormal over all views of all images. With weight 1 it is D plus the
spectral contrastive loss -2 E z_a^T z_b + E (z^T z')^2 (arXiv:2106.04156, eq. 6), as
|E[z z^T] - I|^2 = E (z^T z')^2 - 2 E |z|^2 + D.

Shapes: N batch, D embedding, V views.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.distributed import whole_batch
from fastssl.objectives.base import ProjectedObjective
from fastssl_kernels import second_moment_energy


class Spectral(ProjectedObjective):
    """A projector and the loss above."""

    def __init__(
        self,
        features: int,
        width: int = 8192,
        layers: int = 3,
        orthogonality: float = 1.0,
        *,
        out: int = 0,
    ):
        super().__init__(features, width, layers, out)
        self.orthogonality = orthogonality

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        z = whole_batch(torch.stack(tuple(embeddings)), self.group)  # (V, N, D)
        distance = 2 * z.var(0).sum(1).mean()  # of two views: twice the unbiased variance
        return distance + self.orthogonality * orthonormality(z.flatten(0, 1))


def orthonormality(z: Tensor) -> Tensor:
    """|z^T z / n - I|_F^2 of rows (n, D) -> (), without the D x D matrix where n < D."""
    count, width = z.shape
    energy = second_moment_energy(z[None], pairs=False) / count**2
    return energy - 2 * z.square().sum() / count + width
