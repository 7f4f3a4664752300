"""A step: parts give the whole batch's gradient, what is not finite changes nothing, a failed
compile is survived."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fastssl.backbones import build_backbone
from fastssl.config import Config
from fastssl.distributed import SINGLE_PROCESS
from fastssl.knobs import BarlowTwinsKnobs
from fastssl.objectives import build_objective, configured
from fastssl.objectives.barlow_twins import BarlowTwins
from fastssl.objectives.base import Objective
from fastssl.optim import build_optimizer
from fastssl.runtime.nan_guard import MAX_CONSECUTIVE_SKIPS, NonFiniteGuard, NonFiniteLossError
from fastssl.step import Model, Step, view_features

CONFIG = Config(lr=0.01, optimizer="sgd", warmup_epochs=0)


def small(method: str, features: int, width: int) -> Objective:
    """The method with a projector of two layers."""
    knobs = {"projector_width": width, "projector_layers": 2}
    config = configured(Config(), method=method, **knobs)
    return build_objective(config, features=features, num_samples=64)


def test_views_of_one_size_share_a_forward_pass() -> None:
    calls = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(tuple(x.shape))
            return x.mean((2, 3))

    views = [torch.randn(4, 3, s, s) for s in (8, 8, 4)]
    features = view_features(Net(), views)
    assert calls == [(8, 3, 8, 8), (4, 3, 4, 4)]
    for view, f in zip(views, features, strict=True):
        torch.testing.assert_close(f, view.mean((2, 3)))


def gradients(model: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    metrics, _ = model(views, torch.arange(len(views[0])))
    model.zero_grad()
    metrics["loss"].backward()
    return metrics["loss"], {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_have_the_gradient_of_the_whole_batch(parts: int) -> None:
    """For losses that are no sums over images, where summing the losses of the parts is wrong."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    views = [torch.randn(9, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
    for objective in (small("barlow", 8, 16), small("vicreg", 8, 16)):
        whole = Model(net, objective).double()
        loss, expected = gradients(whole, views)
        in_parts = Model(net, objective, parts).double()
        same_loss, found = gradients(in_parts, views)
        torch.testing.assert_close(same_loss, loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
        by_part = [gradients(whole, [v[i::3] for v in views])[1] for i in range(3)]
        summed = sum(g["backbone.0.weight"] for g in by_part) / 3
        assert (summed - expected["backbone.0.weight"]).norm() > 1e-3 * summed.norm()


def test_parts_count_once_in_running_statistics() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    one, two = build_backbone("fastnet-4"), build_backbone("fastnet-4")
    two.load_state_dict(one.state_dict())
    for half in x.chunk(2):
        one(half)
    view_features(two, [x], parts=2)[0].sum().backward()
    for name, buffer in one.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, two.get_buffer(name)), name


def step_of(config: Config, objective: Objective) -> tuple[Step, Model]:
    torch.manual_seed(0)
    model = Model(build_backbone("fastnet-4"), objective)
    optimizer = build_optimizer(config, [model.backbone, model.objective])
    return Step(config, model, optimizer, SINGLE_PROCESS, print), model


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_no_weight(optimizer: str, where: str) -> None:
    class Faulty(BarlowTwins):
        fault = False

        def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
            loss = super().forward(features, index)["loss"]
            if not self.fault:
                return {"loss": loss}
            if where == "loss":
                return {"loss": loss * torch.inf}
            return {"loss": loss + (features[0] * 0).sum().sqrt()}  # the slope of sqrt at 0

    config = configured(CONFIG, optimizer=optimizer)  # type: ignore[arg-type]
    knobs = BarlowTwinsKnobs(projector_width=16, projector_layers=2)
    step, model = step_of(config, Faulty(16, knobs))
    views, index = [torch.randn(6, 3, 8, 8) for _ in range(2)], torch.arange(6)
    guard = NonFiniteGuard(model, "skip", print)
    finite = step(views, index, 0.01)[0]["finite"]
    assert bool(finite)
    guard.add(1, index, finite)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.objective.fault = True  # type: ignore[assignment]
    metrics, _ = step(views, index, 0.01)
    assert not bool(metrics["finite"]) and bool(metrics["loss"].isfinite()) == (where == "gradient")
    guard.add(2, index, metrics["finite"])
    assert guard.skipped == 1
    for name, x in model.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(x, before[name]), name
    model.objective.fault = False  # type: ignore[assignment]
    assert bool(step(views, index, 0.01)[0]["finite"])
    assert not torch.equal(model.state_dict()["backbone.0.0.weight"], before["backbone.0.0.weight"])


