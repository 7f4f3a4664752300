"""Counters and settings of every module outlive casts, copies and state dicts.

A cast to bfloat16 used to take a step counter along: it counted to 256 and no further.
"""

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastssl
import fastssl_kernels
import fastssl_pipelines
from fastssl.backbones import build_backbone, feature_width
from fastssl.config import Config
from fastssl.distributed import _RankBatchNorm, _SumRanks
from fastssl.objectives import METHODS, build_objective, configured
from fastssl.objectives.base import GraphObjective, Objective, ProjectedObjective, ProjectorKnobs
from fastssl.objectives.oracles import LabelOracle, Oracle, QueryOracle, build_oracle
from fastssl.objectives.pal import PAL
from fastssl.objectives.sdiet import BatchHead
from fastssl.step import Model
from fastssl_kernels import BarlowTwinsLoss, DIETHead, NTXentLoss, VICRegLoss

M, N, F = 24, 4, 6
LABELS = [i % 3 for i in range(M)]
ABSTRACT = {Objective, ProjectedObjective, GraphObjective}
Make = Callable[[], nn.Module]


def objective(method: str, oracle: str = "none", **knobs: Any) -> Objective:
    if issubclass(METHODS[method].Knobs, ProjectorKnobs):
        knobs |= {"projector_width": 16, "projector_layers": 2}
    if oracle != "none":
        knobs["oracle"] = oracle
    config = configured(Config(batch_size=N, lr=1.23e-3), method=method, **knobs)
    known = build_oracle(config, LABELS) if oracle != "none" else None
    return build_objective(config, features=F, num_samples=M, oracle=known)


def model() -> Model:
    backbone = build_backbone("fastnet-4")
    config = configured(Config(batch_size=N), method="diet")
    head = build_objective(config, features=feature_width(backbone, 8), num_samples=M)
    return Model(backbone, head)


CASES: dict[str, Make] = {
    **{name: (lambda name=name: objective(name)) for name in METHODS},
    "diet fused": lambda: objective("diet", fused_head=True, sample_rate=0.5),
    "pal labels": lambda: objective("vicreg", "labels"),
    "pal queries": lambda: objective("vicreg", "queries"),
    "head adamw": lambda: DIETHead(M, F, optimizer="adamw", lr=1.23e-3, bias=True),
    "head sgd": lambda: DIETHead(M, F, optimizer="sgd", lr=1.23e-3),
    "batch head": lambda: BatchHead(M, F, lr=1.23e-3),
    "oracle": lambda: Oracle(M),
    "label oracle": lambda: LabelOracle(LABELS, 0.5),
    "query oracle": lambda: QueryOracle(M, alike, 9),
    "model": model,
    "batch norm over ranks": lambda: _RankBatchNorm(F, momentum=0.123),
    "lightly barlow": lambda: BarlowTwinsLoss(0.0123),
    "lightly nt-xent": lambda: NTXentLoss(0.123),
    "lightly vicreg": lambda: VICRegLoss(1.23, 4.56, 7.89, eps=1.23e-4),
}


def alike(i: int, j: int) -> bool:
    return LABELS[i] == LABELS[j]


def used(make: Make) -> nn.Module:
    """The module after a few steps, with a rate that is not the one it was built with."""
    torch.manual_seed(0)
    module = make()
    for _ in range(3):
        train_step(module)
    for part in module.modules():
        if hasattr(part, "lr"):
            part.lr = 4.56e-4  # type: ignore[assignment]
    return module


def train_step(module: nn.Module) -> None:
    """A forward and backward pass of whatever takes one, on inputs of the module's dtype."""
    floats = [p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()]
    dtype = floats[0].dtype if floats else torch.float32
    index = torch.randperm(M)[:N]
    z = torch.randn(2, N, F).to(dtype)
    if isinstance(module, Objective):
        module([*z], index)["loss"].backward()
    elif isinstance(module, DIETHead | BatchHead):
        module(z.requires_grad_(), index).backward()
    elif isinstance(module, Oracle):
        module.ask(index, z[0])
    elif isinstance(module, Model):
        module([torch.randn(N, 3, 8, 8).to(dtype)], index)[0]["loss"].backward()
    elif isinstance(module, _RankBatchNorm):
        module.eval()(z[0])  # its training needs ranks
        module.train()
    else:
        module(z[0], z[1])


