"""DIETHead: its modes train the same, its fused step is torch's, its shards are one head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench.measure import measure
from fastssl_kernels import DIETHead, _class_update
from fastssl_kernels._class_update import class_statistics_updating
from fastssl_kernels._dispatch import interpreted
from fastssl_kernels._triton import class_update as update_kernels
from tests.helpers.gloo import on_ranks
from tests.helpers.numerics import relative_error
from tests.helpers.offline_compile import Kernel, assert_ships, compile_offline
from tests.helpers.triton_mode import Context

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

RULES: dict[str, tuple[dict[str, Any], Optimizer]] = {
    "adamw": (
        {"optimizer": "adamw", "betas": (0.8, 0.99), "weight_decay": 0.1},
        lambda w: torch.optim.AdamW(w, lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1),
    ),
    "sgd": (
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        lambda w: torch.optim.SGD(w, lr=1e-2, momentum=0.9, weight_decay=0.1),
    ),
    "sgd without momentum": (
        {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
        lambda w: torch.optim.SGD(w, lr=1e-2),
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("save", ["none", "exp"])
def test_fused_update_is_torch_optim(rule: str, save: str, path: Context, device: str) -> None:
    """100 steps (6 in the interpreter), the rate changed on the way, images repeated."""
    samples, dim, n = 331, 24, 40
    settings, build = RULES[rule]
    torch.manual_seed(0)
    head = DIETHead(samples, dim, lr=1e-2, save=save, **settings).to(device)
    weights = {d: head.weight.detach().to(d, copy=True) for d in (torch.float64, torch.float32)}
    optimizers = {d: build([w.requires_grad_()]) for d, w in weights.items()}
    for step in range(6 if path is interpreted else 100):
        x, y = torch.randn(n, dim, device=device), torch.randint(samples, (n,), device=device)
        if step == 3:
            head.lr = 3e-3
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = 3e-3
        with path():
            head(x.requires_grad_(), y).backward()
        for dtype, w in weights.items():
            optimizers[dtype].zero_grad()
            logits = x.detach().to(dtype) @ w.T
            F.cross_entropy(logits, y, label_smoothing=0.8).backward()
            optimizers[dtype].step()
    truth = weights[torch.float64].detach()
    budget = 2 * relative_error(weights[torch.float32].detach(), truth) + 4 * 1.2e-7
    assert relative_error(head.weight, truth) <= budget
    assert head.weight.grad is None


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize(
    ("rule", "rate"),
    [("adamw", 1.0), ("adamw", 0.5), ("sgd", 1.0), ("sgd without momentum", 1.0)],
)
def test_fused_update_of_weight_and_bias_is_torch_optim(
    rule: str, rate: float, path: Context, device: str
) -> None:
    samples, dim, n = 150, 12, 9
    settings, build = RULES[rule]
    torch.manual_seed(0)
    options = {"bias": True, "sample_rate": rate, "device": device}
    fused, plain = (DIETHead(samples, dim, **options, **s) for s in ({**settings, "lr": 1e-2}, {}))
    for mine, other in zip(plain.parameters(), fused.parameters(), strict=True):
        mine.data.copy_(other)
    optimizer = build(list(plain.parameters()))
    for _ in range(4):
        x, y = torch.randn(n, dim, device=device), torch.randint(samples, (n,), device=device)
        with path():
            for head in (fused, plain):
                head(x.requires_grad_(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert relative_error(fused.weight.detach(), plain.weight.detach()) < 1e-5
        assert relative_error(fused.bias.detach(), plain.bias.detach()) < 1e-5
    before = fused.bias.clone()
    with path():
        fused(torch.full((1, dim), torch.nan, device=device), y[:1]).backward()
    assert torch.equal(before, fused.bias)


def test_bias_is_in_the_logits_and_the_state() -> None:
    torch.manual_seed(0)
    head = DIETHead(20, 4, bias=True)
    without = DIETHead(20, 4)
    assert without.bias is None and "bias" not in without.state_dict()
    assert 0.2 < head.bias.abs().max() <= 0.5  # nn.Linear's bound, 1 / sqrt(4)
    x, y = torch.randn(5, 4), torch.tensor([3, 1, 4, 1, 5])
    truth = F.cross_entropy(F.linear(x, head.weight, head.bias), y, label_smoothing=0.8)
    assert relative_error(head(x, y).detach(), truth.detach()) < 1e-6
    other = DIETHead(20, 4, bias=True)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.bias, head.bias)


@pytest.mark.parametrize("optimizer", [None, "adamw"])
def test_no_rows_are_no_step(optimizer: str | None) -> None:
    """Their mean loss is NaN, as torch's; nothing is updated, and one row is a step."""
    head = DIETHead(30, 4, optimizer=optimizer)
    state = {k: v.clone() for k, v in head.state_dict().items()}
    for x in (torch.randn(0, 4), torch.randn(2, 0, 4)):
        loss = head(x.requires_grad_(), torch.zeros(0, dtype=torch.int64))
        loss.backward()
        assert loss.isnan() and x.grad.shape == x.shape
    assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())
    loss = head(torch.randn(1, 4, requires_grad=True), torch.tensor([3], dtype=torch.int32))
    loss.backward()
    assert loss.isfinite() and head.step == int(optimizer is not None)


