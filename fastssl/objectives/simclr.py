"""SimCLR (arXiv:2002.05709): NT-Xent, which attracts views of an image and repels others.

    L = mean_i [log sum_{j != i} exp(cos_ij / t) - mean_{p positive} cos_ip / t]

SimCLR-abs and SimCLR-sq (arXiv:2206.02574, section 3) contrast by the absolute value or the square
of the cosine.

Shapes: N batch, D embedding, V views, n = V N rows.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.knobs import ContrastiveKnobs, ProjectorKnobs, SimCLRKnobs
from fastssl.objectives.base import GraphObjective
from fastssl_kernels import nt_xent_loss

DUALITY = "On the duality between contrastive and non-contrastive SSL, arXiv:2206.02574"


class SimCLR(GraphObjective):
    """A projector and NT-Xent over all views of all images."""

    paper = "SimCLR, arXiv:2002.05709; temperature of arXiv:2206.02574"
    formula = "mean_i [log sum_{j != i} exp(cos_ij / t) - mean_{p positive} cos_ip / t]"
    Knobs: ClassVar[type[ProjectorKnobs]] = SimCLRKnobs
    anti_collapse = ("temperature",)
    similarity: ClassVar[Literal["cosine", "absolute", "squared"]] = "cosine"

    def __init__(self, features: int, knobs: ContrastiveKnobs):
        super().__init__(features, knobs)
        self.temperature = knobs.temperature

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        return nt_xent_loss(
            embeddings,
            temperature=self.temperature,
            similarity=self.similarity,
            group=self.group,
        )

    def graph_loss(self, embeddings: Sequence[Tensor], p: Tensor) -> Tensor:
        """mean_i sum_j P_ij (-log softmax_{k != i}(cos_ik / t))_j"""
        h = normalize(torch.cat(tuple(embeddings)), dim=1)
        p = p.to(h.dtype)
        s = h @ h.T / self.temperature  # (n, n)
        diagonal = torch.eye(len(s), dtype=torch.bool, device=s.device)
        return (s.masked_fill(diagonal, -torch.inf).logsumexp(1) - (p * s).sum(1)).mean()


class SimCLRAbs(SimCLR):
    """SimCLR with |cosine|."""

    paper = DUALITY
    formula = "SimCLR with |cos| in place of cos"
    Knobs = ContrastiveKnobs
    similarity = "absolute"


class SimCLRSq(SimCLR):
    """SimCLR with cosine^2."""

    paper = DUALITY
    formula = "SimCLR with cos^2 in place of cos"
    Knobs = ContrastiveKnobs
    similarity = "squared"
