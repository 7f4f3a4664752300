"""Ranks: W of them with batches of N / W take the step of one with N; a run whose rank dies resumes
on another number of ranks."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastssl.train
from fastssl.distributed import (
    SINGLE_PROCESS,
    Ranks,
    global_batch_norm,
    init_distributed,
    rank_batch,
)
from fastssl.objectives import METHODS, build_objective, configured
from fastssl.objectives.oracles import LabelOracle, uses_oracle
from fastssl.pretrain import pretrain
from fastssl.recipes import recipe_config
from fastssl.runtime.metrics_log import read_metrics
from fastssl.step import Model, Step, _data_parallel
from tests.helpers.gloo import on_ranks

N, F, M = 8, 6, 24  # a batch, features, the data set
SMALL = recipe_config("digits-barlow", projector_width=16, lambd=None)
CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS if method != "sdiet"},
    **{f"pal {m}": {"method": m, "oracle": "labels"} for m in ("barlow", "vicreg", "simclr")},
    "vicreg by mean": {"method": "vicreg", "views": 3, "pairing": "mean"},
    "diet sharded": {"method": "diet", "fused_head": True},
}


def model_of(case: str, ranks: Ranks) -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, F), nn.BatchNorm1d(F), nn.ReLU())
    config = configured(SMALL, **CASES[case])
    oracle = LabelOracle(torch.arange(M) % 3) if uses_oracle(config) else None
    objective = build_objective(config, features=F, num_samples=M, oracle=oracle, group=ranks.group)
    return global_batch_norm(Model(net, objective).double(), ranks)


def gradients(rank: int, world: int) -> dict[str, Any]:
    """case -> loss and gradients of this rank's share of one batch, after averaging."""
    ranks = SINGLE_PROCESS if world == 1 else Ranks(rank, world, dist.group.WORLD, dist.group.WORLD)
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(4, N, 3, 2, 2, generator=generator, dtype=torch.float64)
    index = torch.randperm(M, generator=generator)[:N]
    share = slice(rank * N // world, (rank + 1) * N // world)
    found = {}
    for case, settings in CASES.items():
        model, count = model_of(case, ranks), settings.get("views", 2)
        parallel = _data_parallel(model, ranks)  # referenced until the gradients are averaged
        metrics, _ = parallel([v[share] for v in views[:count]], index[share])
        metrics["loss"].backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        statistics = {k: b for k, b in model.named_buffers() if "running" in k}
        found[case] = metrics["loss"].detach(), grads, statistics
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_have_the_loss_and_gradients_of_one_process(world: int) -> None:
    single = gradients(0, 1)
    all_ranks = on_ranks(world, gradients)
    for case in CASES:
        loss, grads, statistics = single[case]
        losses = torch.stack([found[case][0] for found in all_ranks])
        assert (losses.mean() - loss).abs() < 1e-10 * loss.abs(), case
        total = nn.utils.get_total_norm(grads.values())  # a bias before batch norm has gradient 0
        for _, shared, running in (found[case] for found in all_ranks):
            assert shared.keys() == grads.keys()
            for name, gradient in grads.items():
                assert (shared[name] - gradient).norm() < 1e-10 * total, (case, name)
            for name, buffer in statistics.items():
                torch.testing.assert_close(running[name], buffer, msg=name)


def training(rank: int, world: int, folder: str, dies_at: int) -> float:
    """A short run whose rank 1 dies; seconds until this rank ended."""
    fastssl.train.CheckpointTimer.is_due = lambda clock: True  # type: ignore[method-assign]
    calls, step = 0, Step.__call__

    def mortal(self: Step, views: Sequence[Tensor], index: Tensor, lr: float) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == dies_at:
            os._exit(17)
        return step(self, views, index, lr)

    Step.__call__ = mortal  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        pretrain(RUN, Path(folder), lambda line: None)
    except RuntimeError:  # the collective that the dead rank left
        assert dies_at
    return time.monotonic() - begin


RUN = configured(
    SMALL,
    backbone="fastnet-4",
    epochs=1,
    warmup_epochs=0,
    optimizer="sgd",
    lr=1e-3,  # small, so that rounding does not grow from step to step
    method="vicreg",
    projector_width=32,
    global_batch=128,
    sync_batchnorm=True,
    label_draws=1,
    log_every=1,
)


def test_a_rank_dies_and_another_number_of_ranks_resumes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(RUN, whole, lambda line: None)
    with pytest.raises(Exception, match=r"exit code 17|terminated"):
        on_ranks(2, training, str(cut), 7)
    assert not (cut / "summary.json").exists()
    logged: list[str] = []
    pretrain(RUN, cut, logged.append)
    assert any("resumed at step 6" in line for line in logged)
    assert any("resuming on 1 ranks; the run had 2" in line for line in logged)
    one, two = read_metrics(whole / "metrics.jsonl"), read_metrics(cut / "metrics.jsonl")
    assert [m["step"] for m in two] == list(range(1, 12))
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=2e-3)
    for a, b in zip(one, two, strict=True):  # fp32: what differs grows from step to step
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3), a["step"]
    with pytest.raises(ValueError, match="finished"):
        pretrain(RUN, cut, logged.append)


def test_another_global_batch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*inputs: object) -> None:
        raise KeyboardInterrupt

    plain = configured(RUN, global_batch=0)
    monkeypatch.setattr(fastssl.train.CheckpointTimer, "is_due", lambda clock: True)
    monkeypatch.setattr(fastssl.train.Watchdog, "step_done", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(plain, tmp_path / "run", lambda line: None)
    monkeypatch.undo()
    two = Ranks(0, 2)
    monkeypatch.setattr("fastssl.pretrain.init_distributed", lambda device: _context(two))
    monkeypatch.setattr(Ranks, "all_reduce_max", lambda self, *numbers: list(numbers))
    with pytest.raises(ValueError, match="128 images in a batch over all ranks, this one has 256"):
        pretrain(plain, tmp_path / "run", lambda line: None)


def _context(ranks: Ranks) -> Any:
    from contextlib import nullcontext

    return nullcontext(ranks)


def test_a_method_that_ranks_cannot_share_is_refused() -> None:
    config = configured(SMALL, method="sdiet")
    with pytest.raises(ValueError, match="--method sdiet updates its rows in one process"):
        build_objective(config, features=F, num_samples=M, group=object())


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    assert rank_batch(configured(SMALL, global_batch=96), 3) == 32
    assert rank_batch(SMALL, 3) == SMALL.batch_size
    with pytest.raises(ValueError, match="--global-batch 100 is not divisible by 3 ranks"):
        rank_batch(configured(SMALL, global_batch=100), 3)


def test_collectives_of_a_single_process() -> None:
    with init_distributed("cpu") as ranks:
        assert ranks is SINGLE_PROCESS and ranks.is_main and ranks.group is None
    assert (
        SINGLE_PROCESS.all_reduce_max(3, 0) == [3, 0]
        and SINGLE_PROCESS.broadcast(1.5) == 1.5
        and SINGLE_PROCESS.gather("x") == ["x"]
    )