def test_built_on_meta_and_reset() -> None:
    """`to_empty` and `reset_parameters`, as modules of torch: the head that is built at once."""
    options = {"optimizer": "adamw", "lr": 1e-2, "bias": True}
    torch.manual_seed(3)
    at_once = DIETHead(40, 4, **options)
    head = DIETHead(40, 4, device="meta", **options)
    assert all(t.is_meta for t in head.state_dict().values())
    head.to_empty(device="cpu")
    torch.manual_seed(3)
    head.reset_parameters()
    a, b = at_once.state_dict(), head.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert head.lr == 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_head_steps_as_torch_adamw_on_a_cast_weight(dtype: torch.dtype) -> None:
    """The step counter and the rate are not cast: bfloat16 counts to 256 and no further."""
    torch.manual_seed(0)
    head = DIETHead(30, 4, optimizer="adamw", lr=1.23).to(dtype)
    weight = nn.Parameter(head.weight.detach().clone())
    optimizer = torch.optim.AdamW([weight], lr=1.23, weight_decay=0.05, fused=True)
    x, y = torch.randn(6, 4).to(dtype), torch.arange(6)

    def dense_step() -> None:
        F.cross_entropy(x.double() @ weight.T.double(), y, label_smoothing=0.8).backward()
        optimizer.step()
        optimizer.zero_grad()

    dense_step()
    state = optimizer.state[weight]
    for count in (state["step"], head.step):
        count.fill_(1500)
    head.exp_avg.copy_(state["exp_avg"])
    head.exp_avg_sq.copy_(state["exp_avg_sq"])
    head.weight.data.copy_(weight.data)
    before = weight.detach().clone()
    dense_step()
    head(x, y).backward()
    assert head.step == 1501 and head.step.dtype == torch.int64
    assert head.lr == 1.23 and head._rate == 1.23 and head._rate.dtype == torch.float64
    rounding = max(2 * torch.finfo(dtype).eps, 1e-14) * before.abs().max()
    assert (weight - head.weight).abs().max() <= rounding
    assert (weight - before).abs().max() > 5 * rounding  # a step that the rounding does not hide


def test_earlier_states_load() -> None:
    """A float32 counter, of any dtype that a cast left it in, and no rate."""
    head = DIETHead(10, 4, optimizer="adamw", lr=1e-2)
    head(torch.randn(3, 4), torch.arange(3)).backward()
    state = head.state_dict()
    del state["_rate"]
    for dtype in (torch.float32, torch.bfloat16):
        for assign in (False, True):
            other = DIETHead(10, 4, optimizer="adamw", lr=3e-3)
            earlier = {**state, "step": state["step"].to(dtype)}
            other.load_state_dict(earlier, assign=assign)
            assert other.step == 1 and other.step.dtype == torch.int64
            assert other.lr == 3e-3 and torch.equal(other.weight, head.weight)


def test_features_get_the_same_gradient_fused_or_not() -> None:
    torch.manual_seed(0)
    fused, plain = DIETHead(50, 8, optimizer="adamw"), DIETHead(50, 8)
    plain.weight.data.copy_(fused.weight)
    x, y = torch.randn(2, 6, 8), torch.arange(6) * 7
    grads = []
    for head in (fused, plain):
        leaf = x.clone().requires_grad_()
        loss = head(leaf, y)
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_views_share_their_image() -> None:
    head = DIETHead(20, 4)
    views, index = torch.randn(3, 5, 4), torch.tensor([3, 1, 4, 1, 5])
    logits = views.flatten(0, 1) @ head.weight.T
    truth = F.cross_entropy(logits.double(), index.repeat(3), label_smoothing=0.8)
    assert relative_error(head(views, index).detach(), truth.detach()) < 1e-6


