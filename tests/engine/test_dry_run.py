"""The estimate of --dry-run is close to what a step uses, and it computes and writes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.measure import _cpu_peak_mib
from fastssl import dry_run as module
from fastssl.backbones import build_backbone
from fastssl.cli import run
from fastssl.config import Config
from fastssl.device import resolved
from fastssl.distributed import SINGLE_PROCESS
from fastssl.dry_run import auto_batch_size, dry_run, step_memory
from fastssl.objectives import METHODS, build_objective, configured
from fastssl.optim import build_optimizer
from fastssl.recipes import RECIPES, recipe_config
from fastssl.step import Model, Step

CPU = torch.device("cpu")
CONFIG = recipe_config("digits-barlow", backbone="fastnet-8", device="cpu")
SMALL = ["--backbone", "fastnet-8", "--device", "cpu"]
PHOTOS = ("barlow", "diet", "vicreg", "simclr")


@pytest.mark.parametrize(
    ("name", "tolerance"), [("digits-barlow", 0.1), ("digits-diet", 0.1), ("digits-fused", 0.1)]
)
def test_the_peak_is_that_of_a_real_step(name: str, tolerance: float) -> None:
    fused = {"fused_head": True} if name == "digits-fused" else {}
    recipe = "digits-diet" if fused else name
    config = recipe_config(recipe, backbone="fastnet-8", channels_last=False, **fused)
    _, mib = step_memory(config, CPU, 1438)
    in_step = mib["activations"] + mib["gradients and temporary tensors"]
    assert in_step == pytest.approx(_peak_mib(config), rel=tolerance)


def _peak_mib(config: Config) -> float:
    """What a warm step allocates at its peak."""
    net = build_backbone(config.backbone)
    objective = build_objective(config, features=net.num_features, num_samples=1438)  # type: ignore[arg-type]
    optimizer = build_optimizer(config, [net, objective])
    step = Step(config, Model(net, objective).train(), optimizer, SINGLE_PROCESS, print)
    views = [torch.randn(config.batch_size, 3, 16, 16) for _ in range(config.views)]
    step(views, torch.arange(config.batch_size), 1e-3)
    optimizer.zero_grad(set_to_none=True)
    return _cpu_peak_mib(lambda: step(views, torch.arange(config.batch_size), 1e-3))


def test_counts_are_exact() -> None:
    estimate = dry_run(CONFIG)
    net = build_backbone("fastnet-8")
    assert estimate.parameters["backbone"] == sum(p.numel() for p in net.parameters())
    assert estimate.parameters["head of the method"] == 32 * 256 + 2 * 256 + 256 * 256
    assert estimate.steps == CONFIG.epochs * 11 and estimate.images == 1438
    trained = sum(estimate.parameters.values())
    assert estimate.mib["optimizer"] == pytest.approx(2 * 4 * trained / 2**20, rel=0.01)
    views = 2 * CONFIG.batch_size * 3 * 16 * 16 * 4 / 2**20
    assert estimate.mib["views, two batches ahead"] == 3 * views
    assert estimate.mib["images"] == 1438 * 8 * 8 * 3 / 2**20


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_estimated(method: str) -> None:
    small = {"projector_width": 32, "projector_layers": 2}
    knobs = {k: v for k, v in small.items() if hasattr(METHODS[method].Knobs(), k)}
    config = configured(replace(CONFIG, batch_size=8), method=method, **knobs)
    _, mib = step_memory(config, CPU, 100)
    assert all(size > 0 for size in mib.values())


def test_networks_that_read_values_while_built_are_estimated() -> None:
    config = replace(CONFIG, backbone="vit_tiny_patch16_224", image_size=32, batch_size=4)
    found, mib = step_memory(config, CPU, 100)
    assert found["backbone"] == sum(
        p.numel() for p in build_backbone(config.backbone, image_size=32).parameters()
    )
    assert mib["activations"] > 0


def test_recomputing_saves_activations() -> None:
    _, whole = step_memory(CONFIG, CPU, 1438)
    _, parts = step_memory(replace(CONFIG, accumulate=4), CPU, 1438)
    assert parts["activations"] < 0.5 * whole["activations"]
    assert sum(parts.values()) < sum(whole.values())


def test_nothing_is_computed_and_no_file_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    huge = replace(CONFIG, batch_size=1024, image_size=4096)
    _, mib = step_memory(huge, CPU, 10_000)  # the views alone would take 400 GiB
    assert mib["views, two batches ahead"] > 400 * 1024
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", PHOTOS)
def test_recipes_for_photos_fit_24_gb(name: str) -> None:
    recipe = RECIPES[name].config()
    assert recipe.precision == "auto" and recipe.compile is None
    _, mib = step_memory(replace(recipe, precision="bfloat16"), CPU, 10_000)
    images = 10_000 * recipe.load_size**2 * 3 / 2**20
    assert sum(mib.values()) + images < 22 * 1024  # MiB; a GPU of 24 GB has 24,564, its context 500


def test_auto_precision_and_compile_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe_config("barlow", data="photos")
    on_cpu = resolved(replace(config, device="cpu"))
    assert (on_cpu.precision, on_cpu.compile) == ("float32", False)
    monkeypatch.setattr("fastssl.device.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert (resolved(config).precision, resolved(config).compile) == ("bfloat16", True)
    assert resolved(replace(config, accumulate=2)).compile is False
    given = replace(config, precision="float32", compile=False)
    assert resolved(given) == given
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolved(config).precision == "float32"


def test_the_largest_batch_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(mib: float) -> None:
        monkeypatch.setattr(module, "free_bytes", lambda device: int(mib * 2**20))

    peak = dry_run(CONFIG).peak_mib
    free(4 * peak)
    plenty = dry_run(CONFIG)
    assert plenty.largest_batch > CONFIG.batch_size
    assert "; fits" in "\n".join(plenty.lines())
    free(0.5 * peak)
    short = dry_run(CONFIG)
    assert short.largest_batch < CONFIG.batch_size
    assert "; does not fit" in "\n".join(short.lines())
    size = auto_batch_size(CONFIG)
    assert size == 1 << (short.largest_batch.bit_length() - 1) <= short.largest_batch
    _, mib = step_memory(replace(CONFIG, batch_size=size), CPU, 1438)
    assert sum(mib.values()) < 0.5 * peak
    free(2**20)
    assert auto_batch_size(CONFIG) == 128  # a tenth of the images
    free(0.01)
    with pytest.raises(ValueError, match="no batch fits"):
        auto_batch_size(CONFIG)


def test_the_command_writes_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", None)  # no real step
        assert run(["train", "digits-barlow", "--dry-run", *SMALL]) == 0
    estimate = capsys.readouterr().out
    assert "peak memory: about" in estimate and "that are free; fits" in estimate
    assert "440 steps; add --measure for their time" in estimate
    assert "largest batch size that fits" in estimate
    assert run(["train", "digits-barlow", "--dry-run", "--measure", *SMALL]) == 0
    assert "440 steps of " in capsys.readouterr().out
    assert run(["train", "digits-barlow", "--measure"]) == 2
    assert "--measure needs --dry-run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_automatic_batch_size_is_stored_as_a_number_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastssl.cli.run_commands import _train_config
    from fastssl.runtime import run_dir

    flags = [*SMALL, "--run", str(tmp_path / "run"), "--batch-size", "auto", "--epochs", "1"]
    config = _train_config("digits-barlow", flags)
    assert config.batch_size == 128
    run_dir.create(tmp_path / "run", replace(config, batch_size=64))
    assert '"batch_size": 64' in (tmp_path / "run/config.json").read_text()
    assert _train_config("digits-barlow", flags).batch_size == 64  # resumed, whatever is free now
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--batch-size auto is for one process"):
        _train_config("digits-barlow", flags)
