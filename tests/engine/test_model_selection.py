"""The spectrum of finished runs, against the criteria on separately extracted features, and the
ranking of runs by each criterion."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.data.splits import ArraySplit, open_split, sample_indices
from fastssl.evaluation import model_selection
from fastssl.evaluation.model_selection import measure_quality, rank_runs, require_comparable
from fastssl.evaluation.spectrum import alpha_req, effective_rank, lidar, rankme
from fastssl.evaluation.trained_run import load_trained_run
from fastssl.objectives import configured
from fastssl.pretrain import pretrain
from fastssl.recipes import recipe_config
from fastssl.runtime.run_dir import config_to_json, read_config

SETTINGS = {"samples": 200, "images": 50, "views": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "barlow"
    quick = {"epochs": 1, "warmup_epochs": 0.0, "backbone": "fastnet-8", "label_draws": 1}
    config = recipe_config("digits-barlow", projector_width=32, **quick)  # type: ignore[arg-type]
    pretrain(config, path, lambda line: None)
    return path


def test_each_criterion_of_features_and_embeddings(folder: Path) -> None:
    measured = measure_quality(folder, pytest.fail, **SETTINGS)
    run = load_trained_run(folder, pytest.fail)
    split = open_split(run.config, "train")
    numbers, few = (sample_indices(len(split), count, run.config.seed) for count in (200, 50))
    assert run.projector is not None
    with torch.no_grad():
        centre = run.centre_features(split, numbers)
        augmented = torch.cat([rows for _, rows in run.view_features(split, 3, run.backbone, few)])
        assert augmented.shape == (50, 3, 32)
        layers = {
            "features": (centre, augmented),
            "embeddings": (run.projector(centre), run.projector(augmented.flatten(0, 1))),
        }
    assert list(measured) == list(layers)
    for layer, (one, many) in layers.items():
        expected = {
            "rankme": rankme(one),
            "effective_rank": effective_rank(one),
            "alpha_req": alpha_req(one),
            "lidar": lidar(many.view(50, 3, -1)),
        }
        assert measured[layer] == pytest.approx(expected, rel=1e-4), layer


def test_quality_is_cached_by_its_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_quality(folder, pytest.fail, **SETTINGS)
    other = measure_quality(folder, pytest.fail, **{**SETTINGS, "samples": 100})
    assert other["features"]["rankme"] != first["features"]["rankme"]
    assert other["features"]["lidar"] == first["features"]["lidar"]
    monkeypatch.setattr(model_selection, "load_trained_run", pytest.fail)
    assert measure_quality(folder, pytest.fail, **{**SETTINGS, "samples": 100}) == other


def test_samples_of_data_sorted_by_class_are_like_all_of_it(folder: Path, tmp_path: Path) -> None:
    """The same backbone on the same digits, sorted by class as a folder is: the first images are
    those of one or two classes."""
    config = read_config(folder)
    split = open_split(config, "train")
    labels = split.labels()
    assert isinstance(split, ArraySplit) and labels is not None
    order = labels.argsort(stable=True)
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    np.savez(tmp_path / "sorted.npz", x_train=split.pixels[order], x_test=split.pixels[:9])
    config = configured(config, data=str(tmp_path / "sorted.npz"))
    (run / "config.json").write_text(config_to_json(config))
    options = {"views": 3, "images": 150}
    sample = measure_quality(run, pytest.fail, samples=150, **options)["features"]
    whole = measure_quality(run, pytest.fail, samples=1438, **options)["features"]
    trained = load_trained_run(run, pytest.fail)
    first = rankme(trained.centre_features(open_split(config, "train"), torch.arange(150)))
    assert abs(sample["rankme"] / whole["rankme"] - 1) < 0.05
    assert first / whole["rankme"] < 0.85  # else the line above could not fail


def test_an_infinite_alpha_is_stored_as_valid_json(folder: Path) -> None:
    path = folder / "rank.json"
    measure_quality(folder, pytest.fail, **SETTINGS)
    stored = json.loads(path.read_text())
    stored["quality"]["features"]["alpha_req"] = None
    path.write_text(json.dumps(stored))
    assert measure_quality(folder, pytest.fail, **SETTINGS)["features"]["alpha_req"] == math.inf
    path.unlink()


def test_ranks_of_runs() -> None:
    assert rank_runs([3.0, 9.0, 5.0, 9.0], "rankme") == [4, 1, 3, 1]
    assert rank_runs([0.2, 1.1, 3.0, math.inf], "alpha_req") == [2, 1, 3, 4]  # the nearest to 1


def test_runs_of_two_methods_or_data_sets_are_refused(tmp_path: Path) -> None:
    configs = {
        "a": recipe_config("digits-barlow"),
        "b": recipe_config("digits-diet"),
        "c": recipe_config("digits-barlow", data="cifar10", lr=0.1),
        "d": recipe_config("digits-barlow", lr=0.1),
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config_to_json(config))
    require_comparable([tmp_path / "a", tmp_path / "d"])
    with pytest.raises(ValueError, match=r"differ in --method: barlow \(a\), diet \(b\)"):
        require_comparable([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=r"differ in --data: digits \(a\), cifar10 \(c\)"):
        require_comparable([tmp_path / "a", tmp_path / "c"])
