"""SimCLR (arXiv:2002.05709): views of one image alike, those of other images not; NT-Xent.

Its temperature here, 0.15, is the one tuned in arXiv:2206.02574, section 5.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastssl.objectives.base import ProjectedObjective
from fastssl_kernels import nt_xent_loss


class SimCLR(ProjectedObjective):
    """A projector and NT-Xent over all views of all images."""

    similarity: ClassVar[str] = "cosine"

    def __init__(
        self,
        features: int,
        width: int = 8192,
        layers: int = 3,
        temperature: float = 0.15,
        *,
        out: int = 0,
    ):
        super().__init__(features, width, layers, out)
        self.temperature = temperature

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        options: dict[str, Any] = {"similarity": self.similarity, "group": self.group}
        return nt_xent_loss(embeddings, temperature=self.temperature, **options)
