"""Protocols on finished runs, against features averaged directly; a run's networks, against the
objective that trained."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.data.loading import build_views
from fastssl.data.splits import ArraySplit, open_split
from fastssl.evaluation import trained_run
from fastssl.evaluation.probes import PROBES
from fastssl.evaluation.protocols import PROTOCOLS, evaluate_protocol
from fastssl.evaluation.protocols import _average as average
from fastssl.evaluation.protocols import _network as network_of
from fastssl.evaluation.trained_run import EPOCH, TrainedRun, load_trained_run
from fastssl.objectives import build_objective, configured
from fastssl.pretrain import pretrain
from fastssl.recipes import recipe_config
from fastssl.runtime.checkpoint import load_checkpoint
from fastssl_pipelines.engines.base import EngineSettings
from fastssl_pipelines.engines.resident import ResidentPipeline

QUICK = recipe_config(
    "digits-barlow",
    epochs=1,
    warmup_epochs=0.0,
    backbone="fastnet-8",
    projector_width=32,
    label_draws=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "barlow"
    pretrain(QUICK, path, lambda line: None)
    return path


@pytest.fixture
def run(folder: Path) -> TrainedRun:
    return load_trained_run(folder, pytest.fail)


def test_the_projector_is_the_one_that_was_trained(folder: Path, run: TrainedRun) -> None:
    saved = load_checkpoint(folder / "checkpoint", torch.device("cpu"), pytest.fail)
    assert saved is not None and run.projector is not None
    objective = build_objective(run.config, features=32, num_samples=1438).eval()
    state = {k.removeprefix("objective."): v for k, v in saved["modules"].items()}
    objective.load_state_dict({k: v for k, v in state.items() if not k.startswith("backbone.")})
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(run.projector(x), objective.projector(x))  # type: ignore[operator]
    assert not run.backbone.training and not run.projector.training


@pytest.mark.parametrize(("name", "views"), [("multiview", 4), ("patches", 3)])
def test_the_average_is_the_mean_over_views(
    name: str, views: int, run: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against each image rendered alone, and whatever goes through the network at once."""
    whole = open_split(run.config, "train")
    assert isinstance(whole, ArraySplit)
    images, protocol = whole.pixels[:5], PROTOCOLS[name]
    split = ArraySplit(run.config, "train", images)
    augmented = views - 1 if protocol.centre else views
    views_of_image = build_views(run.config)[:1] * augmented
    settings = EngineSettings(
        views=views_of_image, batch_size=1, seed=0, device=torch.device("cpu")
    )
    pipeline = ResidentPipeline(images, settings)
    assert run.projector is not None
    expected = []
    with torch.no_grad():
        for i in range(5):
            rows = [run.backbone(v) for v in pipeline.batch(torch.tensor([i]), EPOCH).views]
            if protocol.centre:
                rows.append(run.centre_features(split, torch.tensor([i])))
            if protocol.projector_layer:
                linear, norm, relu, _ = run.projector
                rows = [relu(norm(linear(row))) for row in rows]
            expected.append(torch.stack(rows).mean(0))
    network = network_of(protocol, run, name)
    for at_once in (2 * augmented, 512):
        monkeypatch.setattr(trained_run, "VIEWS_AT_ONCE", at_once)
        with torch.no_grad():
            numbers, got = average(run, split, network, views, protocol.centre)
        assert numbers.tolist() == list(range(5))
        torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_the_settings_are_the_papers() -> None:
    multiview, patches = PROTOCOLS["multiview"], PROTOCOLS["patches"]
    assert (multiview.views, multiview.centre, multiview.projector_layer) == (16, True, False)
    assert (patches.views, patches.centre, patches.projector_layer) == (128, False, True)
    for protocol in (multiview, patches):
        assert not protocol.probe.standardised
    fits = multiview.probe.fit, patches.probe.fit
    assert isinstance(fits[0], partial) and isinstance(fits[1], partial)
    adam, sgd = fits[0].keywords["settings"], fits[1].keywords["settings"]
    assert (adam.optimizer, adam.lr, adam.epochs, adam.batch_size) == ("adam", 1e-3, 200, 512)
    assert adam.label_smoothing == 0.1
    assert (sgd.optimizer, sgd.lr, sgd.epochs, sgd.batch_size) == ("sgd", 0.03, 100, 100)
    assert (sgd.momentum, sgd.weight_decay) == (0.9, 5e-5)


def test_a_table_by_several_probes(folder: Path) -> None:
    table = evaluate_protocol(folder, "multiview", pytest.fail, probes=("lbfgs", "ridge"), views=2)
    ((row, cells),) = table.items()
    assert row == "pretrained, multiview (2 views)"
    assert list(cells)[:6] == ["linear_all", "ridge_all", "knn_all"] + [
        f"{p}_10%" for p in ("linear", "ridge", "knn")
    ]
    assert cells["linear_all"].mean > 0.7 and cells["linear_all"].mean > cells["linear_1"].mean
    assert set(PROBES) == {"lbfgs", "ridge", "sgd"}


def test_data_without_labels_is_one_clear_line(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images)
    config = configured(QUICK, data=str(tmp_path / "data.npz"), batch_size=20)
    pretrain(config, tmp_path / "run", lambda line: None)
    for name in ("neutral", "multiview"):
        with pytest.raises(ValueError, match=r"has no labels, so no probe can be trained; `fast"):
            evaluate_protocol(tmp_path / "run", name, pytest.fail, views=None)
