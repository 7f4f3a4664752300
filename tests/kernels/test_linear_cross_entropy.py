"""linear_cross_entropy: value, gradients, memory, shards, and what it refuses."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import MIB, measure
from fastssl_kernels import (
    _class_softmax,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_lse,
)
from fastssl_kernels._class_softmax import class_statistics, class_statistics_backward
from fastssl_kernels._triton import class_softmax as kernels
from tests.helpers.gloo import on_ranks
from tests.helpers.numerics import assert_within_budget, relative_error, value_and_grads
from tests.helpers.offline_compile import Kernel, assert_ships, compile_offline
from tests.helpers.triton_mode import Context, dtypes

# N, D, K: one row, all padding; one full tile; one spilled row and class; several tiles; odd; least
SIZES = [
    (1, 3, 5),
    (64, 32, 64),
    (65, 33, 129),
    (130, 40, 700),
    (37, 7, 1283),
    (3, 1, 4),
    (2, 5, 1),
]


def draw(n: int, dim: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features of unit scale, class vectors that give logits of scale 2, targets."""
    generator = torch.Generator().manual_seed(n + dim + classes)
    x = torch.randn(n, dim, generator=generator)
    w = 2 * torch.randn(classes, dim, generator=generator) / dim**0.5
    return x.to(device), w.to(device), torch.randint(classes, (n,), generator=generator).to(device)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("save", ["none", "exp"])
