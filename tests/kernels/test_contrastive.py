"""NT-Xent and InfoNCE: values, gradients, memory, ranks, and what they refuse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.measure import measure
from fastssl_kernels import (
    NTXentLoss,
    info_nce_loss,
    info_nce_loss_reference,
    nt_xent_loss,
    nt_xent_loss_reference,
)
from fastssl_kernels import _similarity as similarity
from fastssl_kernels._triton import similarity as similarity_kernels
from tests.helpers.gloo import on_ranks
from tests.helpers.numerics import assert_within_budget, relative_error, value_and_grads
from tests.helpers.offline_compile import Kernel, assert_ships, compile_offline
from tests.helpers.triton_mode import Context, dtypes

SIZES = [(2, 2, 3), (2, 32, 64), (2, 65, 33), (3, 43, 7)]  # V, N, D


def draw(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["cosine", "squared", "absolute"])
def test_nt_xent_within_budget(
    size: tuple[int, int, int], kind: str, path: Context, device: str
) -> None:
    """The views and a learnable temperature."""
    inputs = [draw(*size, device=device), torch.tensor(0.2, device=device)]
    for dtype in dtypes(device):
        with path():
            assert_within_budget(
                lambda z, t: nt_xent_loss(z, temperature=t, similarity=kind),
                lambda z, t: nt_xent_loss_reference(z, temperature=t, similarity=kind),
                inputs,
                dtype,
                ["loss", "dz", "dtemperature"],
            )


@pytest.mark.parametrize("size", [(1, 3), (32, 64), (65, 33), (130, 7)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_info_nce_within_budget(
    size: tuple[int, int], symmetric: bool, path: Context, device: str
) -> None:
    """One sided with 29 more keys, a queue of negatives."""
    n, dim = size
    queries = draw(n, dim, device=device)
    keys = draw(n if symmetric else n + 29, dim, device=device)
    if symmetric and n == 1:
        return  # the loss is 0 and so is every gradient: nothing relative to say
    for dtype in dtypes(device):
        with path():
            assert_within_budget(
                lambda q, k, t: info_nce_loss(q, k, temperature=t, symmetric=symmetric),
                lambda q, k, t: info_nce_loss_reference(q, k, temperature=t, symmetric=symmetric),
                [queries, keys, torch.tensor(0.2, device=device)],
                dtype,
                ["loss", "dqueries", "dkeys", "dtemperature"],
            )


def test_formula_by_hand() -> None:
    """Two images, two views on the axes: every similarity is 0 or 1."""
    z = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    e = np.exp(1 / 0.5)
    truth = np.log(e + 2) - 1 / 0.5
    assert abs(float(nt_xent_loss(z, temperature=0.5)) - truth) < 1e-12
    truth = np.log(e + 1) - 1 / 0.5
    assert abs(float(info_nce_loss(z[0], z[1], temperature=0.5)) - truth) < 1e-12


def test_three_views_average_over_their_positives() -> None:
    z = torch.nn.functional.normalize(draw(3, 4, 5).double(), dim=2).flatten(0, 1)
    s = (z @ z.T / 0.3).numpy()
    total = 0.0
    for i in range(12):
        others = [j for j in range(12) if j != i]
        positives = [j for j in others if j % 4 == i % 4]
        total += np.log(np.exp(s[i, others]).sum()) - s[i, positives].mean()
    loss = nt_xent_loss(draw(3, 4, 5).double(), temperature=0.3)
    assert abs(float(loss) - total / 12) < 1e-12


def test_gradcheck_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_sides", lambda q: (3, 4))  # several tiles, spilled ones
    z, t = draw(2, 5, 3).double().requires_grad_(), torch.tensor(0.4, dtype=torch.float64)
    t.requires_grad_()
    for kind in ("cosine", "squared", "absolute"):
        assert torch.autograd.gradcheck(
            lambda z, t, kind=kind: nt_xent_loss(z, temperature=t, similarity=kind), (z, t)
        )
    k = draw(5, 3).double().requires_grad_()
    q = draw(5, 3, 1)[:, :, 0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k, t: info_nce_loss(q, k, temperature=t), (q, k, t))


def test_more_rows_than_a_tile(monkeypatch: pytest.MonkeyPatch, path: Context) -> None:
    """A last tile of one row and one column, which is that row's own entry and no negative."""
    monkeypatch.setattr(similarity, "_sides", lambda q: (64, 64))
    z = draw(5, 13, 8)
    with path():
        assert_within_budget(
            lambda z: nt_xent_loss(z, temperature=0.1),
            lambda z: nt_xent_loss_reference(z, temperature=0.1),
            [z],
            torch.float32,
        )


