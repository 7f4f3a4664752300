"""Barlow Twins, VICReg and the coding rate: official formulas, torch.compile, lightly, and ours.

    python -m bench.suites.covariance_losses RESULTS/losses.jsonl PNG

plots time and memory against D from the results of `python -m bench --only losses`.

Inputs are normal: a part common to the views plus half as much noise. A call is forward and
backward, and returns the loss and the gradients. Shapes: V views, N batch, D embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import Call, Case
from bench.report import Row, plot_command, plot_sweep
from fastssl_kernels import barlow_twins_loss, coding_rate, vicreg_loss

Loss = Callable[[list[Tensor]], Tensor]
SWEEP_N, SWEEP_D = 256, (512, 1024, 2048, 4096, 8192)


def cases(device: str) -> Iterator[Case]:
    """The target sizes, then Barlow Twins against D for the plot."""
    cuda = device.startswith("cuda")
    barlow, vicreg = (official_barlow, barlow_twins_loss), (official_vicreg, vicreg_loss)
    yield _case("barlow", *barlow, device, 2, 256, 8192)
    yield _case("vicreg", *vicreg, device, 2, 256, 8192)
    yield _case("barlow", *barlow, device, 8, 1024 if cuda else 256, 2048)
    yield _case("coding rate", official_coding_rate, coding_rate, device, 20, 100, 1024)
    yield _case("barlow", *barlow, device, 2, 1024, 8192)
    yield _case("barlow", *barlow, device, 2, 1024, 2048)
    if cuda:
        for name, pair in (("barlow", barlow), ("vicreg", vicreg)):
            for n, d in ((4096, 8192), (4096, 2048), (256, 2048)):
                yield _case(name, *pair, device, 2, n, d)
        for n, d in ((1024, 8192), (1024, 2048)):
            yield _case("vicreg", *vicreg, device, 2, n, d)
        yield _case("barlow float32", *barlow, device, 2, 1024, 8192, torch.float32)
    for d in SWEEP_D:
        yield _sweep(device, d)


def off_diagonal(c: Tensor) -> Tensor:
    """The official code's view of the entries off the diagonal."""
    return c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:].flatten()


def official_barlow(views: Sequence[Tensor]) -> Tensor:
    """facebookresearch/barlowtwins, over all pairs."""
    pairs = [_official_barlow(a, b) for a, b in combinations(views, 2)]
    return torch.stack(pairs).mean()


def _official_barlow(za: Tensor, zb: Tensor) -> Tensor:
    ha, hb = (F.batch_norm(z, None, None, training=True) for z in (za, zb))
    c = (ha.T @ hb).div_(len(ha))
    diagonal = torch.diagonal(c).add_(-1).pow_(2).sum()
    return diagonal + 0.0051 * off_diagonal(c).pow_(2).sum()


def official_vicreg(views: Sequence[Tensor]) -> Tensor:
    """facebookresearch/vicreg, two views."""
    x, y = views
    invariance = F.mse_loss(x, y)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    std_x, std_y = torch.sqrt(x.var(dim=0) + 0.0001), torch.sqrt(y.var(dim=0) + 0.0001)
    std = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
    cov_x, cov_y = (x.T @ x) / (len(x) - 1), (y.T @ y) / (len(y) - 1)
    off = off_diagonal(cov_x).pow_(2).sum().div(x.shape[1])
    off = off + off_diagonal(cov_y).pow_(2).sum().div(y.shape[1])
    return 25 * invariance + 25 * std + off


def official_coding_rate(views: Sequence[Tensor]) -> Tensor:
    """tsb0601/EMP-SSL: a loop over views, a D x D determinant each."""
    rates = []
    for z in views:
        w = z.T
        p, m = w.shape
        scalar = p / (m * 0.2)
        rates.append(torch.logdet(torch.eye(p, device=z.device) + scalar * w.matmul(w.T)) / 2)
    return torch.stack(rates).mean()


def _case(
    name: str,
    official: Loss,
    ours: Loss,
    device: str,
    v: int,
    n: int,
    d: int,
    dtype: torch.dtype | None = None,
) -> Case:
    if dtype is None:  # Cholesky has no 16-bit form
        half = device.startswith("cuda") and name != "coding rate"
        dtype = torch.bfloat16 if half else torch.float32
    losses: dict[str, Loss] = {"official": official, "fastssl": ours}
    if device.startswith("cuda"):
        losses["compile"] = torch.compile(official, dynamic=False)
    if name != "coding rate" and (peer := _lightly(name.split()[0])) is not None:
        losses["lightly"] = peer
    return _build(name, losses, device, v, n, d, dtype, _flops(name, v, n, d))