def test_fused_step_without_a_gradient_for_the_features() -> None:
    """A frozen backbone: the head alone trains."""
    head = DIETHead(10, 4, optimizer="adamw")
    before = head.weight.clone()
    head(torch.randn(3, 4), torch.arange(3)).backward()
    assert head.step == 1 and not torch.equal(before, head.weight)


def test_evaluation_and_no_grad_update_nothing() -> None:
    head = DIETHead(10, 4, optimizer="adamw")
    before = head.weight.clone()
    x = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert not head(x, torch.arange(3)).requires_grad
    head.eval()
    head(x, torch.arange(3)).backward()
    assert head.step == 0 and torch.equal(before, head.weight) and x.grad is not None


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_updates_nothing(rule: str, bad: float, path: Context) -> None:
    head = DIETHead(30, 4, optimizer=rule)
    with path():
        head(torch.randn(3, 4), torch.arange(3)).backward()
        state = {k: v.clone() for k, v in head.state_dict().items()}
        x = torch.randn(3, 4)
        x[1, 2] = bad
        loss = head(x, torch.arange(3))
        loss.backward()
    assert not loss.isfinite()
    assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())


def test_scaled_losses_are_refused() -> None:
    head = DIETHead(30, 4, optimizer="adamw")
    x, y = torch.randn(3, 4), torch.arange(3)
    before = head.weight.clone()
    for scale in (0.5, 65536.0):  # accumulation over two batches, a GradScaler
        with pytest.raises(ValueError, match="optimizer=None"):
            (scale * head(x, y)).backward()
    assert torch.equal(before, head.weight)
    two = head(x, y) + head(x, y)  # the second backward would meet an updated weight
    with pytest.raises(ValueError, match="for each forward"):
        two.backward()
    loss = head(x.requires_grad_(), y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):  # torch's own words for its own rule
        loss.backward()


def test_trainer_settings_are_refused() -> None:
    for settings in ({"clip_norm": 1.0}, {"accumulate": 2}, {"grad_scaler": True}):
        DIETHead(5, 2).refuse_unless_plain(**settings)  # a plain head takes them all
        with pytest.raises(ValueError, match="optimizer=None"):
            DIETHead(5, 2, optimizer="sgd").refuse_unless_plain(**settings)
    DIETHead(5, 2, optimizer="sgd").refuse_unless_plain()


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_state_dict_resumes_bit_for_bit(rate: float) -> None:
    def steps(head: DIETHead, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            head(torch.randn(6, 4), torch.randperm(40)[:6]).backward()

    first = DIETHead(40, 4, optimizer="adamw", sample_rate=rate)
    steps(first, 1)
    resumed = DIETHead(40, 4, optimizer="adamw", sample_rate=rate)
    resumed.load_state_dict(first.state_dict())
    steps(first, 2)
    steps(resumed, 2)
    a, b = first.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_another_head_s_state_is_refused() -> None:
    state = DIETHead(10, 4, optimizer="adamw").state_dict()
    for other in (DIETHead(11, 4, optimizer="adamw"), DIETHead(10, 4), DIETHead(10, 5)):
        with pytest.raises(ValueError, match="build it with the saved"):
            other.load_state_dict(state)


def test_samples_are_drawn_from_seed_and_step() -> None:
    x, y = torch.randn(5, 4), torch.tensor([9, 3, 39, 0, 3])

    def draws(seed: int) -> list[Tensor]:
        head = DIETHead(40, 4, sample_rate=0.3, seed=seed)
        return [head._sample(y)[0] for _ in range(3)]

    one, again, other = draws(0), draws(0), draws(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])
    for rows in (*one, *other):
        assert (
            len(rows) == 12 and len(rows.unique()) == 12 and set(y.tolist()) <= set(rows.tolist())
        )
    counts = torch.zeros(40)
    head = DIETHead(40, 4, sample_rate=0.3)
    for _ in range(400):
        counts[head._sample(torch.arange(2))[0]] += 1
    share = counts[2:] / 400  # 10 of the other 38
    assert (share - 10 / 38).abs().max() < 0.1
    assert head(x, y).isfinite()