def test_aligned_views_at_a_low_temperature(path: Context) -> None:
    """Where training ends: the loss is a small difference of large numbers."""
    views = torch.stack([draw(40, 32), draw(40, 32) + 0.05 * draw(40, 32, 1)[:, :, 0]])
    with path():
        assert_within_budget(
            lambda z: nt_xent_loss(z, temperature=0.07),
            lambda z: nt_xent_loss_reference(z, temperature=0.07),
            [views],
            torch.float32,
        )


def test_repeats_bit_for_bit(path: Context, device: str) -> None:
    z = draw(2, 65, 33, device=device)
    with path():
        runs = [value_and_grads(lambda z: nt_xent_loss(z), [z], torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of its own copies
def test_opcheck() -> None:
    q, k = draw(5, 4).requires_grad_(), draw(7, 4).requires_grad_()
    torch.library.opcheck(similarity.similarity_lse, (q, k, 0, 5, False, 0, True))
    torch.library.opcheck(similarity.similarity_lse, (q, k, 2, 3, True, 1, False))
    torch.library.opcheck(similarity.self_similarity_lse, (q, 3, 2))


def test_fullgraph() -> None:
    z = draw(2, 9, 4)
    for op in (nt_xent_loss, lambda z: info_nce_loss(z[0], z[1], temperature=0.1)):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        eager = value_and_grads(op, [z], torch.float32)
        for a, b in zip(eager, value_and_grads(compiled, [z], torch.float32), strict=True):
            assert relative_error(a, b) < 1e-6


def test_module_has_lightly_s_values() -> None:
    lightly = pytest.importorskip("lightly.loss")
    a, b = draw(40, 12), draw(12, 40).T.contiguous()
    for temperature in (0.07, 0.5):
        ours, theirs = NTXentLoss(temperature), lightly.NTXentLoss(temperature)
        found, wanted = (value_and_grads(loss, [a, b], torch.float32) for loss in (ours, theirs))
        assert all(relative_error(x, y) < 1e-5 for x, y in zip(found, wanted, strict=True))


def test_real_images(data: Path) -> None:
    """Digits and the same shifted: as the reference, and lower than for shuffled pairs."""
    digits = np.load(data / "mnist.npz")["x_train"][:150] / np.float32(255)
    a = torch.tensor(digits).flatten(1)
    b = torch.tensor(np.roll(digits, 1, axis=2)).flatten(1)
    assert_within_budget(
        lambda z: nt_xent_loss(z, temperature=0.1),
        lambda z: nt_xent_loss_reference(z, temperature=0.1),
        [torch.stack([a, b])],
        torch.float32,
    )
    shuffled = nt_xent_loss((a, b.roll(1, 0)), temperature=0.1)
    assert nt_xent_loss((a, b), temperature=0.1) < shuffled - 1


def test_memory_grows_with_rows_not_pairs() -> None:
    z = torch.randn(2, 1500, 32, requires_grad=True)

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(z), z)

    rows = measure(
        {"eager": step(nt_xent_loss_reference), "fused": step(nt_xent_loss)},
        "cpu",
        seconds=0,
        min_runs=1,
    )
    assert 10 * rows["fused"].peak_mib <= rows["eager"].peak_mib


def sharded(rank: int, world: int) -> tuple[list[Tensor], list[Tensor]]:
    """NT-Xent of three views, then both InfoNCE: losses, gradients of this rank's rows."""
    import torch.distributed as dist

    group, own = dist.group.WORLD, slice(4 * rank, 4 * rank + 4)
    z = draw(3, 4 * world, 5)[:, own].clone().requires_grad_()
    losses = [
        nt_xent_loss(z, temperature=0.3, group=group),
        info_nce_loss(z[0], z[1], temperature=0.3, group=group),
        info_nce_loss(z[0], z[1], temperature=0.3, symmetric=False, group=group),
        NTXentLoss(0.3, gather_distributed=True)(z[0], z[2]),
    ]
    return [x.detach() for x in losses], [torch.autograd.grad(x, z)[0] for x in losses]


@pytest.mark.parametrize(
    "world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))]
)
def test_ranks_equal_one_process(world: int) -> None:
    """The loss of the whole batch, and its gradient times the number of ranks."""
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda z: nt_xent_loss_reference(z, temperature=0.3),
        lambda z: info_nce_loss_reference(z[0], z[1], temperature=0.3),
        lambda z: info_nce_loss_reference(z[0], z[1], temperature=0.3, symmetric=False),
        lambda z: nt_xent_loss_reference(z[::2], temperature=0.3),
    ]
    ranks = on_ranks(world, sharded)
    for i, loss in enumerate(losses):
        value, dz = value_and_grads(loss, [draw(3, 4 * world, 5)], torch.float64)
        assert all(relative_error(found[i], value) < 1e-6 for found, _ in ranks)
        assert relative_error(torch.cat([grads[i] for _, grads in ranks], 1), world * dz) < 1e-5


