"""Four methods half-way between SimCLR and VICReg (arXiv:2206.02574, section 3).

SimCLR-abs and SimCLR-sq contrast samples by the absolute value or the square of their cosine;
VICReg-exp puts a log-sum-exp in place of VICReg's squared covariances (eq. 11), and VICReg-ctr does
so with samples and dimensions swapped (eq. 12, 13).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastssl.objectives.base import ProjectedObjective
from fastssl.objectives.simclr import SimCLR
from fastssl_kernels import vicreg_ctr_loss, vicreg_exp_loss


class SimCLRAbs(SimCLR):
    """SimCLR with |cosine|."""

    similarity = "absolute"


class SimCLRSq(SimCLR):
    """SimCLR with cosine^2."""

    similarity = "squared"


class VICRegExp(ProjectedObjective):
    """A projector and VICReg-exp. The temperature of the paper's runs is not in its text."""

    function = staticmethod(vicreg_exp_loss)

    def __init__(
        self,
        features: int,
        width: int = 8192,
        layers: int = 3,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        *,
        temperature: float = 0.15,
        out: int = 0,
    ):
        super().__init__(features, width, layers, out)
        self.weights: dict[str, Any] = {
            "sim_coeff": sim_coeff,
            "std_coeff": std_coeff,
            "cov_coeff": cov_coeff,
        }
        self.temperature = temperature

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        return self.function(
            embeddings, temperature=self.temperature, group=self.group, **self.weights
        )


class VICRegCtr(VICRegExp):
    """A projector and VICReg-ctr."""

    function = staticmethod(vicreg_ctr_loss)