def test_sampled_loss_is_the_loss_over_the_sample() -> None:
    head = DIETHead(40, 4, sample_rate=0.3)
    x, y = torch.randn(5, 4), torch.tensor([9, 3, 39, 0, 3])
    twin = DIETHead(40, 4, sample_rate=0.3)
    rows, labels = twin._sample(y)
    truth = F.cross_entropy(x @ head.weight[rows].T, labels, label_smoothing=0.8).detach()
    assert relative_error(head(x, y).detach(), truth) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_sampled_fused_update_is_torch_optim(rule: str, path: Context) -> None:
    """Rows outside the sample get what the dense optimizer does with a gradient of 0."""
    settings, build = RULES[rule]
    torch.manual_seed(0)
    fused = DIETHead(150, 12, lr=1e-2, sample_rate=0.3, **settings)
    plain = DIETHead(150, 12, sample_rate=0.3)
    plain.weight.data.copy_(fused.weight)
    optimizer = build([plain.weight])
    for _ in range(4):
        x, y = torch.randn(9, 12), torch.randint(150, (9,))
        with path():
            losses = [head(x.requires_grad_(), y) for head in (fused, plain)]
            for loss in losses:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert relative_error(*(loss.detach() for loss in losses)) < 1e-6
        assert relative_error(fused.weight.detach(), plain.weight.detach()) < 1e-5


def test_updates_in_place_in_little_memory() -> None:
    """Peak beyond weight and moments: at most an eighth of eager's."""
    samples, dim, n = 60_000, 128, 128
    head = DIETHead(samples, dim, optimizer="adamw", save="none")
    w = nn.Parameter(head.weight.detach().clone())
    optimizer = torch.optim.AdamW([w], fused=True)
    x, y = torch.randn(n, dim, requires_grad=True), torch.randint(samples, (n,))

    def eager() -> None:
        F.cross_entropy(F.linear(x, w), y, label_smoothing=0.8).backward()
        optimizer.step()
        optimizer.zero_grad()

    def fused() -> None:
        head(x, y).backward()

    rows = measure({"eager": eager, "fused": fused}, "cpu", seconds=0, min_runs=1)
    assert 8 * rows["fused"].peak_mib <= rows["eager"].peak_mib


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of its own copies
def test_opcheck() -> None:
    head = DIETHead(30, 4, optimizer="adamw")
    x, y = torch.randn(5, 4, requires_grad=True), torch.arange(5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = (x, None, y, False, None, *head._state(), *head._rule())
    torch.library.opcheck(class_statistics_updating, inputs, test_utils=checks)
    with torch.no_grad():
        lse, target, _, low, exponentials, references = class_statistics_updating(*inputs)
    ones = torch.ones(5)
    saved = (y, lse, target, low, exponentials, references, None)
    inputs = (ones, -ones, 0 * ones, x.detach(), None, *saved, *head._state(), *head._rule())
    torch.library.opcheck(_class_update.class_update, inputs, test_utils=checks)
    biased = DIETHead(30, 4, optimizer="adamw", bias=True)
    state = (*biased._state(), *biased._rule(), *biased._bias_state())
    inputs = (x, None, y, False, None, *state)
    torch.library.opcheck(class_statistics_updating, inputs, test_utils=checks)
    inputs = (ones, -ones, 0 * ones, x.detach(), None, *saved, *state)
    torch.library.opcheck(_class_update.class_update, inputs, test_utils=checks)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adamw", "bias": True}, {"sample_rate": 0.5}], ids=str
)
def test_fullgraph(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = [DIETHead(50, 4, **settings) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    compiled = torch.compile(heads[1], fullgraph=True, backend="aot_eager")
    for step in range(3):
        x, y = torch.randn(2, 5, 4), torch.randperm(50)[:5]
        grads = []
        for head, call in zip(heads, (heads[0], compiled), strict=True):
            head.lr = 1e-2 / (step + 1)  # no recompilation, and no stale rate
            leaf = x.clone().requires_grad_()
            call(leaf, y).backward()
            grads.append(leaf.grad)
        assert torch.equal(grads[0], grads[1])
        assert torch.equal(heads[0].weight, heads[1].weight)


def sharded(rank: int, world: int, settings: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Losses of four steps of a linear map under the head, and the head's whole state."""
    import torch.distributed as dist

    group = dist.group.WORLD if world > 1 else None
    torch.manual_seed(0)
    head = DIETHead(13, 5, lr=0.05, group=group, **settings)
    embed = nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(3)))
    parameters = [embed] if head.optimizer else [embed, head.weight]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(4):
        x = torch.randn(12, 7, generator=generator)
        y = torch.randint(13, (12,), generator=generator)
        own = slice(rank * 12 // world, (rank + 1) * 12 // world)
        loss = head(x[own] @ embed, y[own])
        optimizer.zero_grad()
        loss.backward()
        if world > 1:  # what data-parallel training does
            dist.all_reduce(embed.grad)
            embed.grad /= world
        optimizer.step()
        losses.append(loss.detach())
    state = head.state_dict()
    other = DIETHead(13, 5, group=group, **settings)
    other.load_state_dict(state)
    assert torch.equal(other.weight, head.weight)
    return losses, state


def sharded_curve(
    rank: int, world: int, settings: dict[str, Any], images: Tensor, steps: int
) -> tuple[list[Tensor], Any, Tensor]:
    """What `sharded` returns, and the curve of a network on real images under a fused head."""
    found = curve(images, steps, save="none", fused=True, world=world)
    return *sharded(rank, world, settings), found


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_shards_train_as_one_process(world: int, data: Path) -> None:
    images = cifar_images(data, 500)
    steps = 10 if world == 2 else 2
    one_curve = curve(images, steps, save="none", fused=True)
    settings: dict[str, Any] = {} if world == 3 else {"optimizer": "adamw", "bias": True}
    losses, state = sharded(0, 1, settings)
    for found, shards, shared_curve in on_ranks(world, sharded_curve, settings, images, steps):
        assert relative_error(torch.stack(found), torch.stack(losses)) < 1e-5
        assert all(relative_error(shards[k], v) < 1e-5 for k, v in state.items())
        assert relative_error(shared_curve, one_curve) < 1e-4
        DIETHead(13, 5, **settings).load_state_dict(shards)  # back into one process


def test_initial_weight_does_not_depend_on_shards() -> None:
    from fastssl_kernels.diet import _fill_initial

    whole = torch.empty(70_000, 3)
    for first, rows in ((0, 70_000), (65_000, 3000), (69_990, 10), (2, 5)):
        part = torch.full((rows, 3), torch.nan)
        torch.manual_seed(0)
        _fill_initial(part, 70_000, first, 3**-0.5)
        whole = part if rows == 70_000 else whole
        assert torch.equal(part, whole[first : first + rows])
    assert whole.abs().max() <= 3**-0.5 and abs(whole.std() - 1 / 3) < 0.01


def small_network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(width),
    )


def cifar_images(root: Path, count: int) -> Tensor:
    """(count, 3, 32, 32) real CIFAR-10 images from a mosaic of tiles."""
    with Image.open(root / "cifar10" / "cifar10-train-1.webp") as mosaic:
        pixels = torch.tensor(np.array(mosaic.convert("RGB")), dtype=torch.float32) / 255
    tiles = pixels.unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1)
    return tiles[:count] - 0.5


