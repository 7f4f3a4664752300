"""The losses under autocast: what follows the projector computes in float32, on every device.

Projectors are replaced by the identity, so that features are embeddings: a projector's linear
layers run in the dtype of autocast, as they should. DIET's only layer is its head, a linear layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.config import Config
from fastssl.knobs import OracleKnobs, ProjectorKnobs
from fastssl.objectives import METHODS, build_objective, configured
from fastssl.objectives.base import Objective
from fastssl.objectives.oracles import LabelOracle
from tests.helpers.numerics import relative_error

LOW = [torch.bfloat16, torch.float16]
SAMPLES, WIDTH = 12, 16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "barlow mean": ("barlow", {"pairing": "mean"}),
    "vicreg mean": ("vicreg", {"pairing": "mean"}),
    "diet fused": ("diet", {"fused_head": True}),
    **{
        f"{name} pal": (name, {"oracle": "labels"})
        for name, method in METHODS.items()
        if issubclass(method.Knobs, OracleKnobs)
    },
}


def build(case: str, *, projector: bool = False) -> Objective:
    """A float32 objective of three views whose loss part is all of it, unless with `projector`."""
    method, knobs = CASES[case]
    if issubclass(METHODS[method].Knobs, ProjectorKnobs):
        knobs = {"projector_width": WIDTH, "projector_layers": 2, "projector_out": WIDTH} | knobs
    torch.manual_seed(0)
    config = configured(Config(views=3, batch_size=4), method=method, **knobs)
    oracle = LabelOracle([i % 4 for i in range(SAMPLES)]) if "oracle" in knobs else None
    objective = build_objective(config, features=WIDTH, num_samples=SAMPLES, oracle=oracle)
    if hasattr(objective, "projector") and not projector:
        objective.projector = nn.Identity()
    return objective


def features() -> Tensor:
    """Three views of four images (3, 4, D) float32: what they share, and little of their own."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(1, 4, WIDTH, generator=generator)
    return common + 0.3 * torch.randn(3, 4, WIDTH, generator=generator)


def value_and_gradient(
    objective: Objective, x: Tensor, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, under autocast to that dtype if any, and its gradient by x (V, N, D)."""
    x = x.detach().requires_grad_()
    index = torch.tensor([3, 1, 7, 4])
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = objective(x.unbind(0), index)["loss"]
    return loss.detach(), *torch.autograd.grad(loss, x)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_neither_loss_nor_gradient(case: str, low: torch.dtype) -> None:
    """Of features in float32, and of features in the dtype of autocast."""
    for dtype in (torch.float32, low):
        x = features().to(dtype)
        objectives = [build(case) for _ in range(3)]  # a fused head is updated by each backward
        truth, slope = value_and_gradient(objectives[0], x.float())
        outside, slope_outside = value_and_gradient(objectives[1], x)
        inside, slope_inside = value_and_gradient(objectives[2], x, low)
        assert inside.dtype == torch.float32 and slope_inside.dtype == dtype
        assert torch.equal(inside, outside) and torch.equal(slope_inside, slope_outside)
        assert relative_error(inside, truth) < 1e-5
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        assert relative_error(slope_inside, slope) < rounding  # of the gradient, once


@pytest.mark.parametrize("case", CASES)
def test_a_projector_runs_under_autocast(case: str) -> None:
    """Its products are bfloat16, the loss of its output float32."""
    objective = build(case, projector=True)
    with record() as seen, torch.autocast("cpu", torch.bfloat16):
        loss = objective(features().unbind(0), torch.tensor([3, 1, 7, 4]))["loss"]
    assert loss.dtype == torch.float32
    products = [dtypes for name, dtypes in seen if name == "aten::mm"]
    assert not hasattr(objective, "projector") or [torch.bfloat16] * 2 in products


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.dtype]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
        self.seen.append((func.name().split(".")[0], [t.dtype for t in tensors]))
        return func(*args, **(kwargs or {}))


@contextmanager
def record() -> Iterator[list[tuple[str, list[torch.dtype]]]]:
    """The ops that run, each with the dtypes of its tensors."""
    with _Record() as mode:
        yield mode.seen


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast("cuda", dtype), which turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


# They copy, or are ours: the products of our ops read low precision and add in float32.
COPIES = {
    "prim::device",
    "aten::_to_copy",
    "aten::stack",
    "aten::cat",
    "aten::unbind",
    "aten::view",
}
COPIES |= {"aten::clone", "aten::detach", "aten::expand", "aten::split", "aten::alias"}
COPIES |= {"aten::select", "aten::slice", "aten::unsqueeze", "aten::t", "aten::transpose"}
COPIES |= {"aten::_unsafe_view", "aten::empty_like", "aten::new_empty", "aten::reshape"}


def ops_in_low_precision(make: Callable[[], Objective], x: Tensor, low: torch.dtype) -> set[str]:
    """The ops of a loss of features like x on a GPU under autocast that compute in `low`."""
    shape, dtype = x.shape[1:], x.dtype
    with FakeTensorMode(), torch.device("cuda"):
        objective = make()
        fake = [torch.empty(shape, dtype=dtype) for _ in range(len(x))]
        index = torch.empty(shape[0], dtype=torch.int64)
        with record() as seen, cuda_autocast(low):
            loss = objective(fake, index)["loss"]
    assert loss.dtype == torch.float32 and loss.device.type == "cuda" and seen
    names = {name for name, dtypes in seen if low in dtypes}
    return {name for name in names - COPIES if not name.startswith("fastssl::")}


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.endswith("pal")])
def test_a_gpu_computes_no_loss_in_low_precision(case: str, low: torch.dtype) -> None:
    """By fake tensors: every op that meets the dtype of autocast copies, or is one of ours."""
    for dtype in (torch.float32, low):
        assert not ops_in_low_precision(partial(build, case), features().to(dtype), low)


def test_the_rule_sees_an_op_in_low_precision() -> None:
    class Bad(nn.Module):
        def forward(self, features: list[Tensor], index: Tensor) -> dict[str, Tensor]:
            return {"loss": (features[0] @ features[1].T).square().sum().float()}

    found = ops_in_low_precision(Bad, features(), torch.bfloat16)  # type: ignore[arg-type]
    assert "aten::mm" in found
