"""The methods, one per file, and the one place where they are chosen by name."""

from fastssl.config import Config
from fastssl.objectives.barlow_twins import BarlowTwins
from fastssl.objectives.diet import DIET
from fastssl.objectives.objective import Objective
from fastssl.objectives.vicreg import VICReg

__all__ = ["DIET", "BarlowTwins", "Objective", "VICReg", "build_objective"]


def build_objective(config: Config, *, features: int, num_samples: int) -> Objective:
    """The objective that `config.method` names, for a backbone of `features` outputs and M =
    `num_samples` images."""
    c = config
    builders = {
        "barlow": lambda: BarlowTwins(features, c.projector_width, c.projector_layers, c.lambd),
        "diet": lambda: DIET(features, num_samples, c.label_smoothing),
        "vicreg": lambda: VICReg(
            features, c.projector_width, c.projector_layers, c.sim_coeff, c.std_coeff, c.cov_coeff
        ),
    }
    return builders[config.method]()