def digit_images() -> Tensor:
    """(500, 3, 8, 8) real handwritten digits."""
    from sklearn.datasets import load_digits

    digits = torch.tensor(load_digits().images[:500], dtype=torch.float32)
    return (digits / 16 - 0.5)[:, None].expand(-1, 3, -1, -1)


def curve(
    images: Tensor, steps: int, *, save: str, fused: bool, rate: float = 1.0, world: int = 1
) -> Tensor:
    """DIET's loss over all classes, step by step, of a small network on real images.

    With ranks, each embeds the whole batch, so that its statistics are one process's, and brings
    its part of the rows to the head.
    """
    import torch.distributed as dist

    torch.manual_seed(0)
    network = small_network(32)
    group = dist.group.WORLD if world > 1 else None
    options = {"lr": 1e-2, "weight_decay": 0.0, "save": save, "sample_rate": rate, "group": group}
    head = DIETHead(len(images), 32, optimizer="adamw" if fused else None, **options)
    parameters = [*network.parameters(), *(() if fused else head.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    own = slice(None) if group is None else slice(dist.get_rank(), None, world)
    values = []
    for step in range(steps):
        index = torch.arange(step * 120, step * 120 + 120) % len(images)
        loss = head(network(images[index])[own], index[own])
        optimizer.zero_grad()
        loss.backward()
        if group is not None:  # what data-parallel training does
            for parameter in network.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values)


@pytest.mark.parametrize(
    "source", ["digits", "cifar 500", pytest.param("cifar 5000", marks=pytest.mark.slow)]
)
def test_modes_train_to_the_same_curve_on_real_images(source: str, data: Path) -> None:
    """Shards have theirs in `test_shards_train_as_one_process`."""
    count = 5000 if "5000" in source else 500
    images = digit_images() if source == "digits" else cifar_images(data, count)
    assert len(images) == count
    steps = 40 if count < 1000 else 80
    none = curve(images, steps, save="none", fused=False)
    assert none[-1] < none[0] - 0.02
    for save, fused in (("exp", False), ("none", True), ("exp", True)):
        other = curve(images, steps, save=save, fused=fused)
        assert relative_error(other, none) < 1e-4, (save, fused)


def knn_after_training(rate: float, seed: int) -> float:
    """Accuracy of 20 nearest neighbours on what DIET with this sample rate learned from digits."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for channels, width, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        convolution = nn.Conv2d(channels, width, 3, stride, 1)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    epochs, batches = 30, len(images) // 128
    head = DIETHead(len(images), 64, optimizer="adamw", sample_rate=rate, seed=seed)
    optimizer = torch.optim.AdamW(network.parameters())
    for step in range(epochs * batches):
        if step % batches == 0:
            order = torch.randperm(len(images))
        head.lr = optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / (epochs * batches))
        index = order[step % batches * 128 :][:128]
        shift = torch.randint(-1, 2, (2,)).tolist()
        noise = 0.3 * torch.randn(128, 1, 8, 8)
        loss = head(network(images[index].roll(shift, (2, 3)) + noise), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features = network.eval()(images)
    features = ((features - features.mean(0)) / features.std(0)).numpy()
    model = KNeighborsClassifier(20, metric="cosine").fit(features[:900], digits.target[:900])
    return float(model.score(features[900:], digits.target[900:]))


@pytest.mark.slow
def test_sampled_negatives_reach_within_two_points_of_exact() -> None:
    """At rate 0.1, of two seeds. Leaving classes outside the sample as they are costs three."""
    exact, sampled = (sum(knn_after_training(rate, s) for s in (0, 1)) / 2 for rate in (1.0, 0.1))
    assert exact > 0.8
    assert sampled > exact - 0.02, (exact, sampled)


@pytest.mark.slow
def test_every_update_tile_compiles_without_spills() -> None:
    found = []
    for cc in (80, 90, 100):
        for name, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
            tile = update_kernels.tile(torch.empty(0, dtype=dtype))
            sides = {k: v for k, v in tile.items() if k.startswith("BLOCK")}
            types = {"g_ptr": name, "x_ptr": name, "first": "i32:16", "stop": "i32", "N": "i32"}
            types |= dict.fromkeys(("w_ptr", "m_ptr", "v_ptr", "hyper_ptr", "unscale_ptr"), "*fp32")
            types |= {"D": "i32:16", "stride": "i32:16"}
            types |= dict.fromkeys(("a", "a_rest", "b", "b_rest", "eps"), "fp32")
            for adamw in (True, False):
                constants = {"ADAMW": adamw, "PRECISION": "ieee", **sides}
                launch = {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}
                kernel = "fastssl_kernels._triton.class_update:_update_kernel"
                found.append(Kernel(kernel, types, constants, cc, **launch))
    for resources in compile_offline(found):
        assert_ships(resources, dot=resources.kernel.signature["x_ptr"] == "*bf16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_samples": 0}, "positive"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"optimizer": "lars"}, "optimizer"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"save": "all"}, "save"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"momentum": 1.0}, "momentum"),
        ({"dtype": torch.int32}, "floating point"),
        ({"group": object()}, "not initialised"),
    ],
)
def test_refuses_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DIETHead(**{"num_samples": 5, "dim": 2, **arguments})


def test_refuses_inputs() -> None:
    head = DIETHead(5, 2)
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for features, index, words in (
        (torch.zeros(3, 4), y, "features"),
        (x, y[:2], "index"),
        (x, y.float(), "int64"),
        (x, y + 5, r"outside \[0, 5\)"),
        (x, y - 1, r"outside \[0, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            head(features, index)
    with pytest.raises(ValueError, match="sample_rate"):
        DIETHead(5, 2, sample_rate=0.4)(x, y)


@pytest.mark.gpu
def test_captured_step_repeats() -> None:
    """A CUDA graph of forward, backward and update makes the steps that eager makes."""
    torch.manual_seed(0)
    heads = [DIETHead(5000, 64, optimizer="adamw").cuda() for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    x, y = torch.randn(256, 64, device="cuda"), torch.randint(5000, (256,), device="cuda")
    for head in heads:
        head(x, y).backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        heads[1](x, y).backward()
    for rate in (1e-3, 1e-2):
        for head in heads:
            head.lr = rate
        heads[0](x, y).backward()
        graph.replay()
    assert heads[0].step == 3 and torch.equal(heads[0].weight, heads[1].weight)