@pytest.mark.parametrize("smoothing", [0.0, 0.8])
def test_within_budget(
    size: tuple[int, int, int], save: str, smoothing: float, path: Context, device: str
) -> None:
    x, w, y = draw(*size, device)

    def op(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, label_smoothing=smoothing, save=save)

    def reference(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x, w, y, label_smoothing=smoothing)

    for dtype in dtypes(device):
        with path():
            assert_within_budget(op, reference, [x, w], dtype, ["loss", "dx", "dw"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_bias_ignored_rows_and_reductions(reduction: str, path: Context, device: str) -> None:
    x, w, y = draw(41, 9, 300, device)
    y[::5] = -7
    bias = torch.linspace(-2, 2, 300, device=device)
    weights = torch.linspace(-1, 1, 41, device=device)  # rows enter with different gradients
    kwargs = {"label_smoothing": 0.3, "ignore_index": -7, "reduction": reduction}

    def use(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
            rows = f(x, w, y, linear_bias=bias, **kwargs)
            return (rows * weights.to(rows.dtype)).sum() if reduction == "none" else rows

        return loss

    for dtype in dtypes(device):
        with path():
            assert_within_budget(
                use(linear_cross_entropy),
                use(linear_cross_entropy_reference),
                [x, w, bias],
                dtype,
                ["loss", "dx", "dw", "db"],
            )


OPTIONS: dict[str, dict[str, object]] = {
    "weight": {"weight": True},
    "weight and smoothing": {"weight": True, "label_smoothing": 0.3, "reduction": "none"},
    "weight, smoothing, exponentials": {"weight": True, "label_smoothing": 0.3, "save": "exp"},
    "softcap": {"softcap": 3.0, "reduction": "none"},
    "all": {"weight": True, "label_smoothing": 0.3, "softcap": 30.0, "bias": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_within_budget(name: str, path: Context, device: str) -> None:
    """Class weights, 0 among them, and a soft cap in its straight and its saturated part."""
    options = {"ignore_index": 7, **OPTIONS[name]}
    per_row = options.get("reduction") == "none"
    x, w, y = draw(41, 9, 300, device)
    y[:3], y[3] = 2, 7
    v = torch.linspace(0.1, 3, 300, device=device)
    v[::5], v[2] = 0, 0
    bias = torch.linspace(-2, 2, 300, device=device) if options.pop("bias", False) else None
    rows_weight = torch.linspace(-1, 1, 41, device=device)  # rows enter with different gradients
    if options.pop("weight", False):
        options["weight"] = v
    reference_options = {k: a for k, a in options.items() if k != "save"}

    def use(f: Callable[..., Tensor], options: dict[str, object]) -> Callable[..., Tensor]:
        def loss(x: Tensor, w: Tensor, *bias: Tensor) -> Tensor:
            rows = f(x, w, y, linear_bias=bias[0] if bias else None, **options)
            return (rows * rows_weight.to(rows.dtype)).sum() if per_row else rows

        return loss

    inputs = [x, w] if bias is None else [x, w, bias]
    for dtype in dtypes(device):
        with path():
            assert_within_budget(
                use(linear_cross_entropy, options),
                use(linear_cross_entropy_reference, reference_options),
                inputs,
                dtype,
                ["loss", "dx", "dw", "db"][: len(inputs) + 1],
            )


def test_soft_cap_keeps_the_precision_of_tanh(path: Context, device: str) -> None:
    """Of one class the log-sum-exp is the logit: far below the cap, between, and far above."""
    z = torch.cat([torch.logspace(-6, 2, 200), torch.linspace(0.1, 1, 200), torch.tensor([1e4])])
    z = torch.cat([z, -z, torch.zeros(1)])[:, None].to(device)
    labels = torch.zeros(len(z), dtype=torch.int64, device=device)
    with path():
        _, lse = linear_cross_entropy_with_lse(z, torch.ones_like(z[:1]), labels, softcap=0.5)
    truth = 0.5 * torch.tanh(z.double() / 0.5)[:, 0]
    assert ((lse - truth).abs() <= 3e-7 * truth.abs()).all()


def test_shapes_and_integer_dtypes() -> None:
    x, w, y = draw(12, 5, 30, "cpu")
    rows = linear_cross_entropy(x, w, y, reduction="none")
    for shape in ((12,), (3, 4), (2, 3, 2)):
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            xs, ys = x.view(*shape, 5), y.view(shape).to(dtype)
            for f in (linear_cross_entropy, linear_cross_entropy_reference):
                found = f(xs, w, ys, reduction="none")
                assert found.shape == shape and relative_error(found.flatten(), rows) < 1e-6
            assert torch.equal(linear_cross_entropy(xs, w, ys), linear_cross_entropy(x, w, y))
    for reduction in ("none", "mean", "sum"):
        for f in (linear_cross_entropy, linear_cross_entropy_reference):
            one = f(x[3], w, y[3], reduction=reduction)
            assert one.shape == () and relative_error(one, rows[3]) < 1e-6
    y[4] = -100
    for f in (linear_cross_entropy, linear_cross_entropy_reference):
        assert torch.equal(f(x, w, y, ignore_index=None), f(x, w, y))
    probabilities = torch.softmax(x @ w.T, 1)
    truth = F.cross_entropy(x @ w.T, probabilities)
    found = linear_cross_entropy_reference(x.view(3, 4, 5), w, probabilities.view(3, 4, 30))
    assert relative_error(found, truth) < 1e-6


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_lse_and_its_gradient(softcap: float | None, path: Context, device: str) -> None:
    """A z-loss over all rows, ignored ones among them."""
    x, w, y = draw(30, 6, 200, device)
    y[::4] = -100

    def op(x: Tensor, w: Tensor) -> Tensor:
        loss, lse = linear_cross_entropy_with_lse(
            x.view(5, 6, 6), w, y.view(5, 6), softcap=softcap, label_smoothing=0.1
        )
        assert lse.shape == (5, 6)
        return loss + 0.1 * lse.square().mean()

    def reference(x: Tensor, w: Tensor) -> Tensor:
        z = x @ w.T if softcap is None else softcap * torch.tanh(x @ w.T / softcap)
        return F.cross_entropy(z, y, label_smoothing=0.1) + 0.1 * z.logsumexp(1).square().mean()

    for dtype in dtypes(device):
        with path():
            assert_within_budget(op, reference, [x, w], dtype, ["loss", "dx", "dw"])


@pytest.mark.parametrize(("smoothing", "save"), [(0.0, "none"), (0.2, "none"), (0.2, "exp")])
def test_masked_classes_have_probability_0(
    smoothing: float, save: str, path: Context, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias of -inf on one class and on a whole block; smoothing over classes with a weight."""
    monkeypatch.setattr(kernels, "block_classes", lambda n: 256)
    monkeypatch.setattr(_class_softmax, "block_classes", lambda x: 256)
    x, w, y = draw(20, 6, 600, device)
    y = 300 + y % 200
    bias = torch.zeros(600, device=device)
    bias[:260], bias[599] = -torch.inf, -torch.inf
    seen = bias == 0
    v = torch.linspace(1, 2, 600, device=device).where(seen, 0)

    def op(x: Tensor, w: Tensor) -> Tensor:
        options = {"linear_bias": bias, "label_smoothing": smoothing, "save": save}
        return linear_cross_entropy(x, w, y, weight=v if smoothing else None, **options)

    def formula(x: Tensor, w: Tensor) -> Tensor:
        log_p = torch.log_softmax(x @ w[seen].T, 1)
        weight = v[seen].to(x.dtype) if smoothing else torch.ones_like(log_p[0])
        of_label = weight[y - 260]
        rows = (1 - smoothing) * of_label * log_p.gather(1, y[:, None] - 260)[:, 0]
        return -(rows + smoothing / 600 * (log_p @ weight)).sum() / of_label.sum()

    with path():
        assert_within_budget(op, formula, [x, w], torch.float32, ["loss", "dx", "dw"])
        options = {"linear_bias": bias, "save": save}
        smoothed = linear_cross_entropy(x, w, y, label_smoothing=0.2, **options)
    assert smoothed == torch.inf  # as in torch: masked classes have a part of the target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_give_what_torch_gives(reduction: str, path: Context, device: str) -> None:
    x, w, y = draw(4, 3, 5, device)
    bias, v = torch.ones(5, device=device), torch.ones(5, device=device)
    for options in ({}, {"weight": v, "label_smoothing": 0.1, "softcap": 2.0}):
        found = []
        for f in (linear_cross_entropy_reference, linear_cross_entropy):

            def loss(
                x: Tensor, w: Tensor, b: Tensor, f: Callable[..., Tensor] = f, o: dict = options
            ) -> Tensor:
                return f(x, w, y[:0], linear_bias=b, reduction=reduction, **o)

            with path():
                leaves = [t.clone().requires_grad_() for t in (x[:0], w, bias)]
                value = loss(*leaves)
                grads = torch.autograd.grad(value.sum(), leaves)
            found.append([value.detach(), *grads])
        for truth, ours in zip(*found, strict=True):
            assert torch.equal(truth.nan_to_num(7.0), ours.nan_to_num(7.0))
    empty = linear_cross_entropy(x[:0].view(0, 4, 3), w, y[:0].view(0, 4), reduction="none")
    assert empty.shape == (0, 4)


def test_meta_tensors() -> None:
    x, w, y = (t.to("meta") for t in draw(300, 700, 40, "cpu"))
    x, w = x.requires_grad_(), w.requires_grad_()
    loss, lse = linear_cross_entropy_with_lse(x, w, y, weight=w[:, 0].detach(), label_smoothing=0.1)
    dx, dw = torch.autograd.grad(loss + lse.sum(), (x, w))
    assert loss.shape == () and lse.shape == (300,)
    assert (dx.shape, dw.shape, dw.device.type) == (x.shape, w.shape, "meta")


def test_equals_torch_by_argument_name() -> None:
    x, w, y = draw(33, 12, 101, "cpu")
    bias, v = torch.randn(101), torch.rand(101, generator=torch.Generator().manual_seed(0))
    for reduction in ("mean", "sum", "none"):
        logits = F.linear(x.double(), w.double(), bias.double())
        options = {"label_smoothing": 0.2, "reduction": reduction}
        truth = F.cross_entropy(logits, y, weight=v.double(), **options)
        kwargs = {"linear_bias": bias, "weight": v, "ignore_index": None, **options}
        loss = linear_cross_entropy(x, w, y, **kwargs)
        assert loss.dtype == torch.float32
        assert relative_error(loss, truth) < 1e-6
        if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
            assert relative_error(F.linear_cross_entropy(x, w, y, **kwargs), loss) < 1e-6


def test_gradcheck_in_float64() -> None:
    x, w, y = (t.double() if t.is_floating_point() else t for t in draw(4, 3, 6, "cpu"))
    y[1] = -100
    bias = torch.randn(6, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, w, bias)]
    for save in ("none", "exp"):

        def loss(x: Tensor, w: Tensor, b: Tensor, save: str = save) -> Tensor:
            kwargs = {"linear_bias": b, "label_smoothing": 0.8, "save": save}
            return linear_cross_entropy(x, w, y, **kwargs)

        assert torch.autograd.gradcheck(loss, inputs)

    def capped(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.arange(6.0)
        options = {"linear_bias": b, "label_smoothing": 0.8, "weight": v, "softcap": 1.5}
        return linear_cross_entropy_with_lse(x, w, y, **options)

    assert torch.autograd.gradcheck(capped, inputs)


def test_all_rows_ignored_is_nan_as_in_torch() -> None:
    x, w, _ = draw(3, 2, 5, "cpu")
    y = torch.full((3,), -100)
    assert linear_cross_entropy(x, w, y).isnan()
    assert linear_cross_entropy(x, w, y, reduction="sum") == 0


def near_optimum(classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features and class vectors where p is about 0.2 on the target and 0.8 / K elsewhere, which is
    where DIET spends its time: the gradient of other rows is p - 0.8 / K, a difference."""
    generator = torch.Generator().manual_seed(classes)
    n, dim = 64, 32
    x = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    w = 0.3 * torch.randn(classes, dim, generator=generator) / dim**0.5
    w[:n] = x * float(np.log(classes * 0.25))
    return x.to(device), w.to(device), torch.arange(n, device=device)


@pytest.mark.parametrize("save", ["none", "exp"])
def test_target_rows_and_other_rows_each_within_budget(
    save: str, path: Context, device: str
) -> None:
    x, w, y = near_optimum(2500, device)

    def gradients(f: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dw = value_and_grads(f, [x.to(half), w.to(half)], dtype)[2]
        return dw[: len(y)], dw[len(y) :]

    def reference(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x, w, y, label_smoothing=0.8)

    def op(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, label_smoothing=0.8, save=save)

    for half in dtypes(device):
        truth, eager = gradients(reference, torch.float64), gradients(reference, half)
        with path():
            fused = gradients(op, half)
        for rows, t, e, f in zip(("target", "other"), truth, eager, fused, strict=True):
            budget = 2 * relative_error(e, t) + 4 * torch.finfo(half).eps
            assert relative_error(f, t) <= budget, f"{half} {rows} rows: {relative_error(f, t):.1e}"


def test_budget_notices_a_dropped_smoothing_gradient() -> None:
    """The fault that loose tolerances let pass: p instead of p - e / K off the target."""
    x, w, y = near_optimum(5000, "cpu")
    one = torch.full((len(y),), 1 / len(y))
    empty = torch.empty(0)
    lse, target, _, low, *_ = class_statistics(x, w, None, y, False)
    smoothing = (-0.2 * one, -0.8 / len(w) * one)
    saved = (x, w, None, y, lse, target, low, empty, empty)
    _, right, _ = class_statistics_backward(one, *smoothing, *saved)
    _, wrong, _ = class_statistics_backward(one, smoothing[0], 0 * one, *saved)

    def reference(w: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x.to(w), w, y, label_smoothing=0.8)

    (_, truth), (_, eager) = (
        value_and_grads(reference, [w], d) for d in (torch.float64, torch.float32)
    )
    budget = 2 * relative_error(eager, truth) + 4 * torch.finfo(torch.float32).eps
    assert relative_error(right, truth) <= budget
    assert relative_error(wrong, truth) > 1000 * budget
    assert (right - wrong).abs().max() < 1e-4  # an absolute tolerance of 1e-4 would let it pass


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # the interpreter's
def test_a_soft_cap_lets_nan_through(path: Context, device: str) -> None:
    x, w, y = draw(5, 3, 40, device)
    x[2, 1], x[3, 0] = torch.nan, torch.inf
    with path():
        rows = linear_cross_entropy(x, w.abs(), y, softcap=5.0, reduction="none")
    assert rows.isnan().tolist() == [False, False, True, False, False]


def test_large_logits_stay_finite(path: Context, device: str) -> None:
    x, w, y = draw(20, 8, 150, device)
    with path():
        value, dx, dw = value_and_grads(
            lambda x, w: linear_cross_entropy(x, w, y, label_smoothing=0.1),
            [100 * x, 10 * w],
            torch.float32,
        )
    assert value.isfinite() and dx.isfinite().all() and dw.isfinite().all()
    assert value > 100


def test_repeats_bit_for_bit(path: Context, device: str) -> None:
    x, w, y = draw(65, 33, 900, device)
    with path():
        first, second = (
            value_and_grads(
                lambda x, w: linear_cross_entropy(x, w, y, label_smoothing=0.8),
                [x, w],
                torch.float32,
            )
            for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reads_no_memory_it_did_not_write(
    path: Context, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    x, w, y = draw(65, 33, 700, device)
    for save in ("none", "exp"):

        def op(x: Tensor, w: Tensor, save: str = save) -> Tensor:
            return linear_cross_entropy(x, w, y, save=save)

        with path():
            clean = value_and_grads(op, [x, w], torch.float32)
            monkeypatch.setattr(Tensor, "new_empty", poisoned)
            dirty = value_and_grads(op, [x, w], torch.float32)
            monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_several_blocks_equal_one(monkeypatch: pytest.MonkeyPatch, path: Context) -> None:
    x, w, y = draw(70, 20, 1500, "cpu")

    def op(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, label_smoothing=0.8, save="exp")

    def run(size: int) -> list[Tensor]:
        monkeypatch.setattr(kernels, "block_classes", lambda n: size)
        with path():
            return value_and_grads(op, [x, w], torch.float32)

    for a, b in zip(run(2048), run(256), strict=True):
        assert relative_error(a, b) < 1e-6


def test_autocast_keeps_float32_sums() -> None:
    x, w, y = draw(40, 16, 500, "cpu")
    plain = linear_cross_entropy(x, w, y, label_smoothing=0.8)
    with torch.autocast("cpu", torch.bfloat16):
        under = linear_cross_entropy(x, w, y, label_smoothing=0.8)
        mixed = linear_cross_entropy(x.bfloat16(), w, y, label_smoothing=0.8)
    assert under.dtype == torch.float32 and torch.equal(plain, under)
    assert 0 < relative_error(mixed, plain) < 1e-2


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of its own copies
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(save: bool) -> None:
    x, w, y = draw(5, 4, 30, "cpu")
    inputs = (x.requires_grad_(), w.requires_grad_(), torch.randn(30, requires_grad=True), y, save)
    torch.library.opcheck(class_statistics, inputs)
    torch.library.opcheck(class_statistics, (x, w, None, y, save))
    fast = ("test_schema", "test_autograd_registration", "test_faketensor")
    weighted = (x, w, None, y, save, torch.rand(30), 0.0 if save else 2.0)
    torch.library.opcheck(class_statistics, weighted, test_utils=fast)
    no_rows = (x.detach()[:0].requires_grad_(), w, None, y[:0], save)
    torch.library.opcheck(class_statistics, no_rows, test_utils=fast)


@pytest.mark.parametrize("with_options", [False, True])
def test_fullgraph(with_options: bool) -> None:
    x, w, y = draw(12, 6, 90, "cpu")

    def op(x: Tensor, w: Tensor) -> Tensor:
        if not with_options:
            return linear_cross_entropy(2 * x, w, y, label_smoothing=0.8)
        options = {"weight": y.new_ones(90, dtype=torch.float32), "softcap": 4.0}
        shapes = ((2 * x).view(3, 4, 6), w, y.view(3, 4).int())
        loss, lse = linear_cross_entropy_with_lse(*shapes, label_smoothing=0.8, **options)
        return loss + lse.square().mean()

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    eager = value_and_grads(op, [x, w], torch.float32)
    for a, b in zip(eager, value_and_grads(compiled, [x, w], torch.float32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_memory_without_saving_is_independent_of_classes() -> None:
    """(256, 512, 200 k): at most 64 MB beyond inputs and outputs, of which dw is one."""
    n, dim, classes = 256, 512, 200_000
    x = torch.randn(n, dim, requires_grad=True)
    w = torch.randn(classes, dim, requires_grad=True)
    y = torch.randint(classes, (n,))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(x, w, y, save="none"), (x, w))

    peak = measure({"step": step}, "cpu", seconds=0, min_runs=1)["step"].peak_mib
    outputs = (x.numel() + w.numel()) * 4 / MIB
    assert outputs <= peak <= outputs + 64e6 / MIB


def sharded(
    rank: int, world: int, classes: int, smoothing: float
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each reduction: loss, gradient of this rank's rows and of this rank's classes."""
    import torch.distributed as dist

    x, w, y = draw(4 * world, 5, classes, "cpu")
    y[1] = -100
    sizes = [classes // world + (r < classes % world) for r in range(world)]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    rows = slice(4 * rank, 4 * rank + 4)
    xs, ws = x[rows].clone().requires_grad_(), w[own].clone().requires_grad_()
    found = {}
    for reduction in ("mean", "sum"):
        kwargs = {"label_smoothing": smoothing, "reduction": reduction, "group": dist.group.WORLD}
        loss = linear_cross_entropy(xs, ws, y[rows], **kwargs)
        found[reduction] = (loss.detach(), *torch.autograd.grad(loss, (xs, ws)))
        v, bias = torch.arange(1.0, classes + 1), torch.linspace(-1, 1, classes)
        kwargs |= {"weight": v[own], "linear_bias": bias[own], "softcap": 2.0}
        pairs = (xs.view(2, 2, 5), ws, y[rows].view(2, 2))
        loss, lse = linear_cross_entropy_with_lse(*pairs, **kwargs)
        assert lse.shape == (2 * world, 2)
        loss = loss + 0.1 * lse.square().sum()
        found["weighted " + reduction] = (loss.detach(), *torch.autograd.grad(loss, (xs, ws)))
    return found


@pytest.mark.parametrize(
    "world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))]
)
def test_shards_equal_one_process(world: int) -> None:
    """13 classes over the ranks, an ignored row among them; the row gradient is times world."""
    x, w, y = draw(4 * world, 5, 13, "cpu")
    y[1] = -100
    found = on_ranks(world, sharded, 13, 0.8)
    v, bias = torch.arange(1.0, 14), torch.linspace(-1, 1, 13)

    def weighted(x: Tensor, w: Tensor, reduction: str) -> Tensor:
        z = 2 * torch.tanh((x @ w.T + bias) / 2)
        options = {"weight": v.double(), "label_smoothing": 0.8, "reduction": reduction}
        return F.cross_entropy(z, y, **options) + 0.1 * z.logsumexp(1).square().sum()

    def plain(x: Tensor, w: Tensor, reduction: str) -> Tensor:
        return linear_cross_entropy_reference(x, w, y, label_smoothing=0.8, reduction=reduction)

    for name in found[0]:
        formula = partial(weighted if "weighted" in name else plain, reduction=name.split()[-1])
        loss, dx, dw = value_and_grads(formula, [x, w], torch.float64)
        parts = [part[name] for part in found]
        assert all(relative_error(part[0], loss) < 1e-6 for part in parts)
        assert relative_error(torch.cat([part[1] for part in parts]), world * dx) < 1e-5
        assert relative_error(torch.cat([part[2] for part in parts]), dw) < 1e-5


def configurations() -> list[Kernel]:
    """Every tile that ships: plain, with exponentials, a bias, and all that goes with either."""
    kinds = {"x_ptr": 0, "w_ptr": 0, "bias_ptr": 0, "weight_ptr": "*fp32", "labels_ptr": "*i64"}
    scalars = dict.fromkeys(("N", "K", "first", "stop"), "i32") | {"D": "i32:16", "C": "i32:16"}
    scalars |= {"softcap": "fp32"}
    flags = [  # bias, save, weight, cap
        (False, False, False, False),
        (False, True, False, False),
        (True, False, False, False),
        (True, True, True, False),
        (True, False, True, True),
    ]
    forward = kinds | dict.fromkeys(("partial_ptr", "reference_ptr"), "*fp32")
    backward = kinds | dict.fromkeys(("lse_ptr", "grads_ptr", "reference_ptr"), "*fp32")
    found = []
    for cc in (80, 90, 100):
        for dtype in (torch.bfloat16, torch.float32):
            name = "*bf16" if dtype == torch.bfloat16 else "*fp32"
            kept = "*fp16" if dtype == torch.bfloat16 else "*fp32"  # exponentials
            for bias, save, weight, cap in flags:
                x = torch.empty(0, dtype=dtype)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(kernels, "architecture", lambda _, cc=cc: cc)
                    tile = kernels.tile(x, bias or save or weight or cap)
                sides = {k: v for k, v in tile.items() if k.startswith("BLOCK")}
                launch = {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}
                has = {"HAS_BIAS": bias, "HAS_WEIGHT": weight, "HAS_CAP": cap}
                has |= {"EVEN_D": True, "PRECISION": "ieee"}
                types = {k: v or name for k, v in forward.items()} | {"exp_ptr": kept}
                types |= {k: scalars[k] for k in (*"NKDC", "softcap")} | {"span": "i32:16"}
                found.append(
                    Kernel(
                        "fastssl_kernels._triton.class_softmax:_statistics_kernel",
                        types,
                        {**has, "SAVE": save, **sides},
                        cc,
                        **launch,
                    )
                )
                types = {k: v or name for k, v in backward.items()}
                types |= {"exp_ptr": kept, "g_ptr": name}
                types |= {k: scalars[k] for k in ("first", "stop", *"NDC", "softcap")}
                found.append(
                    Kernel(
                        "fastssl_kernels._triton.class_softmax:_gradient_kernel",
                        types,
                        {**has, "SAVED": save, **sides},
                        cc,
                        **launch,
                    )
                )
    return found


@pytest.mark.slow
def test_every_tile_compiles_without_spills() -> None:
    """The dot runs on tensor cores, except in float32 and where the exponentials were saved."""
    for resources in compile_offline(configurations()):
        bf16 = resources.kernel.signature["x_ptr"] == "*bf16"
        dot = bf16 and not resources.kernel.constexprs.get("SAVED", False)
        assert_ships(resources, dot=dot)


def test_real_digits_train_as_the_eager_loss(data: Path) -> None:
    """20 steps of a linear map and class vectors on real digits: the same curve."""
    images = np.load(data / "mnist.npz")["x_train"][:500].reshape(500, -1) / 255
    x = torch.tensor(images, dtype=torch.float32)
    curves = []
    for loss in (linear_cross_entropy, linear_cross_entropy_reference):
        torch.manual_seed(0)
        embed, w = torch.randn(x.shape[1], 16) * 0.05, torch.randn(500, 16) * 0.1
        parameters = [embed.requires_grad_(), w.requires_grad_()]
        optimizer = torch.optim.SGD(parameters, lr=2.0)
        curve = []
        for step in range(20):
            rows = torch.arange(step * 64, step * 64 + 64) % 500
            value = loss(x[rows] @ embed, w, rows, label_smoothing=0.8)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-1] < curves[0][0] - 0.01
    assert relative_error(curves[0], curves[1]) < 1e-5


X, W, Y = torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X, W[:, :2], Y), "linear_weight"),
        ((X[0, 0], W, Y[0]), "input"),
        ((X, W[:0], Y), "empty"),
        ((X[:, :0], W[:, :0], Y), "empty"),
        ((X[0], W, Y), "one for each input"),
        ((X, W, Y[:3]), "target"),
        ((X.view(2, 2, 3), W, Y), r"wanted int64 class indices \(2, 2\)"),
        ((X, W, Y > 0), "int64"),
        ((X, W, torch.zeros(4, 6)), "linear_cross_entropy_reference accepts"),
        ((X.int(), W, Y), "floating point"),
        ((X, W, Y + 6), "outside"),
        ((X, W, Y - 1), "outside"),
    ],
)
def test_refuses(arguments: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(*arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linear_bias": torch.zeros(5)}, "linear_bias"),
        ({"weight": torch.zeros(5)}, "weight"),
        ({"weight": torch.zeros(6, dtype=torch.int64)}, "floating point"),
        ({"weight": torch.zeros(6, requires_grad=True)}, "detach"),
        ({"softcap": 0.0}, "softcap"),
        ({"softcap": float("inf")}, "softcap"),
        ({"softcap": 1.0, "save": "exp"}, "use 'auto'"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"reduction": "max"}, "reduction"),
        ({"save": "logits"}, "save"),
        ({"group": object()}, "not initialised"),
    ],
)
def test_refuses_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(X, W, Y, **options)


@pytest.mark.gpu
def test_logits_beyond_two_to_the_31() -> None:
    """(2048, 512, 1,281,167) in bf16: odd K, offsets past int32, one row against the reference."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2048, 512, device="cuda", generator=generator, dtype=torch.bfloat16)
    w = torch.randn(1_281_167, 512, device="cuda", generator=generator, dtype=torch.bfloat16) / 16
    y = torch.randint(len(w), (2048,), device="cuda", generator=generator)
    y[-1] = len(w) - 1
    loss = linear_cross_entropy(x, w, y, label_smoothing=0.8, reduction="none", save="none")
    truth = linear_cross_entropy_reference(
        x[-8:].double(), w.double(), y[-8:], label_smoothing=0.8, reduction="none"
    )
    assert relative_error(loss[-8:], truth) < 1e-4


@pytest.mark.gpu
def test_no_host_sync() -> None:
    x, w, y = draw(256, 64, 5000, "cuda")
    x, w = x.requires_grad_(), w.requires_grad_()
    linear_cross_entropy(x, w, y).backward()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(x, w, y, label_smoothing=0.8).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
