"""Protocols on finished runs, against features averaged directly; a run's networks, against the
objective that trained."""

import json
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastssl import cli
from fastssl.data.loading import build_views
from fastssl.data.splits import ArraySplit, open_split, sample_indices
from fastssl.evaluation import progress, protocols, trained_run
from fastssl.evaluation.probes import PROBES, Probe, ProbedFeatures
from fastssl.evaluation.protocols import PROTOCOLS, evaluate, evaluate_protocol, evaluate_run
from fastssl.evaluation.protocols import _average as average
from fastssl.evaluation.protocols import _network as network_of
from fastssl.evaluation.spectrum import rankme
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
        with pytest.raises(
            ValueError, match=r"has no labels of two classes or more, so no probe can be .*; `fast"
        ):
            evaluate_protocol(tmp_path / "run", name, pytest.fail, views=None)


def sorted_digits(path: Path, count: int) -> np.ndarray:
    """An .npz of digits sorted by class, its test part the same images; their labels."""
    split = open_split(QUICK, "train")
    labels = split.labels()
    assert isinstance(split, ArraySplit) and labels is not None
    order = labels[:count].argsort(stable=True)
    x, y = split.pixels[order], labels[order].numpy()
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return y


def test_rankme_of_an_evaluation_is_of_a_sample_by_the_seed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With labels and without; of images sorted by class, whose first differ from the rest. Without
    labels no other images are read."""
    sorted_digits(tmp_path / "x.npz", 400)
    config = configured(QUICK, data=str(tmp_path / "x.npz"))
    monkeypatch.setattr(protocols, "RANKME_SAMPLES", 100)
    train, test = open_split(config, "train"), open_split(config, "test")
    run = load_trained_run(folder, pytest.fail)
    rows = run.centre_features(train)
    sample = rankme(rows[sample_indices(400, 100, config.seed)])
    assert abs(sample / rankme(rows) - 1) < 0.05 < 1 - rankme(rows[:100]) / rankme(rows)
    with_labels = evaluate(config, folder, train, test, pytest.fail)
    assert with_labels.rankme == pytest.approx(sample, rel=1e-5) and with_labels.table
    read: list[int] = []
    batches = ArraySplit.batches
    monkeypatch.setattr(ArraySplit, "labels", lambda split: None)
    monkeypatch.setattr(
        ArraySplit,
        "batches",
        lambda split, chunks: read.extend(map(len, chunks)) or batches(split, chunks),
    )
    without = evaluate(config, folder, train, test, pytest.fail)
    assert without.rankme == pytest.approx(sample, rel=1e-5) and not without.table
    assert sum(read) == 100


def killed_after(monkeypatch: pytest.MonkeyPatch, probes: int) -> list[int]:
    """Kills an evaluation after some probes; the calls so far."""
    calls: list[int] = []
    original = ProbedFeatures.probe

    def probe(*arguments: Any, **named: Any) -> Any:
        if len(calls) == probes:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments, **named)

    monkeypatch.setattr(ProbedFeatures, "probe", probe)
    return calls


def test_a_killed_evaluation_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, once with a file cut short as by a power failure; never with another run's results."""
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    expected, rank = evaluate_run(run)
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(run)
    (left,) = run.glob("evaluation-*")
    with monkeypatch.context() as patch:
        calls = killed_after(patch, 5)
        patch.setattr(protocols, "extract", pytest.fail)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(run)
        assert len(calls) == 5  # of 12: none of the 4 was fitted again
    (left / "features.pt").write_bytes((left / "features.pt").read_bytes()[:1000])
    with monkeypatch.context() as patch:
        calls = killed_after(patch, 12)
        assert evaluate_run(run) == (expected, rank) and len(calls) == 3
    assert not list(run.glob("evaluation-*"))
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(run)
    with monkeypatch.context() as patch:
        calls = killed_after(patch, 12)
        evaluate_run(run, probes={"linear": PROBES["ridge"]}, labels_used=(None,))
        assert len(calls) == 3  # two of these cells were there, by another probe
    assert not list(run.glob("evaluation-*"))


def test_results_that_cannot_be_saved_are_logged_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    logged: list[str] = []
    assert evaluate_run(run, logged.append) == evaluate_run(folder)
    assert len(logged) == 1 and "cannot resume if it is interrupted: [Errno 28]" in logged[0]
    assert not list(run.glob("evaluation-*"))


def test_a_run_without_evaluation_is_evaluated_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--epochs", "1", "--warmup-epochs", "0", "--backbone", "fastnet-8"]
    flags += ["--label-draws", "1", "--no-eval", "--run", str(run)]
    assert cli.run(["train", "digits-diet", *flags]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"not evaluated: `fastssl eval {run}` does it" in out and "RankMe" not in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy"] == {} and summary["rankme"] is None
    assert (run / "backbone.safetensors").is_file()
    assert cli.run(["eval", str(run)]) == 0
    assert "RankMe of the pretrained features" in capsys.readouterr().out
    later = json.loads((run / "summary.json").read_text())
    assert later["accuracy"]["pretrained"]["linear_all"]["mean"] > 0.7 and later["rankme"] > 1
    changed = {name for name in summary if later[name] != summary[name]}
    assert changed == {"accuracy", "rankme", "evaluate_s"}


def test_without_a_test_part_there_is_no_accuracy(tmp_path: Path) -> None:
    """All images train, and the spectrum is measured on them."""
    summary = pretrain(configured(QUICK, holdout=0.0), tmp_path / "run", lambda line: None)
    assert summary["images"] == 1797 and summary["accuracy"] == {} and summary["rankme"] > 1
    for name in ("neutral", "multiview"):
        with pytest.raises(ValueError, match=r"has no test part, so no probe can be evaluated"):
            evaluate_protocol(tmp_path / "run", name, pytest.fail)


def test_progress_is_logged_while_an_evaluation_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At intervals, within a fit too; nothing where it ends sooner."""
    logged: list[str] = []
    evaluate_run(folder, logged.append, labels_used=(None,))
    assert not logged
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    slow = Probe(lambda x, y: time.sleep(0.3) or PROBES["ridge"].fit(x, y))  # type: ignore[func-returns-value]
    evaluate_run(folder, logged.append, probes={"slow": slow}, labels_used=(None,))
    fits = [line for line in logged if "slow_all of pretrained features, 3 of 6 probes" in line]
    assert len(fits) >= 3 and all(line.startswith("evaluating, 0 s: ") for line in logged[:2])
    assert threading.active_count() == len(
        [t for t in threading.enumerate() if t.name != "progress"]
    )