def _sweep(device: str, d: int) -> Case:
    """Barlow Twins against D: eager, compiled, and both paths of ours."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    losses: dict[str, Loss] = {
        "official": official_barlow,
        "compile": torch.compile(official_barlow, dynamic=False),
        "direct": partial(barlow_twins_loss, path="direct"),
        "gram": partial(barlow_twins_loss, path="gram"),
    }
    flops = _flops("barlow", 2, SWEEP_N, d)
    return _build("barlow against D", losses, device, 2, SWEEP_N, d, dtype, flops)


def _lightly(name: str) -> Loss | None:
    """lightly's module over all pairs, where lightly is installed."""
    try:
        from lightly.loss import BarlowTwinsLoss, VICRegLoss
    except ImportError:
        return None
    module = BarlowTwinsLoss(lambda_param=0.0051) if name == "barlow" else VICRegLoss()
    return lambda views: torch.stack([module(a, b) for a, b in combinations(views, 2)]).mean()


def _flops(name: str, v: int, n: int, d: int) -> float:
    """The fewest floating-point operations known to give the value and the gradients."""
    small, large = min(n, d), max(n, d)
    if name == "coding rate":
        return v * (4.0 * small * small * large + small**3 / 3)
    pairs = v * (v - 1) / 2
    direct = 6.0 * n * d * d * (pairs if name.startswith("barlow") else v / 2)
    return min(3.0 * v * n * n * d, direct)  # 3: half of a symmetric K, all of K X


def _build(
    name: str,
    losses: dict[str, Loss],
    device: str,
    v: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    flops: float,
) -> Case:
    def build() -> dict[str, Call]:
        torch._dynamo.reset()  # its cache per function holds 8 shapes, then it runs eagerly
        generator = torch.Generator().manual_seed(0)
        common = torch.randn(n, d, generator=generator)
        views = [common + 0.5 * torch.randn(n, d, generator=generator) for _ in range(v)]
        if name == "coding rate":
            views = [F.normalize(view) for view in views]
        leaves = [view.to(device, dtype).requires_grad_() for view in views]
        return {variant: partial(_step, loss, leaves) for variant, loss in losses.items()}

    moved = 2.0 * v * n * d * dtype.itemsize  # the views in, their gradients out
    return Case(
        name=f"{name} V={v} N={n} D={d} {str(dtype).removeprefix('torch.')}",
        parameters={"loss": name, "V": v, "N": n, "D": d, "dtype": str(dtype)},
        build=build,
        check=partial(check, dtype=dtype),
        floor_ms=_h200_floor_ms(flops, moved, dtype) if device.startswith("cuda") else None,
    )


def _step(loss: Loss, leaves: list[Tensor]) -> list[Tensor]:
    value = loss(leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def check(variants: dict[str, Call], dtype: torch.dtype) -> None:
    """Every variant's value and gradients against the official formula's."""
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-4  # of the official formula, in this dtype
    expected = variants["official"]()
    for name, call in variants.items():
        for found, target in zip(call(), expected, strict=True):
            scale = target.float().norm()
            error = float((found.float() - target.float()).norm() / scale)
            assert error <= tolerance, f"{name} is {error:.1e} from the official formula"


def _h200_floor_ms(flops: float, moved: float, dtype: torch.dtype) -> float | None:
    """The roofline's time on an H200: 790 TFLOP/s in bf16, 52 in float32, 4.3 TB/s; else None."""
    if "H200" not in torch.cuda.get_device_name():
        return None
    rate = 790e12 if dtype == torch.bfloat16 else 52e12
    return max(flops / rate, moved / 4.3e12) * 1e3


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory against D: eager, compiled, direct and Gram, from the sweep's rows."""
    labels = {"official": "official, eager", "compile": "official, torch.compile"}
    labels |= {name: f'fastssl, path="{name}"' for name in ("direct", "gram")}
    sweep = [row for row in rows if row["case"].startswith("barlow against D") and "ms" in row]
    sweep = [{**row, "variant": labels[row["variant"]]} for row in sweep]
    title = f"Barlow Twins, two views, batch {SWEEP_N}"
    x, y = "embedding width D", "forward and backward"
    plot_sweep(sweep, path, against="D", x=x, y=y, title=title)


if __name__ == "__main__":
    plot_command(plot, "bench.suites.covariance_losses", __doc__)