def test_a_skipped_first_step_leaves_momentum_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes momenta from memory that it does not write where the first step is skipped."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, torch.nan))
    config = configured(CONFIG, optimizer="sgd")
    views, index = [torch.randn(6, 3, 8, 8) for _ in range(2)], torch.arange(6)
    after = []
    for skipped in (False, True):
        torch.manual_seed(1)
        step, model = step_of(config, small("barlow", 16, 16))
        if skipped:
            state = {name: x.clone() for name, x in model.state_dict().items()}
            bad = [torch.full_like(view, torch.nan) for view in views]
            assert not bool(step(bad, index, 0.01)[0]["finite"])
            model.load_state_dict(state)  # batch norm's statistics: the guard's part
        assert bool(step(views, index, 0.01)[0]["finite"])
        after.append(model.state_dict())
    for name, x in after[0].items():
        assert torch.equal(x, after[1][name]), name


def test_the_guard_names_step_and_images_and_gives_up_after_a_row() -> None:
    logged: list[str] = []
    index, good, bad = torch.arange(90, 100), torch.tensor(True), torch.tensor(False)
    guard = NonFiniteGuard(nn.BatchNorm1d(3), "skip", logged.append)
    for step in range(1, MAX_CONSECUTIVE_SKIPS):
        guard.add(step, index, bad)
    assert logged[6] == (
        "the loss or its gradient is not finite at step 7, images 90, 91, 92, 93, 94, 95, 96, 97 "
        "and 2 more; the step was skipped"
    )
    guard.add(MAX_CONSECUTIVE_SKIPS, index, good)
    for step in range(1, MAX_CONSECUTIVE_SKIPS):
        guard.add(step, index, bad)
    with pytest.raises(NonFiniteLossError, match="10 steps in a row; try a lower --lr"):
        guard.add(MAX_CONSECUTIVE_SKIPS, index, bad)
    with pytest.raises(NonFiniteLossError, match=r"at step 5, .* or --on-nonfinite skip"):
        NonFiniteGuard(nn.Identity(), "stop", logged.append).add(5, index, bad)


def test_running_statistics_of_a_bad_batch_are_undone() -> None:
    norm = nn.BatchNorm1d(2)
    guard = NonFiniteGuard(norm, "skip", lambda line: None)
    norm(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    guard.add(1, torch.arange(2), torch.tensor(True))
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    norm(torch.tensor([[torch.nan, 2.0], [3.0, 5.0]]))
    guard.add(2, torch.arange(2), torch.tensor(False))
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_clipping_scales_the_whole_gradient(optimizer: str) -> None:
    """As torch clips: by the norm over all parameters, before the optimizer, which reads it."""
    views, index = [torch.randn(6, 3, 8, 8) for _ in range(2)], torch.arange(6)
    config = configured(CONFIG, optimizer=optimizer)  # type: ignore[arg-type]

    def step_with(norm: float) -> tuple[Step, Model]:
        torch.manual_seed(1)
        return step_of(configured(config, clip_norm=norm), small("barlow", 16, 16))

    plain, model = step_with(0.0)
    norm = plain(views, index, 0.0)[0]["grad_norm"]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    expected = [p.grad for p in model.parameters()]
    clipped, model = step_with(0.5)
    metrics, _ = clipped(views, index, 0.0)
    assert norm > 1 and torch.equal(metrics["grad_norm"], norm), "the log has the unclipped norm"
    torch.testing.assert_close(metrics["clip_scale"], 0.5 / (norm + 1e-6))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    loose, model = step_with(1e6)
    assert loose(views, index, 0.0)[0]["clip_scale"] == 1
    unclipped = nn.utils.get_total_norm([p.grad for p in model.parameters()])  # type: ignore[misc]
    torch.testing.assert_close(unclipped, norm)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_clipping_hides_nothing_from_the_guard(optimizer: str) -> None:
    config = configured(CONFIG, optimizer=optimizer, clip_norm=0.5)  # type: ignore[arg-type]
    step, model = step_of(config, small("barlow", 16, 16))
    before = [p.detach().clone() for p in model.parameters()]
    views = [torch.full((6, 3, 8, 8), torch.inf) for _ in range(2)]
    assert not bool(step(views, torch.arange(6), 0.01)[0]["finite"])
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("method", "knobs"), [("diet", {"fused_head": True}), ("sdiet", {"projector_width": 32})]
)
def test_clipping_is_refused_where_weights_are_updated_in_backward(
    method: str, knobs: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="--clip-norm cannot be used"):
        configured(Config(), method=method, clip_norm=1.0, optimizer="adamw", **knobs)


class Limited(nn.Module):
    """A network that takes no more than `limit` images at once."""

    def __init__(self, limit: int):
        super().__init__()
        self.net, self.limit = build_backbone("fastnet-4"), limit

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
        return self.net(x)


