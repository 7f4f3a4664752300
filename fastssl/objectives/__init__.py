"""The methods, one per file, and their selection by name."""

from dataclasses import fields, replace
from typing import Any

from fastssl.config import Config, Knobs, knob_names, suggestion
from fastssl.objectives.barlow_twins import BarlowTwins
from fastssl.objectives.base import GraphObjective, Objective
from fastssl.objectives.diet import DIET
from fastssl.objectives.duality import VICRegCtr, VICRegExp
from fastssl.objectives.emp_ssl import EMPSSL
from fastssl.objectives.oracles import Oracle, uses_oracle
from fastssl.objectives.pal import PAL
from fastssl.objectives.sdiet import SDIET
from fastssl.objectives.simclr import SimCLR, SimCLRAbs, SimCLRSq
from fastssl.objectives.spectral import Spectral
from fastssl.objectives.vicreg import VICReg

METHODS: dict[str, type[Objective]] = {
    "barlow": BarlowTwins,
    "diet": DIET,
    "emp_ssl": EMPSSL,
    "sdiet": SDIET,
    "simclr": SimCLR,
    "simclr_abs": SimCLRAbs,
    "simclr_sq": SimCLRSq,
    "spectral": Spectral,
    "vicreg": VICReg,
    "vicreg_ctr": VICRegCtr,
    "vicreg_exp": VICRegExp,
}


def method_class(name: str) -> type[Objective]:
    """The class of --method NAME; ValueError names the closest method, or all."""
    if name not in METHODS:
        raise ValueError(f"unknown --method {name!r}; {suggestion(name, METHODS)}")
    return METHODS[name]


def complete(config: Config) -> Config:
    """`config` with its method's defaults in place of `Knobs()`, checked.

    ValueError where knobs, method and the rest of the config do not fit together.
    """
    method = method_class(config.method)
    knobs = method.Knobs() if type(config.objective) is Knobs else config.objective
    if type(knobs) is not method.Knobs:
        raise ValueError(
            f"the knobs are {type(knobs).__name__}, --method {config.method} has "
            f"{method.Knobs.__name__}; `configured(config, method=...)` changes both"
        )
    if config.views < method.min_views:
        raise ValueError(
            f"--views is {config.views}: {config.method} compares views, so it needs at least "
            f"{method.min_views}"
        )
    if config.views > method.max_views:
        raise ValueError(
            f"--views is {config.views}: {config.method} takes at most {method.max_views}"
        )
    method.check(config, knobs)
    return replace(config, objective=knobs)


def configured(config: Config, **changes: Any) -> Config:
    """`complete(config)` with fields of `Config` or knobs of its method changed, by name.

    Where `method` changes, the knobs that both methods have are carried over.
    """
    settings = knob_names(Config)
    config = replace(config, **{k: v for k, v in changes.items() if k in settings})
    knobs = {k: v for k, v in changes.items() if k not in settings}
    method = method_class(config.method)
    known = knob_names(method.Knobs)
    if unknown := sorted(set(knobs) - known):
        raise ValueError(f"{config.method} has no knob {', '.join(unknown)}")
    shared = [field.name for field in fields(config.objective) if field.name in known]
    carried_over = {name: getattr(config.objective, name) for name in shared}
    return complete(replace(config, objective=method.Knobs(**(carried_over | knobs))))


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

    ValueError for a method that does not support several ranks, and where `oracle` does not match
    `--oracle`.
    """
    config = complete(config)
    if (oracle is not None) != uses_oracle(config):
        name = getattr(config.objective, "oracle", "none")
        given = "one is given" if oracle is not None else "none is given"
        raise ValueError(f"--oracle is {name}, but {given}; use build_oracle")
    if oracle is not None and oracle.num_samples != num_samples:
        raise ValueError(
            f"the oracle covers {oracle.num_samples} images, the data set has {num_samples}"
        )
    objective = METHODS[config.method].from_config(
        config, config.objective, features=features, num_samples=num_samples, group=group
    )
    if oracle is not None:
        assert isinstance(objective, GraphObjective)  # the others have no --oracle
        objective = PAL(objective, oracle)
    objective.group = group
    return objective
