"""PAL (arXiv:2303.15256): the losses with a similarity graph in place of "views of one image".

Rows z_i are all views of the batch, n = V N of them, and P their graph: P_ij = G of the two images,
0 for i = j, rows divided by their sums. With nothing known, G = I, each is the method it is named
after (Barlow Twins up to symmetry of C).

    SimCLR         mean_i sum_j P_ij (-log softmax_{k != i}(cos_ik / t))_j
    VICReg         sim mean_i sum_j P_ij |z_i - z_j|^2 / D + variance and covariance terms
    spectral       mean_i sum_j P_ij |z_i - z_j|^2 + orthogonality |z^T z / n - I|^2
                       = |z z^T / n - P|^2 + D - |P|^2  for orthogonality 1 and symmetric P
    Barlow Twins   the penalty on C = h^T P h / n, columns of h standardised

Shapes: N batch, D embedding, V views, n rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.distributed import whole_batch, whole_index
from fastssl.objectives.base import ProjectedObjective
from fastssl.objectives.oracles import Oracle
from fastssl.objectives.spectral import orthonormality
from fastssl_kernels import vicreg_loss

GraphLoss = Callable[[Sequence[Tensor], Tensor], Tensor]


class PAL(ProjectedObjective):
    """A projector, an oracle, and one of the losses below on the oracle's graph of the batch.

    In training the oracle may ask, before each step, with the means of the views' embeddings at
    hand; its knowledge is part of the state.
    """

    def __init__(
        self,
        features: int,
        width: int,
        layers: int,
        graph_loss: GraphLoss,
        oracle: Oracle,
        *,
        out: int = 0,
    ):
        super().__init__(features, width, layers, out)
        self.graph_loss, self.oracle = graph_loss, oracle

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        z = whole_batch(torch.stack([self.projector(f) for f in features]), self.group)
        embeddings, index = list(z), whole_index(index, self.group)
        if self.training:
            self.oracle.ask(index, z.detach().mean(0))
        graph = self.oracle.block(index)
        known = graph.count_nonzero() - len(graph)
        loss = self.graph_loss(embeddings, neighbours(graph, len(embeddings)))
        return {"loss": loss, "known_pairs": known.float() / 2}


def neighbours(graph: Tensor, views: int) -> Tensor:
    """P of the file's head: (N, N) weights with a positive diagonal -> (V N, V N), rows sum to 1.

    ValueError for fewer than two views: an image without known neighbours would have none.
    """
    if views < 2:
        raise ValueError(f"PAL: got {views} views; it takes at least 2")
    p = graph.repeat(views, views).fill_diagonal_(0)
    return p / p.sum(1, keepdim=True)


def simclr_graph(z: Sequence[Tensor], p: Tensor, *, temperature: float) -> Tensor:
    """V x (N, D), (n, n) -> ()"""
    h = normalize(torch.cat(tuple(z)), dim=1)
    p = p.to(h.dtype)
    s = h @ h.T / temperature  # (n, n)
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    return (s.masked_fill(itself, -torch.inf).logsumexp(1) - (p * s).sum(1)).mean()


def vicreg_graph(z: Sequence[Tensor], p: Tensor, *, sim_coeff: float, **spread: Any) -> Tensor:
    """V x (N, D), (n, n) -> (). spread: std_coeff and cov_coeff of `vicreg_loss`."""
    rows = torch.cat(tuple(z))
    pull = distance(rows, p) / rows.shape[1]
    return sim_coeff * pull + vicreg_loss(z, sim_coeff=0.0, **spread)


def spectral_graph(z: Sequence[Tensor], p: Tensor, *, orthogonality: float) -> Tensor:
    """V x (N, D), (n, n) -> ()"""
    rows = torch.cat(tuple(z))
    return distance(rows, p) + orthogonality * orthonormality(rows)


def barlow_graph(z: Sequence[Tensor], p: Tensor, *, lambd: float, eps: float = 1e-5) -> Tensor:
    """V x (N, D), (n, n) -> (); writes C."""
    standard = [(v - v.mean(0)) / (v.var(0, unbiased=False) + eps).sqrt() for v in z]
    h = torch.cat(standard)
    c = h.T @ (p.to(h.dtype) @ h) / len(h)  # (D, D)
    on = c.diagonal()
    return (on - 1).square().sum() + lambd * (c.square().sum() - on.square().sum())


def distance(z: Tensor, p: Tensor) -> Tensor:
    """mean_i sum_j P_ij |z_i - z_j|^2 of rows (n, D) -> ()"""
    z, p = z - z.mean(0), p.to(z.dtype)  # centred, so that less cancels
    square = z.square().sum(1)
    return (square + p @ square - 2 * (z * (p @ z)).sum(1)).mean()
