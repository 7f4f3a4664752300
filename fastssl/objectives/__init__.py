"""The methods, one per file, and the one place where they are chosen by name."""

from functools import partial
from typing import Any

from fastssl.config import Config
from fastssl.methods import METHODS
from fastssl.objectives.barlow_twins import BarlowTwins
from fastssl.objectives.base import Objective
from fastssl.objectives.default_weights import tuned_cov_coeff, tuned_lambd
from fastssl.objectives.diet import DIET
from fastssl.objectives.duality import SimCLRAbs, SimCLRSq, VICRegCtr, VICRegExp
from fastssl.objectives.emp_ssl import EMPSSL
from fastssl.objectives.oracles import Oracle
from fastssl.objectives.pal import (
    PAL,
    GraphLoss,
    barlow_graph,
    simclr_graph,
    spectral_graph,
    vicreg_graph,
)
from fastssl.objectives.sdiet import SDIET
from fastssl.objectives.simclr import SimCLR
from fastssl.objectives.spectral import Spectral
from fastssl.objectives.vicreg import VICReg

__all__ = [
    "DIET",
    "EMPSSL",
    "METHODS",
    "PAL",
    "SDIET",
    "BarlowTwins",
    "Objective",
    "SimCLR",
    "SimCLRAbs",
    "SimCLRSq",
    "Spectral",
    "VICReg",
    "VICRegCtr",
    "VICRegExp",
    "build_objective",
    "tuned_cov_coeff",
    "tuned_lambd",
]


def build_objective(
    config: Config,
    *,
    features: int,
    num_samples: int,
    oracle: Oracle | None = None,
    group: Any = None,
) -> Objective:
    """The objective that `config.method` names, for a backbone of `features` outputs and M =
    `num_samples` images; with an oracle, PAL's form of it; over the ranks of `group`.

    ValueError for a method that ranks cannot share, and where `config.oracle` asks for an oracle
    and none is given, or the other way round.
    """
    c = config
    if (oracle is None) != (c.oracle == "none"):
        given = "one is given" if oracle is not None else "none is given"
        raise ValueError(
            f"--oracle is {c.oracle}, but {given}; build_oracle makes the one it names"
        )
    width, layers, out = c.projector_width, c.projector_layers, c.projector_out
    if oracle is not None:
        if oracle.num_samples != num_samples:
            raise ValueError(
                f"the oracle knows {oracle.num_samples} images, the data set has {num_samples}"
            )
        return _over(PAL(features, width, layers, _graph_loss(c), oracle, out=out), group)
    sizes: dict[str, Any] = {"features": features, "width": width, "layers": layers, "out": out}
    update: dict[str, Any] = {"lr": c.lr, "weight_decay": c.weight_decay}
    lambd, vicreg = _lambd(c), _vicreg_weights(c)
    t, smoothing = c.temperature, c.label_smoothing
    builders = {
        "barlow": lambda: BarlowTwins(**sizes, lambd=lambd, pairing=c.pairing),
        "diet": lambda: DIET(
            features,
            num_samples,
            smoothing,
            optimizer=c.optimizer if c.fused_head else None,
            momentum=c.momentum,
            sample_rate=c.sample_rate,
            seed=c.seed,
            group=group,
            **update,
        ),
        "emp_ssl": lambda: EMPSSL(**sizes, patch_coeff=c.patch_coeff, eps_sq=c.eps_sq),
        "sdiet": lambda: SDIET(
            **sizes, num_samples=num_samples, label_smoothing=smoothing, **update
        ),
        "simclr": lambda: SimCLR(**sizes, temperature=t),
        "simclr_abs": lambda: SimCLRAbs(**sizes, temperature=t),
        "simclr_sq": lambda: SimCLRSq(**sizes, temperature=t),
        "spectral": lambda: Spectral(**sizes, orthogonality=c.orthogonality),
        "vicreg": lambda: VICReg(**sizes, **vicreg, pairing=c.pairing),
        "vicreg_ctr": lambda: VICRegCtr(**sizes, **vicreg, temperature=t),
        "vicreg_exp": lambda: VICRegExp(**sizes, **vicreg, temperature=t),
    }
    return _over(builders[c.method](), group)


def _over(objective: Objective, group: Any) -> Objective:
    if group is not None and isinstance(objective, SDIET):
        raise ValueError(
            "--method sdiet updates its rows in one process; use one, or --method diet --fused-head"
        )
    objective.group = group
    return objective


def _graph_loss(c: Config) -> GraphLoss:
    return {
        "barlow": partial(barlow_graph, lambd=_lambd(c)),
        "simclr": partial(simclr_graph, temperature=c.temperature),
        "spectral": partial(spectral_graph, orthogonality=c.orthogonality),
        "vicreg": partial(vicreg_graph, **_vicreg_weights(c)),
    }[c.method]


def _lambd(c: Config) -> float:
    if c.lambd is not None:
        return c.lambd
    return tuned_lambd(c.projector_out or c.projector_width, c.views)


def _vicreg_weights(c: Config) -> dict[str, Any]:
    cov_coeff = c.cov_coeff
    if cov_coeff is None:
        width = c.projector_out or c.projector_width
        cov_coeff = tuned_cov_coeff(width, c.sim_coeff) if c.method == "vicreg" else 1.0
    return {"sim_coeff": c.sim_coeff, "std_coeff": c.std_coeff, "cov_coeff": cov_coeff}
