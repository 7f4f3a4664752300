"""The online probe, the target accuracy, the time budget and ramps, in runs on real digits."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastssl.backbones import seeded_backbone
from fastssl.data.splits import ArraySplit, Split, sample_indices
from fastssl.distributed import Ranks
from fastssl.evaluation import online_knn
from fastssl.evaluation.features import extract
from fastssl.evaluation.online_knn import OnlineKNN, read_probes
from fastssl.objectives import configured
from fastssl.pretrain import pretrain
from fastssl.recipes import recipe_config
from fastssl.runtime.metrics_log import read_metrics
from fastssl.schedule import TrainState
from fastssl.step import Step

SHORT = recipe_config(
    "digits-barlow", epochs=4, warmup_epochs=1.0, backbone="fastnet-8", label_draws=2
)


def silent(line: str) -> None:
    pass


def test_the_probe_changes_nothing_but_the_end(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pretrain(SHORT, tmp_path / "plain", silent)
    probed = pretrain(configured(SHORT, probe_epochs=1), tmp_path / "probed", silent)
    a, b = (load_file(tmp_path / name / "backbone.safetensors") for name in ("plain", "probed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    accuracies = read_probes(tmp_path / "probed/probes.jsonl")
    assert [x["step"] for x in accuracies] == [11, 22, 33, 44]
    assert accuracies[-1]["knn"] == probed["accuracy"]["pretrained"]["knn_all"]["mean"]
    target = accuracies[1]["knn"]
    assert accuracies[0]["knn"] < target  # else the next lines could not fail
    config = configured(SHORT, probe_epochs=1, target_accuracy=target)
    reached = pretrain(config, tmp_path / "target", silent)
    assert reached["steps"] == 22
    assert reached["accuracy"]["pretrained"]["knn_all"]["mean"] == target


def test_a_probe_without_labels_is_refused(tmp_path: Path) -> None:
    images = np.zeros((64, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", x_train=images, x_test=images)
    config = configured(SHORT, data=str(tmp_path / "plain.npz"), batch_size=32, probe_epochs=1)
    with pytest.raises(ValueError, match="--probe-epochs needs labels"):
        pretrain(config, tmp_path / "run", silent)


def test_a_probe_without_a_test_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--probe-epochs needs a test part; raise --holdout"):
        pretrain(configured(SHORT, holdout=0.0, probe_epochs=1), tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()


def test_a_probe_samples_large_parts_by_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images sorted by class; the same ones at every probe."""
    probed: list[list[int]] = []

    def recorded(split: Split, functions: Any, *, chosen: Tensor, ranks: Ranks) -> Any:
        probed.append(chosen.tolist())
        return extract(split, functions, chosen=chosen, ranks=ranks)

    monkeypatch.setattr(online_knn, "IMAGES", 40)
    monkeypatch.setattr(online_knn, "extract", recorded)
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    config = configured(SHORT, seed=5)
    parts = [ArraySplit(config, part, images) for part in ("train", "test")]  # type: ignore[arg-type]
    monkeypatch.setattr(ArraySplit, "labels", lambda split: torch.arange(70) // 7)
    probe = OnlineKNN(tmp_path / "probes.jsonl", config, *parts)
    backbone = seeded_backbone(config, torch.device("cpu"))
    for step in (1, 2):
        probe(backbone, TrainState(step=step))
    assert probed == [sample_indices(70, 40, 5).tolist()] * 4


def test_a_time_budget_is_observed(tmp_path: Path) -> None:
    begin = time.perf_counter()
    summary = pretrain(configured(SHORT, time_budget_s=2.0), tmp_path / "run", silent)
    assert 2.0 <= summary["train_s"] < 3.0 and time.perf_counter() - begin < 30
    rates = [m["lr"] for m in read_metrics(tmp_path / "run/metrics.jsonl")]
    left = min(1.0, 3 / summary["steps"])  # of the budget: the last step began that near its end
    assert rates[-1] < SHORT.lr * (1 - math.cos(math.pi * left)) / 2 < max(rates)


def test_ramps_train_few_small_views_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = Step.__call__

    def recorded(self: Step, views: Sequence[Tensor], index: Tensor, lr: float) -> Any:
        seen.append((len(views), views[0].shape[-1]))
        return step(self, views, index, lr)

    monkeypatch.setattr(Step, "__call__", recorded)
    ramped = configured(SHORT, ramp_epochs=2, start_size=8, views=4, start_views=2)
    pretrain(ramped, tmp_path / "run", silent)
    assert seen == [(2, 8)] * 11 + [(3, 12)] * 11 + [(4, 16)] * 22