def counters_and_settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, strings and flags that modules hold, tensors of integers, and scalar tensors."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, int | float | str | tuple | list):
                found[f"{path}.{name}"] = value
        if hasattr(part, "lr"):
            found[f"{path}.lr"] = part.lr
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.ndim == 0 or not buffer.is_floating_point():
                found[f"{path}.{name}"] = (buffer.dtype, buffer.tolist())
    return found


def through_state(module: nn.Module, make: Make, **options: bool) -> nn.Module:
    other = make()
    other.load_state_dict(copy.deepcopy(module.state_dict()), **options)
    return other


CASTS: dict[str, Callable[[nn.Module, Make], nn.Module]] = {
    "bfloat16": lambda module, make: module.bfloat16(),
    "half": lambda module, make: module.half(),
    "double": lambda module, make: module.double(),
    "to and back": lambda module, make: module.to(torch.bfloat16).to(torch.float32),
}
COPIES: dict[str, Callable[[nn.Module, Make], nn.Module]] = {
    "deepcopy": lambda module, make: copy.deepcopy(module),
    "pickle": lambda module, make: pickle.loads(pickle.dumps(module)),
    "state_dict": through_state,
    "state_dict, assign": lambda module, make: through_state(module, make, assign=True),
}


@pytest.mark.parametrize("how", [*CASTS, *COPIES])
@pytest.mark.parametrize("name", CASES)
def test_counters_and_settings_survive(name: str, how: str) -> None:
    module = used(CASES[name])
    before = copy.deepcopy(counters_and_settings(module))
    after = counters_and_settings({**CASTS, **COPIES}[how](module, CASES[name]))
    assert after == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_counters_and_settings_do_not_depend_on_the_default_dtype(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    expected = counters_and_settings(CASES[name]())
    torch.set_default_dtype(dtype)
    try:
        found = counters_and_settings(CASES[name]())
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


@pytest.mark.parametrize("name", ["diet fused", "head adamw", "head sgd", "sdiet", "batch head"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_takes_the_same_step(name: str, how: str) -> None:
    module = used(CASES[name])
    other = COPIES[how](module, CASES[name])
    for each in (module, other):
        torch.manual_seed(1)
        train_step(each)
    a, b = module.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["head adamw", "head sgd", "batch head"])
def test_a_cast_head_counts_on(name: str) -> None:
    head: Any = used(CASES[name]).bfloat16()
    head.step.fill_(1500)
    for _ in range(3):
        train_step(head)
    assert head.step == 1503


def test_states_without_a_rate_load() -> None:
    """Those of earlier versions; the rate is then that of the module."""
    for name in ("diet fused", "sdiet"):
        state = used(CASES[name]).state_dict()
        earlier = {k: v for k, v in state.items() if not k.endswith(("_rate", "_extra_state"))}
        assert len(earlier) == len(state) - 1
        module: Any = CASES[name]()
        module.load_state_dict(earlier)
        assert module.head.lr == 1.23e-3 and module.head.step == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_over_ranks_counts_rows_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,001 rows, which bfloat16 rounds to 1,000: output and statistics of torch's batch norm."""
    monkeypatch.setattr(_SumRanks, "apply", lambda x, group: x)  # one rank
    torch.manual_seed(0)
    x = (3 + torch.randn(1001, 5)).to(dtype)
    ours, torchs = _RankBatchNorm(5), nn.BatchNorm1d(5)
    found, truth = ours(x), torchs(x)
    assert found.dtype == truth.dtype == dtype
    # the sums of 1,001 rows are taken in another order
    assert (found - truth).abs().max() <= 8 * torch.finfo(dtype).eps * truth.abs().max()
    for (name, a), b in zip(ours.named_buffers(), torchs.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=0), name


def packages(root: ModuleType) -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        if (
            "._triton" not in found.name
            and "cuda" not in found.name
            and "__main__" not in found.name
        ):
            try:
                yield importlib.import_module(found.name)
            except ImportError:  # an engine's library is not installed
                continue


def test_every_module_has_a_case() -> None:
    classes = {
        value
        for root in (fastssl, fastssl_kernels, fastssl_pipelines)
        for module in packages(root)
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__.startswith("fastssl")
    }
    covered = {type(part) for make in CASES.values() for part in make().modules()}
    assert PAL in covered
    assert classes - ABSTRACT - covered == set()
