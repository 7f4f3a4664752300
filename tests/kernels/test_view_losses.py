"""What every loss over views promises: its error, its limits, its errors, and how torch sees it."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fastssl_kernels import (
    barlow_twins_loss,
    barlow_twins_loss_reference,
    coding_rate,
    coding_rate_reference,
    dimension_contrastive_loss,
    sample_contrastive_loss,
    second_moment_energy,
    vicreg_ctr_loss,
    vicreg_exp_loss,
    vicreg_loss,
    vicreg_loss_reference,
)
from tests.helpers.numerics import assert_within_budget, relative_error, value_and_grads
from tests.helpers.triton_mode import fused

Loss = Callable[..., Tensor]
ORDINARY = {  # loss, reference
    "barlow": (barlow_twins_loss, barlow_twins_loss_reference),
    "barlow mean": (
        partial(barlow_twins_loss, pairing="mean"),
        partial(barlow_twins_loss_reference, pairing="mean"),
    ),
    "vicreg": (vicreg_loss, vicreg_loss_reference),
}
FUSED = {name: ORDINARY[name] for name in ("barlow", "vicreg")}
EVERY: dict[str, Loss] = {
    **{name: loss for name, (loss, _) in ORDINARY.items()},
    "coding rate": coding_rate,
    "energy": second_moment_energy,
    "dimension": dimension_contrastive_loss,
    "sample": sample_contrastive_loss,
    "exp": partial(vicreg_exp_loss, temperature=0.5),
    "ctr": partial(vicreg_ctr_loss, temperature=0.5),
}
OPS = ["barlow", "barlow mean", "vicreg", "coding rate", "energy"]
WIDE = [(2, 3, 7), (3, 33, 70), (2, 130, 257), (5, 31, 64)]  # N < D, where Gram belongs
SIZES = {"gram": WIDE, "direct": [*WIDE, (2, 65, 33), (3, 129, 2), (2, 7, 1)]}
SIZES["auto"] = SIZES["direct"]
TILES = {"gram": [(2, 3, 7), (2, 64, 128), (3, 65, 129)], "direct": [(2, 64, 32), (3, 65, 33)]}


def views(v: int, n: int, d: int, seed: int = 0) -> Tensor:
    """Float64: a common part, an own part, a mean, columns of different spread."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, n, d, generator=generator, dtype=torch.float64)
    own = torch.randn(v, n, d, generator=generator, dtype=torch.float64)
    spread = torch.rand(d, generator=generator, dtype=torch.float64) + 0.3
    return (common + 0.5 * own) * spread + 0.3


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("path", ["gram", "direct", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lean_path_within_budget(name: str, path: str, dtype: torch.dtype) -> None:
    loss, reference = ORDINARY[name]
    for size in SIZES[path]:
        assert_within_budget(partial(loss, path=path), reference, [views(*size)], dtype)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("path", ["gram", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_within_budget(name: str, path: str, dtype: torch.dtype, device: str) -> None:
    loss, reference = FUSED[name]
    for size in TILES[path]:
        with fused(device):
            x = [views(*size).to(device)]
            assert_within_budget(partial(loss, path=path), reference, x, dtype)


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("path", ["gram", "direct", "auto"])
def test_float64_is_the_formula(name: str, path: str) -> None:
    loss, reference = ORDINARY[name]
    for size in WIDE:
        truth = value_and_grads(reference, [views(*size)], torch.float64)
        found = value_and_grads(partial(loss, path=path), [views(*size)], torch.float64)
        assert all(relative_error(f, t) < 1e-12 for f, t in zip(found, truth, strict=True)), size


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_rows(name: str, dtype: torch.dtype, device: str) -> None:
    """Their standardised columns are +-1, so Barlow's gradient all but cancels."""
    loss, reference = ORDINARY[name]
    for seed, width in ((seed, width) for seed in range(5) for width in (1, 5, 64)):
        x = [views(2, 2, width, seed).to(device)]
        assert_within_budget(loss, reference, x, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("path", ["gram", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_within_budget_at_size(name: str, path: str, dtype: torch.dtype) -> None:
    loss, reference = ORDINARY[name]
    for size in [(2, 255, 8191), (2, 1024, 2048), (2, 4097, 513), (2, 8192, 3), (8, 129, 2049)]:
        assert_within_budget(partial(loss, path=path), reference, [views(*size).cuda()], dtype)


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scales_constant_columns_and_zero_rows(name: str, scale: float, device: str) -> None:
    loss, reference = ORDINARY[name]
    x = views(2, 33, 47) * scale
    x[..., 4] = scale  # constant
    x[:, 7] = 0
    for path in ("gram", "direct"):
        assert_within_budget(partial(loss, path=path), reference, [x], torch.float32)
        with fused(device):
            fine = partial(loss, path=path)
            assert_within_budget(fine, reference, [x.to(device)], torch.float32)
            with np.errstate(over="ignore"):  # the interpreter casts in numpy
                value, gradient = value_and_grads(fine, [x.to(device)], torch.float16)
        fits = value_and_grads(reference, [x], torch.float64)[1].abs() < 6e4  # in float16
        assert value.isfinite() and gradient.cpu()[fits].isfinite().all()


def test_views_that_agree_keep_their_small_difference() -> None:
    """Invariance is a difference of views: it must not drown in the rounding of the views."""
    x = views(2, 33, 17)
    x[1] = x[0] + 1e-3 * x[1]
    invariance = partial(vicreg_loss, std_coeff=0.0, cov_coeff=0.0)
    reference = partial(vicreg_loss_reference, std_coeff=0.0, cov_coeff=0.0)
    for dtype in (torch.float32, torch.bfloat16):
        assert_within_budget(invariance, reference, [x], dtype)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_gives_a_non_finite_loss(name: str, bad: float, device: str) -> None:
    x = views(2, 9, 5).float()
    x[0, 3, 2] = bad
    for path in ("auto", "direct", "gram") if name not in ("exp", "ctr") else (None,):
        loss = partial(EVERY[name], path=path) if path else EVERY[name]
        assert not loss(x).isfinite()
        with fused(device), np.errstate(invalid="ignore"):  # the interpreter computes in numpy
            assert not loss(x.to(device)).isfinite()


BAD = {
    "different shapes": ([torch.zeros(4, 3), torch.zeros(4, 2)], r"\(4, 3\), \(4, 2\)"),
    "no views": ([], "0 views"),
    "flat": (torch.zeros(4, 3), r"\(4, 3\).*\(V, N, D\)"),
    "integers": (torch.zeros(2, 4, 3, dtype=torch.int64), "int64"),
    "devices": ([torch.zeros(4, 3), torch.zeros(4, 3, device="meta")], "meta"),
    "dtypes": ([torch.zeros(4, 3), torch.zeros(4, 3).double()], "float64"),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(name: str, bad: str) -> None:
    given, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        EVERY[name](given)


@pytest.mark.parametrize("name", ["barlow", "barlow mean", "vicreg", "energy", "exp", "ctr"])
def test_one_view_is_too_few(name: str) -> None:
    with pytest.raises(ValueError, match="V >= 2"):
        EVERY[name](torch.zeros(1, 4, 3))


def test_bad_arguments_are_named() -> None:
    x = views(2, 4, 3)
    with pytest.raises(ValueError, match=r"path is 'fast'.*gram"):
        vicreg_loss(x, path="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pairing is 'all'.*pairs"):
        barlow_twins_loss(x, pairing="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps_sq is 0"):
        coding_rate(x, eps_sq=0.0)
    with pytest.raises(ValueError, match="temperature is -1"):
        vicreg_exp_loss(x, temperature=-1.0)
    with pytest.raises(ValueError, match="not initialised"):
        barlow_twins_loss(x, group=object())


@pytest.mark.parametrize("name", EVERY)
def test_dtypes_lists_and_strides(name: str) -> None:
    loss, x = EVERY[name], views(2, 6, 5)
    assert loss(x).dtype == torch.float64
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert loss(x.to(dtype)).dtype == torch.float32 and loss(x.to(dtype)).shape == ()
    assert torch.equal(loss(list(x)), loss(x))
    strided = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(strided), strided)
    dense = x.clone().requires_grad_()
    assert relative_error(gradient, *torch.autograd.grad(loss(dense), dense)) < 1e-13


@pytest.mark.parametrize("name", EVERY)
def test_gradcheck(name: str) -> None:
    x = views(3, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(EVERY[name], [x])


@pytest.mark.parametrize("name", OPS)
def test_backward_scales_repeats_and_may_be_left_out(name: str, device: str) -> None:
    loss = EVERY[name]
    x = views(2, 6, 5).float().to(device).requires_grad_()
    with fused(device):
        value = loss(x)
        (first,) = torch.autograd.grad(value, x, retain_graph=True)
        (again,) = torch.autograd.grad(value, x, retain_graph=True)
        (scaled,) = torch.autograd.grad(3 * value, x)
        (repeated,) = torch.autograd.grad(loss(x), x)
        with torch.no_grad():
            alone = loss(x)
    assert torch.equal(first, again) and torch.equal(first, repeated)  # same input, same bits
    assert relative_error(scaled, 3 * first) < 1e-6
    assert torch.equal(alone, value.detach()) and not alone.requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own reading
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    x = views(3, 4, 5).float().requires_grad_()
    common = ("auto", "", True)
    op, arguments = {
        "barlow": ("barlow_twins", (x, 0.01, 1e-5, False, *common)),
        "barlow mean": ("barlow_twins", (x, 0.01, 1e-5, True, *common)),
        "vicreg": ("vicreg", (x, 25.0, 25.0, 1.0, 1.0, 1e-4, *common)),
        "coding rate": ("coding_rate", (x, 0.2, *common)),
        "energy": ("second_moment_energy", (x, True, False, *common)),
    }[name]
    torch.library.opcheck(getattr(torch.ops.fastssl, op).default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["barlow", "vicreg", "coding rate"])
def test_compiles_without_a_graph_break(name: str) -> None:
    def step(x: Tensor, weight: Tensor) -> Tensor:
        return 2 * EVERY[name](torch.tanh(x @ weight))

    x, weight = views(2, 9, 5).float(), views(1, 5, 7)[0].float().requires_grad_()
    (eager,) = torch.autograd.grad(step(x, weight), weight)
    (found,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, weight), weight)
    assert relative_error(found, eager) < 1e-5


@pytest.mark.parametrize("name", OPS)
def test_autocast_changes_nothing_but_the_input(name: str) -> None:
    """Under autocast the loss of a bfloat16 projection is that of the same numbers outside."""
    x, weight = views(2, 9, 5).float(), views(1, 5, 7)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        projected = x @ weight
        inside = EVERY[name](projected)
    assert projected.dtype == torch.bfloat16 and inside.dtype == torch.float32
    assert torch.equal(inside, EVERY[name](projected))


def test_real_images(data) -> None:  # type: ignore[no-untyped-def]
    """MNIST digits and the same shifted by one pixel as views: many columns are constant."""
    with np.load(data / "mnist.npz") as archive:
        images = torch.from_numpy(archive["x_train"][:301]).double() / 255
    x = torch.stack([images, images.roll(1, dims=2)]).flatten(2)  # (2, 301, 784)
    for loss, reference in ORDINARY.values():
        for path in ("gram", "direct"):
            assert_within_budget(partial(loss, path=path), reference, [x], torch.float32)
    unit = x / x.norm(dim=2, keepdim=True)
    for path in ("gram", "direct"):
        rate = partial(coding_rate, path=path)
        assert_within_budget(rate, coding_rate_reference, [unit], torch.float32)


@pytest.mark.parametrize("name", ["barlow", "vicreg"])
def test_training_follows_the_eager_curve(name: str, data) -> None:  # type: ignore[no-untyped-def]
    """200 steps on real digits: the fused and the eager loss draw the same curve."""
    with np.load(data / "mnist.npz") as archive:
        images = torch.from_numpy(archive["x_train"][:512, ::2, ::2]).double().flatten(1) / 255

    def curve(loss: Loss) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(196, 48, generator=generator, dtype=torch.float64) / 14
        weight.requires_grad_()
        rate = {"barlow": 1e-3, "vicreg": 1e-2}[name]
        optimizer = torch.optim.SGD([weight], lr=rate, momentum=0.9)
        values = []
        for _ in range(200):
            rows = torch.randint(512, (32,), generator=generator)
            noise = torch.rand(2, 32, 196, generator=generator, dtype=torch.float64)
            value = loss(images[rows] * noise @ weight)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.detach())
        return torch.stack(values)

    loss, reference = ORDINARY[name]
    eager = curve(reference)
    assert eager[-20:].mean() < 0.8 * eager[:20].mean()  # it trains
    assert (curve(loss) - eager).abs().max() < 1e-8 * eager.max()
