"""VICReg-exp and VICReg-ctr, between VICReg and SimCLR (arXiv:2206.02574, section 3).

VICReg-exp puts a log-sum-exp in place of VICReg's squared covariances (eq. 11); VICReg-ctr does so
with samples and dimensions swapped (eq. 12, 13).
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from fastssl.knobs import VICRegExpKnobs
from fastssl.objectives.base import ProjectedObjective
from fastssl.objectives.simclr import DUALITY
from fastssl_kernels import vicreg_ctr_loss, vicreg_exp_loss


class VICRegExp(ProjectedObjective):
    """A projector and VICReg-exp."""

    paper = DUALITY
    formula = "VICReg with mean_i log sum_{j != i} exp(Cov_ij / t) for its last term"
    Knobs = VICRegExpKnobs
    anti_collapse = ("sim_coeff", "std_coeff", "cov_coeff", "temperature")
    function: ClassVar[Callable[..., Tensor]] = staticmethod(vicreg_exp_loss)

    def __init__(self, features: int, knobs: VICRegExpKnobs):
        super().__init__(features, knobs)
        self.weights = knobs.weights(default_cov_coeff=1.0)
        self.temperature = knobs.temperature

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        return self.function(
            embeddings, temperature=self.temperature, group=self.group, **self.weights
        )


class VICRegCtr(VICRegExp):
    """A projector and VICReg-ctr."""

    formula = "VICReg-exp with samples and dimensions swapped in std and Cov"
    function = staticmethod(vicreg_ctr_loss)
