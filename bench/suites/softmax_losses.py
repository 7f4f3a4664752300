"""DIET's head and the contrastive losses: eager, torch.compile, torch's op, peers, and ours.

    python -m bench.suites.softmax_losses RESULTS/losses.jsonl PNG

plots time and memory against K from the results of `python -m bench --only losses`.

Inputs: normal features, class vectors of scale 0.05, uniform targets, label smoothing 0.8. A call
is forward and backward and, where the name says AdamW, the update of the class weight.
Shapes: N batch, D embedding, K classes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.measure import Call, Case
from bench.report import Row, plot_command, plot_sweep
from fastssl_kernels import (
    DIETHead,
    NTXentLoss,
    info_nce_loss,
    info_nce_loss_reference,
    linear_cross_entropy,
    nt_xent_loss_reference,
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # features, weight, target
SMOOTHING = 0.8
SWEEP_N, SWEEP_D, SWEEP_K = 256, 512, (12_500, 25_000, 50_000, 100_000, 200_000)


def cases(device: str) -> Iterator[Case]:
    """The target sizes, then DIET's step against K for the plot."""
    if device.startswith("cuda"):
        yield _diet(device, 1024, 512, 50_000)
        yield _diet(device, 2048, 512, 1_281_167)
        yield _softmax(device, 1024, 512, 50_000)
        yield _softmax(device, 2048, 512, 1_281_167)
        yield _nt_xent(device, 16384, 256)
        yield _info_nce(device, 65_536, 768)
        yield _nt_xent(device, 4096, 128)
    else:
        yield _diet(device, 256, 512, 50_000)
        yield _nt_xent(device, 4096, 128)
        yield _diet(device, 256, 512, 200_000)
        yield _softmax(device, 256, 512, 50_000)
        yield _info_nce(device, 4096, 128)
    for classes in SWEEP_K:
        yield _diet(device, SWEEP_N, SWEEP_D, classes, sweep=True)


def eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y, label_smoothing=SMOOTHING)


def _inputs(device: str, n: int, dim: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, dim, device=device, generator=generator)
    w = 0.05 * torch.randn(classes, dim, device=device, generator=generator)
    return x, w, torch.randint(classes, (n,), device=device, generator=generator)


def _diet(device: str, n: int, dim: int, classes: int, sweep: bool = False) -> Case:
    """DIET's step with AdamW. On a GPU under bf16 autocast, with float32 weights and moments."""

    def build() -> dict[str, Call]:
        x, w, y = _inputs(device, n, dim, classes)
        x.requires_grad_()
        variants: dict[str, Call] = {"eager": _Step(eager, x, w, y)}
        if device.startswith("cuda"):
            variants["compile"] = _Step(torch.compile(eager, dynamic=False), x, w, y)
        elif not sweep and (chunked := _torch_chunked()) is not None:
            variants["torch linear_cross_entropy, chunked"] = _Step(chunked, x, w, y)
        if not sweep:
            ours = partial(linear_cross_entropy, label_smoothing=SMOOTHING)
            variants["fastssl, optimizer apart"] = _Step(ours, x, w, y)
        for save in ("none", "exp"):
            variants[f"fastssl fused, save={save}"] = _FusedStep(x, w, y, save)
        return variants

    return Case(
        name=f"diet AdamW{' against K' if sweep else ''} N={n} D={dim} K={classes}",
        parameters={"N": n, "D": dim, "K": classes},
        build=build,
        check=check,
        floor_ms=_diet_floor_ms(n, dim, classes) if device.startswith("cuda") else None,
    )


class _Step:
    """Forward, backward and fused AdamW on a copy of w; -> loss, gradient of the features."""

    def __init__(self, loss: Loss, x: Tensor, w: Tensor, y: Tensor) -> None:
        self.loss, self.x, self.y = loss, x, y
        self.w = nn.Parameter(w.clone())
        self.optimizer = torch.optim.AdamW([self.w], fused=True, capturable=x.is_cuda)

    def __call__(self) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.x.is_cuda):
            loss = self.loss(self.x, self.w, self.y)
        dx, self.w.grad = torch.autograd.grad(loss, (self.x, self.w))
        self.optimizer.step()
        self.w.grad = None
        return [loss.detach(), dx]


class _FusedStep:
    """The same with DIETHead, which updates inside backward."""

    def __init__(self, x: Tensor, w: Tensor, y: Tensor, save: str) -> None:
        self.x, self.y = x, y
        options = {"weight_decay": 0.01, "optimizer": "adamw", "save": save}  # AdamW's defaults
        self.head = DIETHead(len(w), w.shape[1], label_smoothing=SMOOTHING, **options).to(x.device)
        self.head.weight.data.copy_(w)

    def __call__(self) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.x.is_cuda):
            loss = self.head(self.x, self.y)
        (dx,) = torch.autograd.grad(loss, self.x)
        return [loss.detach(), dx]


