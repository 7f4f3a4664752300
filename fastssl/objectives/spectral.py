"""The idealised loss behind Barlow Twins and VICReg (arXiv:2312.10725, section 2).

    L = mean_{a < b} E |z_a - z_b|^2 + orthogonality * |E[z z^T] - I|_F^2

The first term is twice |T f - f|^2 of the augmentation operator T, the mean over views; the second
constrains the D features to be orthonormal over all views of all images. With weight 1 it is D plus
the spectral contrastive loss -2 E z_a^T z_b + E (z^T z')^2 (arXiv:2106.04156, eq. 6), as
|E[z z^T] - I|^2 = E (z^T z')^2 - 2 E |z|^2 + D.

Shapes: N batch, D embedding, V views, n = V N rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.distributed import all_gather_with_grad
from fastssl.knobs import SpectralKnobs
from fastssl.objectives.base import GraphObjective, at_least_float32, graph_distance
from fastssl_kernels import second_moment_energy


class Spectral(GraphObjective):
    """A projector and the loss above."""

    paper = "The idealised loss of arXiv:2312.10725; spectral contrastive, arXiv:2106.04156"
    formula = "mean_{a < b} |z_a - z_b|^2 + orthogonality |E[z z^T] - I|_F^2"
    Knobs = SpectralKnobs
    anti_collapse = ("orthogonality",)

    def __init__(self, features: int, knobs: SpectralKnobs):
        super().__init__(features, knobs)
        self.orthogonality = knobs.orthogonality

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        z = at_least_float32(torch.stack(tuple(embeddings)))
        z = all_gather_with_grad(z, self.group)  # (V, N, D)
        distance = 2 * z.var(0).sum(1).mean()  # of two views: twice the unbiased variance
        return distance + self.orthogonality * orthonormality(z.flatten(0, 1))

    def graph_loss(self, embeddings: Sequence[Tensor], p: Tensor) -> Tensor:
        """mean_i sum_j P_ij |z_i - z_j|^2 + orthogonality |z^T z / n - I|^2, which is
        |z z^T / n - P|^2 + D - |P|^2 for orthogonality 1 and symmetric P."""
        rows = torch.cat(tuple(embeddings))
        return graph_distance(rows, p) + self.orthogonality * orthonormality(rows)


def orthonormality(z: Tensor) -> Tensor:
    """|z^T z / n - I|_F^2 of rows (n, D) -> (), without the D x D matrix where n < D."""
    count, width = z.shape
    energy = second_moment_energy(z[None], pairs=False) / count**2
    return energy - 2 * z.square().sum() / count + width
