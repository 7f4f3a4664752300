"""The estimate of --dry-run is close to what a step uses, and it writes nothing."""

from pathlib import Path

import pytest
import torch

from bench.measure import _cpu_peak_mib
from fastssl.backbones import build_backbone
from fastssl.cli import run
from fastssl.config import Config
from fastssl.distributed import SINGLE_PROCESS
from fastssl.dry_run import dry_run
from fastssl.objectives import build_objective, configured
from fastssl.optim import build_optimizer
from fastssl.recipes import recipe_config
from fastssl.step import Model, Step

CONFIG = recipe_config("digits-barlow", backbone="fastnet-8", device="cpu")


@pytest.mark.parametrize("method", ["barlow", "diet"])
def test_memory_is_near_the_peak_of_a_step(method: str) -> None:
    config = configured(CONFIG, method=method, channels_last=False)  # type: ignore[arg-type]
    estimate = dry_run(config, print)
    peak = _peak_mib(config)
    parts = estimate.mib["activations"] + estimate.mib["gradients"]
    assert peak == pytest.approx(parts, rel=0.25)


def _peak_mib(config: Config) -> float:
    """What a warm step allocates at its peak."""
    net = build_backbone(config.backbone)
    objective = build_objective(config, features=net.num_features, num_samples=1438)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, [net, objective])
    step = Step(config, Model(net, objective).train(), optimizer, SINGLE_PROCESS, print)
    views = [torch.randn(config.batch_size, 3, 16, 16) for _ in range(2)]
    step(views, torch.arange(config.batch_size), 1e-3)
    optimizer.zero_grad(set_to_none=True)
    return _cpu_peak_mib(lambda: step(views, torch.arange(config.batch_size), 1e-3))


def test_counts_are_exact() -> None:
    estimate = dry_run(CONFIG, print)
    net = build_backbone("fastnet-8")
    assert estimate.parameters["backbone"] == sum(p.numel() for p in net.parameters())
    assert estimate.parameters["head of the method"] == 32 * 256 + 2 * 256 + 256 * 256
    assert estimate.steps == CONFIG.epochs * 11
    trained = sum(estimate.parameters.values())
    assert estimate.mib["gradients"] == 4 * trained / 2**20
    assert estimate.mib["optimizer"] == pytest.approx(2 * estimate.mib["gradients"], rel=0.01)


def test_the_command_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "digits-barlow", "--dry-run", "--backbone", "fastnet-8"]) == 0
    estimate = capsys.readouterr().out
    assert "total memory" in estimate and "440 steps of" in estimate
    assert list(tmp_path.iterdir()) == []
