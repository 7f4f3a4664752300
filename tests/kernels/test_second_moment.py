"""Sums over second-moment matrices: three ways to one number, and the kernels that take part."""

from itertools import product as grid

import pytest
import torch
from torch import Tensor

from fastssl_kernels import second_moment, second_moment_energy, second_moment_energy_reference
from fastssl_kernels._triton import second_moment as fused_second_moment
from fastssl_kernels._triton.columns import SLOTS
from tests.helpers.numerics import assert_within_budget, relative_error, value_and_grads
from tests.helpers.offline_compile import Kernel, assert_ships, compile_offline
from tests.helpers.triton_mode import fused

CASES = list(grid([True, False], [True, False]))  # pairs, diagonal


def views(v: int, n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Correlated views: a common part, an own part, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, n, d, generator=generator, dtype=torch.float64)
    own = torch.randn(v, n, d, generator=generator, dtype=torch.float64)
    return (common + 0.5 * own + 0.3).to(dtype)


def test_energy_by_hand() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    # a^T b = [[5, 3], [3, -1]]; a^T a = [[10, -1], [-1, 5]]; b^T b = [[5, 1], [1, 1]]
    expected = {(True, True): 44, (True, False): 18, (False, True): 155, (False, False): 4}
    for (pairs, diagonal), value in expected.items():
        for path in ("gram", "direct", "eager", "auto"):
            got = second_moment_energy([a, b], pairs=pairs, diagonal=diagonal, path=path)
            assert got.item() == value, (pairs, diagonal, path)


@pytest.mark.parametrize("shape", [(2, 9, 5), (2, 9, 13), (3, 7, 11), (5, 2, 3), (2, 33, 1)])
@pytest.mark.parametrize("path", ["gram", "direct", "eager"])
def test_every_path_is_the_formula(shape: tuple[int, int, int], path: str) -> None:
    for pairs, diagonal in CASES:
        keywords = {"pairs": pairs, "diagonal": diagonal}
        truth = value_and_grads(
            lambda x, k=keywords: second_moment_energy_reference(x, **k),
            [views(*shape)],
            torch.float64,
        )
        found = value_and_grads(
            lambda x, k=keywords: second_moment_energy(x, path=path, **k),
            [views(*shape)],
            torch.float64,
        )
        for t, f in zip(truth, found, strict=True):
            assert (f - t).norm() <= 1e-13 * (1 + t.norm()) * shape[0] ** 2, (pairs, diagonal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["gram", "direct"])
def test_within_budget(path: str, dtype: torch.dtype) -> None:
    for (pairs, diagonal), shape in grid(CASES, [(2, 37, 129), (3, 130, 31)]):
        keywords = {"pairs": pairs, "diagonal": diagonal}
        assert_within_budget(
            lambda x, k=keywords: second_moment_energy(x, path=path, **k),
            lambda x, k=keywords: second_moment_energy_reference(x, **k),
            [views(*shape) / 8],  # so that eager's D x D sums stay within float16
            dtype,
        )


@pytest.mark.parametrize("path", ["gram", "direct"])
def test_slabs_join_to_the_whole(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = [views(3, 11, 7)]
    for pairs in (True, False):
        whole = value_and_grads(
            lambda x, p=pairs: second_moment_energy(x, pairs=p, path=path), x, torch.float64
        )
        for slab in (1, 40, 100):
            monkeypatch.setattr(second_moment, "SLAB", slab)
            parts = value_and_grads(
                lambda x, p=pairs: second_moment_energy(x, pairs=p, path=path), x, torch.float64
            )
            monkeypatch.undo()
            for w, p in zip(whole, parts, strict=True):
                assert relative_error(p, w) < 1e-14


def test_gradcheck() -> None:
    for (pairs, diagonal), path in grid(CASES, ["gram", "direct"]):
        x = views(3, 4, 5).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, p=pairs, d=diagonal, w=path: second_moment_energy(
                x, pairs=p, diagonal=d, path=w
            ),
            [x],
        )