@pytest.mark.parametrize(
    ("limit", "parts", "advice"),
    [
        (15, 1, "--accumulate 2 fits, as a step in 2 parts has shown"),
        (7, 1, "--accumulate 4 fits"),
        (7, 2, "--accumulate 4 fits"),
        (2, 1, "--accumulate 8 fits"),
        (1, 1, "not even a step of 2 images fits; use a smaller --backbone or --image-size"),
    ],
)
def test_out_of_memory_names_what_fits(limit: int, parts: int, advice: str) -> None:
    """8 images x 2 views: 16 rows of the network."""
    model = Model(Limited(limit), small("barlow", 16, 16), parts)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = build_optimizer(CONFIG, [model.backbone, model.objective])
    logged: list[str] = []
    step = Step(CONFIG, model, optimizer, SINGLE_PROCESS, logged.append)
    views, index = [torch.randn(8, 3, 8, 8) for _ in range(2)], torch.arange(8)
    reason = "CUDA out of memory"
    with pytest.raises(MemoryError) as error:
        step(views, index, 0.01)
    assert str(error.value).startswith(f"out of memory in a training step ({reason}); {advice}")
    assert logged == ["out of memory; trying smaller steps"] and model.parts == parts
    for name, x in model.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(x, state[name], msg=name, rtol=0, atol=0)


def test_a_smaller_batch_is_named_where_parts_do_not_help() -> None:
    """Memory of the loss, which sees the whole batch whatever the parts."""
    objective = small("barlow", 16, 16)
    forward = objective.forward

    def limited(features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        if len(index) > 3:
            raise MemoryError("N x N")
        return forward(features, index)

    objective.forward = limited  # type: ignore[method-assign]
    step, _ = step_of(CONFIG, objective)
    views, index = [torch.randn(12, 3, 8, 8) for _ in range(2)], torch.arange(12)
    with pytest.raises(MemoryError, match="--batch-size 3 fits, as a step of 3 images has shown"):
        step(views, index, 0.01)


def test_the_advice_holds_on_a_cpu_without_memory() -> None:
    """A real allocation that fails."""
    model = Model(build_backbone("fastnet-4"), small("barlow", 16, 16))

    def allocate(net: nn.Module, inputs: tuple[Tensor]) -> None:
        torch.empty(10**15 if len(inputs[0]) > 9 else 0)

    model.backbone.register_forward_pre_hook(allocate)
    optimizer = build_optimizer(CONFIG, [model.backbone, model.objective])
    step = Step(CONFIG, model, optimizer, SINGLE_PROCESS, lambda line: None)
    views, index = [torch.randn(8, 3, 8, 8) for _ in range(2)], torch.arange(8)
    with pytest.raises(MemoryError, match=r"can't allocate memory.*; --accumulate 2 fits"):
        step(views, index, 0.01)


def test_a_failed_compile_is_logged_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def compiled(model: nn.Module, mode: str | None) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, *inputs: object) -> None:
                raise BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None)

        return Broken()

    monkeypatch.setattr(torch, "compile", compiled)
    logged: list[str] = []
    step, _ = step_of(configured(CONFIG, compile=True), small("barlow", 16, 16))
    step._log = logged.append
    views, index = [torch.randn(6, 3, 8, 8) for _ in range(2)], torch.arange(6)
    for _ in range(2):
        assert bool(step(views, index, 0.01)[0]["loss"].isfinite())
    assert (
        len(logged) == 1 and "continuing without it" in logged[0] and "no C++ compiler" in logged[0]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_does_not_wait_for_the_gpu(precision: str) -> None:
    """Forward, loss, backward, update, spectrum and guard: no sync between two reports."""
    from fastssl.evaluation.collapse import SpectrumQueue

    config = configured(CONFIG, precision=precision)  # type: ignore[arg-type]
    model = Model(build_backbone("fastnet-4"), small("barlow", 16, 32)).cuda()
    optimizer = build_optimizer(config, [model.backbone, model.objective])
    step, guard = (
        Step(config, model, optimizer, SINGLE_PROCESS, print),
        NonFiniteGuard(model, "stop", print),
    )
    spectrum = SpectrumQueue(16, "cuda", capacity=10)
    views = [torch.randn(6, 3, 8, 8, device="cuda") for _ in range(2)]
    index = torch.arange(6, device="cuda")
    step(views, index, 0.01)  # kernels compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            metrics, features = step(views, index, 0.01)
            spectrum.update(features)
            guard.add(number, index, metrics.pop("finite"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    guard.check()
    assert bool(metrics["loss"].isfinite())


@pytest.mark.gpu
def test_cuda_graphs_take_the_steps_of_eager() -> None:
    losses = {}
    for graphs in (False, True):
        config = configured(CONFIG, compile=graphs, cuda_graphs=graphs)
        torch.manual_seed(0)
        model = Model(build_backbone("fastnet-4"), small("barlow", 16, 32)).cuda()
        optimizer = build_optimizer(config, [model.backbone, model.objective])
        step = Step(config, model, optimizer, SINGLE_PROCESS, pytest.fail)
        views = [torch.randn(64, 3, 8, 8, device="cuda") for _ in range(2)]
        index = torch.arange(64, device="cuda")
        losses[graphs] = [step(views, index, 1e-3)[0]["loss"].item() for _ in range(6)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