def _softmax(device: str, n: int, dim: int, classes: int) -> Case:
    """Only forward and backward, x and w in the product's dtype, as peers take them."""

    def build() -> dict[str, Call]:
        x, w, y = _inputs(device, n, dim, classes)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        losses: dict[str, Loss] = {"eager": eager}
        for save in ("none", "exp"):
            options = {"label_smoothing": SMOOTHING, "save": save}
            losses[f"fastssl, save={save}"] = partial(linear_cross_entropy, **options)
        if device.startswith("cuda"):
            losses |= {"compile": torch.compile(eager, dynamic=False), **_gpu_peers()}
        elif (chunked := _torch_chunked()) is not None:
            losses["torch linear_cross_entropy, chunked"] = chunked
        return {name: partial(_gradients, loss, x, w, y) for name, loss in losses.items()}

    return Case(
        name=f"linear cross-entropy N={n} D={dim} K={classes}",
        parameters={"N": n, "D": dim, "K": classes},
        build=build,
        check=check,
        floor_ms=6e3 * n * dim * classes / 790e12 if device.startswith("cuda") else None,
    )


def _gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss, and the gradients of the inputs that require them."""
    value = loss(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def smoothed(plain: Loss, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Label smoothing on a peer that has none: L = CE + e (z_y - mean_k z_k), exactly."""
    target = (x * w[y]).sum(1).float().mean()
    return plain(x, w, y) + SMOOTHING * (target - (x @ w.mean(0)).float().mean())


def _torch_chunked() -> Loss | None:
    """torch.nn.functional.linear_cross_entropy with chunking on (torch 2.13 and later)."""
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return None
    call = partial(F.linear_cross_entropy, options=options())
    return partial(smoothed, call)  # its label smoothing would disable the chunking


def _gpu_peers() -> dict[str, Loss]:
    """cut-cross-entropy and Liger where they are installed, with exact gradients."""
    peers: dict[str, Loss] = {}
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        peers["cut-cross-entropy, exact"] = partial(smoothed, partial(cce, impl="cce_exact"))
    except ImportError:
        pass
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(label_smoothing=SMOOTHING)
        peers["liger"] = lambda x, w, y: liger(w, x, y)
    except ImportError:
        pass
    return peers


def _nt_xent(device: str, n: int, dim: int) -> Case:
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "eager": lambda a, b: nt_xent_loss_reference((a, b), temperature=0.5),
        "fastssl": NTXentLoss(0.5),
    }
    try:
        from lightly.loss import NTXentLoss as Lightly

        losses["lightly"] = Lightly(0.5)
    except ImportError:
        pass
    return _pairs("nt-xent", losses, device, n, dim, products=5)


def _info_nce(device: str, n: int, dim: int) -> Case:
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "eager": partial(info_nce_loss_reference, temperature=0.1),
        "fastssl": partial(info_nce_loss, temperature=0.1),
    }
    return _pairs("info-nce", losses, device, n, dim, products=3)


def _pairs(
    name: str,
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]],
    device: str,
    n: int,
    dim: int,
    products: float,
) -> Case:
    """Two views of n images, forward and backward; `products` of n x n x dim are unavoidable."""
    if device.startswith("cuda"):
        losses["compile"] = torch.compile(losses["eager"], dynamic=False)

    def build() -> dict[str, Call]:
        generator = torch.Generator(device).manual_seed(0)
        a = torch.randn(n, dim, device=device, generator=generator)
        b = a + torch.randn(n, dim, device=device, generator=generator)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        leaves = (a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_())
        return {key: partial(_gradients, loss, *leaves) for key, loss in losses.items()}

    return Case(
        name=f"{name} N={n} D={dim}",
        parameters={"N": n, "D": dim},
        build=build,
        check=check,
        floor_ms=2e3 * products * n * n * dim / 790e12 if device.startswith("cuda") else None,
    )


def check(variants: dict[str, Call]) -> None:
    """Two calls of each variant agree with the reference, the second after an update."""
    for _ in range(2):
        expected = next(iter(variants.values()))()
        for name, call in variants.items():
            found = call() if name != next(iter(variants)) else expected
            for one, reference in zip(found, expected, strict=True):
                tolerance = 3e-2 if reference.is_cuda else 1e-3  # of eager in this precision
                error = float((one.float() - reference.float()).norm() / reference.float().norm())
                assert error <= tolerance, f"{name} is {error:.1e} from eager"


def _diet_floor_ms(n: int, dim: int, classes: int) -> float:
    """Three products at 790 TFLOP/s, or weight and moments read and written at 4.3 TB/s."""
    return 1e3 * max(6.0 * n * dim * classes / 790e12, 26.0 * dim * classes / 4.3e12)


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory of a step against K, from the sweep's rows."""
    sweep = [row for row in rows if "against K" in row["case"]]
    title = f"DIET's step, batch {SWEEP_N}, width {SWEEP_D}"
    x, y = "classes K", "forward, backward and AdamW"
    plot_sweep(sweep, path, against="K", x=x, y=y, title=title)


if __name__ == "__main__":
    plot_command(plot, "bench.suites.softmax_losses", __doc__)