def test_auto_takes_the_cheaper_path() -> None:
    """4 N^2 D V against 3 V (V - 1) N D^2 (pairs), 4 N^2 D against 4 N D^2 (self)."""
    for views_, n, width in grid((2, 3, 8), (64, 255, 1000), (64, 300, 1024)):
        x = torch.empty(views_, n, width)
        for pairs in (True, False):
            gram_cost = 4 * n * n * width * views_
            per_view = 3 * (views_ - 1) if pairs else 4
            direct_cost = per_view * views_ * n * width * width
            if gram_cost != direct_cost:
                expected = "gram" if gram_cost < direct_cost else "direct"
                assert second_moment.choose_path("auto", x, n, pairs) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("path", ["gram", "direct"])
def test_kernels_equal_torch(path: str, pairs: bool, dtype: torch.dtype, device: str) -> None:
    """All padding, a full tile, one spilled row and column, several tiles, odd."""
    for shape in [(2, 3, 2), (2, 64, 128), (2, 65, 129), (3, 70, 200)]:
        x = views(*shape, dtype=dtype).to(device)
        scale = 1 / shape[1]
        ((energy, product), whole) = (
            second_moment.energy_and_product(
                x.double(), [shape[1]], pairs=pairs, path=p, scale=scale, group="", product=True
            )
            for p in (path, "gram")
        )
        with fused(device):
            partials, found = fused_second_moment.fused_energy_and_product(
                x, pairs=pairs, path=path, scale=scale, product=True
            )
            alone, none = fused_second_moment.fused_energy_and_product(
                x, pairs=pairs, path=path, scale=scale, product=False
            )
        eps = torch.finfo(dtype).eps
        # against sums with the diagonals, of which little may be left without them
        assert abs(partials.sum() - energy) < 4 * eps * whole[0]
        assert (found - product).norm() < 4 * eps * whole[1].norm()
        assert torch.equal(alone, partials) and none.numel() == 0


@pytest.mark.slow
def test_tile_kernel_ships() -> None:
    """Every tile configuration, aligned and not, on every architecture."""
    pointers = {2: ["*bf16", "*fp16"], 4: ["*fp32"]}
    kernels, dots = [], []
    for (size, tcgen05), (i, j, n, warps, stages) in fused_second_moment.TILES.items():
        architectures = [100] if tcgen05 else [80, 90]
        for cc, write, number in grid(architectures, (True, False), ("i32:16", "i32")):
            for pointer, precision in grid(pointers[size], ["tf32", "ieee"][size == 2 :]):
                if pointer == "*fp16" and number == "i32":
                    continue  # as bf16
                signature = {
                    **dict.fromkeys(("a_ptr", "b_ptr", "slab_ptr"), pointer),
                    "partial_ptr": "*fp32",
                    **dict.fromkeys(("N", "D", "first", "width"), number),
                    "scale": "fp32",
                }
                constexprs = {"WRITE": write, "PRECISION": precision}
                blocks = {"BLOCK_I": i, "BLOCK_J": j, "BLOCK_N": n}
                name = "fastssl_kernels._triton.second_moment:_tile_kernel"
                kernels.append(Kernel(name, signature, constexprs | blocks, cc, warps, stages))
                dots.append(size == 2 or precision == "tf32")  # ieee float32 has no tensor cores
    for resources, dot in zip(compile_offline(kernels), dots, strict=True):
        assert_ships(resources, dot=dot)


@pytest.mark.slow
def test_reductions_ship() -> None:
    """The kernel over Gram matrices and the one that adds partial sums up."""
    name, kernels = "fastssl_kernels._triton.second_moment:_gram_kernel", []
    inputs = (("*bf16", "i32"), ("*fp32", "i32:16"))
    modes = ((True, True), (True, False), (False, False))
    for cc, (pointer, number), (pairs, write) in grid((80, 90, 100), inputs, modes):
        types = {"k_ptr": pointer, "partial_ptr": "*fp32", "V": "i32", "size": number}
        constexprs = {"PAIRS": pairs, "WRITE": write, "BLOCK": fused_second_moment.ENTRIES}
        kernels.append(Kernel(name, types, constexprs, cc))
    total = dict.fromkeys(("first_ptr", "second_ptr", "out_ptr"), "*fp32")
    total |= {"first": "i32", "second": "i32", "weight": "fp32"}
    name = "fastssl_kernels._triton.columns:_total_kernel"
    kernels += [Kernel(name, total, {"BLOCK": SLOTS}, cc) for cc in (80, 90, 100)]
    for resources in compile_offline(kernels):
        assert_ships(resources, dot=False)