@pytest.mark.slow
def test_every_tile_compiles_without_spills() -> None:
    found = []
    for cc in (80, 90, 100):
        for name, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
            tile = similarity_kernels.tile(torch.empty(0, dtype=dtype))
            sides = {k: v for k, v in tile.items() if k.startswith("BLOCK")}
            launch = {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}
            sizes = dict.fromkeys(("N", "M", "first", "period"), "i32") | {"D": "i32:16"}
            sizes |= dict.fromkeys(("positives_start", "positives_stop"), "i32")
            lse = {"q_ptr": name, "k_ptr": name, "row_ptr": "*fp32", "col_ptr": "*fp32"}
            grads = ("g_row_ptr", "g_positive_ptr", "g_col_ptr", "g_positive_col_ptr")
            grad = lse | dict.fromkeys(grads, "*fp32") | {"h_ptr": name}
            for kind, columns in ((0, True), (0, False), (1, True), (2, True)):
                flags = {"KIND": kind, "COLUMNS": columns, "EXCLUDE_SELF": True, "EVEN_D": True}
                flags |= {"PRECISION": "ieee"}
                module = "fastssl_kernels._triton.similarity:"
                constants = {**flags, **sides}
                found.append(Kernel(module + "_lse_kernel", lse | sizes, constants, cc, **launch))
                sizes_stride = {**sizes, "stride": "i32"}
                backward = module + "_gradient_kernel"
                constants = {**constants, "SYMMETRIC": columns}
                found.append(Kernel(backward, grad | sizes_stride, constants, cc, **launch))
    for resources in compile_offline(found):
        assert_ships(resources, dot=resources.kernel.signature["q_ptr"] == "*bf16")


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nt_xent_loss([Z]), "views"),
        (lambda: nt_xent_loss([Z, Z[:2]]), "shapes"),
        (lambda: nt_xent_loss([Z, Z], temperature=0.0), "positive"),
        (lambda: nt_xent_loss([Z, Z], temperature=torch.ones(2)), "temperature"),
        (lambda: nt_xent_loss([Z, Z], similarity="dot"), "similarity"),
        (lambda: nt_xent_loss([Z, Z], group=object()), "not initialised"),
        (lambda: info_nce_loss(Z, Z[:, :2], temperature=1.0), r"\(N, D\)"),
        (lambda: info_nce_loss(Z[:2], Z, temperature=1.0), "symmetric=False"),
        (lambda: info_nce_loss(Z, Z[:2], temperature=1.0, symmetric=False), "as many keys"),
        (lambda: info_nce_loss(Z, Z.half(), temperature=1.0), "dtype"),
        (lambda: info_nce_loss(Z[:, :0], Z[:, :0], temperature=1.0), "D >= 1"),
    ],
)
def test_refuses(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
