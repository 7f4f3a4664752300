"""Engines that decode as they go: memory that does not grow with the data set, evaluation that sees
the same features, images that turn out to be unreadable on the way."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastssl.data.splits import ArraySplit, FileSplit, open_split
from fastssl.distributed import SINGLE_PROCESS, Ranks
from fastssl.evaluation.features import extract, raw_pixels
from fastssl.objectives import configured
from fastssl.pretrain import pretrain
from fastssl.recipes import recipe_config
from fastssl.runtime.metrics_log import read_metrics
from fastssl.step import equal_rows
from fastssl_pipelines import Batch
from fastssl_pipelines.engines.streaming import StreamingPipeline
from tests.helpers.gloo import on_ranks
from tests.helpers.requires import needs

QUICK = {
    "backbone": "fastnet-8",
    "image_size": 16,
    "load_size": 32,
    "epochs": 1,
    "warmup_epochs": 0.0,
    "label_draws": 1,
    "projector_width": 32,
    "batch_size": 64,
}
PEAK = """
import resource, sys
from fastssl.cli import run
code = run(sys.argv[1:])
print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def jpegs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """100 photographs of Imagenette."""
    folder = tmp_path_factory.mktemp("jpegs")
    with tarfile.open(data / "imagenette-224-1000.tar") as tar:
        members = [m for m in tar if m.isfile()][::10]
        tar.extractall(folder, members, filter="data")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copies(jpegs: list[Path], count: int, folder: Path) -> Path:
    """`count` names of these photographs, in class folders."""
    for k in range(count):
        source = jpegs[k % len(jpegs)]
        target = folder / source.parent.name / f"{k:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(source)
    return folder


def peak_mib(data: Path, run: Path, engine: str) -> float:
    """Of `fastssl train barlow-cpu` in a process of its own."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    command = [sys.executable, "-c", PEAK, "train", "barlow-cpu", f"--engine={engine}", *flags]
    command += [f"--data={data}", f"--run={run}"]
    # One arena: with several, what malloc keeps differs by some percent from run to run.
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("peak_kib ")[2]) / 1024


@pytest.mark.slow
@needs("nvidia.dali")
def test_memory_does_not_grow_with_the_data_set(jpegs: list[Path], tmp_path: Path) -> None:
    """Training and evaluation with labels, of 1,000 and of 8,000 images."""
    few, many = (
        peak_mib(copies(jpegs, count, tmp_path / str(count)), tmp_path / f"run-{count}", "dali")
        for count in (1000, 8000)
    )
    assert many < 1.05 * few, (few, many)


@needs("nvidia.dali")
def test_no_more_than_the_batches_in_flight_are_decoded(
    jpegs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a run decodes nothing; the first batch no more than a few batches."""
    from fastssl.data.loading import open_data
    from fastssl_pipelines.sources.image_files import Encoded

    read: list[int] = []
    original = Encoded.read
    monkeypatch.setattr(Encoded, "read", lambda self, i: read.append(i) or original(self, i))
    folder = copies(jpegs, 600, tmp_path / "x")
    config = recipe_config("barlow-cpu", **QUICK, data=str(folder), engine="dali")
    opened = open_data(config, torch.device("cpu"), print)
    assert not read
    epoch = opened.pipeline.epoch(0)
    next(epoch)
    assert 64 <= len(read) <= 4 * 64
    epoch.close()  # its threads read ahead
    split = opened.train.batches(opened.train.chunks(16))
    read.clear()
    next(split)
    assert 16 <= len(read) <= 16 + 4 * (os.cpu_count() or 1)


def test_streamed_features_are_those_of_held_images(jpegs: list[Path], tmp_path: Path) -> None:
    folder = copies(jpegs, 300, tmp_path / "x")
    config = recipe_config("barlow-cpu", **QUICK, data=str(folder))
    held, streamed = (open_split(config, "train", hold=hold) for hold in (True, False))
    assert isinstance(held, ArraySplit) and isinstance(streamed, FileSplit)
    (numbers, rows), (_, expected) = (extract(s, {"raw": raw_pixels}) for s in (streamed, held))
    assert torch.equal(numbers, torch.arange(len(held)))
    assert torch.equal(rows["raw"], expected["raw"])
    chosen = torch.tensor([5, 3, 200])
    numbers, rows = extract(streamed, {"raw": raw_pixels}, chosen=chosen)
    assert torch.equal(numbers, chosen) and torch.equal(rows["raw"], expected["raw"][chosen])


def features_of_ranks(rank: int, world: int, data: str) -> tuple[Tensor, Tensor]:
    import torch.distributed as dist

    ranks = SINGLE_PROCESS if world == 1 else Ranks(rank, world, dist.group.WORLD, dist.group.WORLD)
    config = recipe_config("barlow-cpu", **QUICK, data=data)
    numbers, rows = extract(open_split(config, "train"), {"raw": raw_pixels}, ranks=ranks)
    return numbers, rows.get("raw", torch.empty(0))


def test_ranks_share_the_extraction(jpegs: list[Path], tmp_path: Path) -> None:
    """Rank 0 has what one process has, in its order; the others nothing."""
    data = str(copies(jpegs, 900, tmp_path / "x"))  # 720 of training: three batches
    numbers, rows = features_of_ranks(0, 1, data)
    (first, first_rows), *others = on_ranks(2, features_of_ranks, data)
    assert torch.equal(first, numbers) and torch.equal(first_rows, rows) and len(rows) == 720
    assert all(len(n) == 0 and len(r) == 0 for n, r in others)


class Streamed(StreamingPipeline):
    """Stands for any engine that decodes as it goes."""

    def __init__(self) -> None:
        pass

    def _decoded(self, *arguments: Any) -> Any:
        raise NotImplementedError


def rows_of_ranks(rank: int, world: int) -> list[int]:
    """The images that a rank trains on, where its batch has 5 - rank rows."""
    import torch.distributed as dist

    ranks = Ranks(rank, world, dist.group.WORLD, dist.group.WORLD)
    index = torch.arange(5 - rank) + 10 * rank
    batch = Batch([index.float().view(-1, 1, 1, 1)] * 2, index)
    cut = equal_rows(batch, Streamed(), ranks)
    assert all(torch.equal(view.flatten(), cut.index.float()) for view in cut.views)
    return cut.index.tolist()


def test_ranks_train_on_equal_rows() -> None:
    """A rank whose image cannot be read has a shorter batch; most losses gather equal ones."""
    assert on_ranks(3, rows_of_ranks) == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    whole = Batch([torch.zeros(5, 3, 2, 2)], torch.arange(5))
    assert equal_rows(whole, Streamed(), SINGLE_PROCESS) is whole


def train_two_ranks(rank: int, world: int, data: str, folder: str) -> dict[str, Any]:
    small = {**QUICK, "global_batch": 64, "data": data, "engine": "dali", "corrupt_quota": 0.2}
    small.pop("batch_size")
    return pretrain(recipe_config("barlow-cpu", **small), Path(folder), lambda line: None)


@pytest.mark.slow
@needs("nvidia.dali")
def test_two_ranks_stream_with_unreadable_images(jpegs: list[Path], tmp_path: Path) -> None:
    folder = copies(jpegs, 200, tmp_path / "x")
    some = sorted(folder.rglob("*.jpg"))[::50]
    for path in some:
        path.unlink()
        path.write_bytes(b"\xff\xd8\xff not a picture")
    summary, nothing = on_ranks(2, train_two_ranks, str(folder), str(tmp_path / "run"))
    assert nothing == {} and summary["ranks"] == 2 and summary["steps"] == 2
    assert set(summary["unreadable"]) == {str(path) for path in some}


@needs("nvidia.dali", "ffcv")
@pytest.mark.parametrize("engine", ["dali", "ffcv", "resident"])
def test_an_unreadable_image_is_left_out_everywhere(
    engine: str, jpegs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the training, of the evaluation and of its labels; and named once, in the summary."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = copies(jpegs, 400, tmp_path / "x")
    some = sorted(folder.rglob("*.jpg"))[::80]
    for path in some:
        path.unlink()
        path.write_bytes(b"\xff\xd8\xff not a picture")
    config = recipe_config(
        "barlow-cpu", **QUICK, data=str(folder), engine=engine, corrupt_quota=0.2, knn_k=1
    )
    summary = pretrain(config, tmp_path / "run", lambda line: None)
    names = set(summary["unreadable"])
    assert names == {str(path) for path in some}
    of_training = names & set(open_split(config, "train").files.names)  # type: ignore[attr-defined]
    assert of_training and summary["images"] == 320 - len(of_training)
    # A test image's nearest neighbour is a copy of it: labels of other images would show.
    assert summary["accuracy"]["raw pixels"]["knn_all"]["mean"] > 0.9
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    with pytest.raises(ValueError, match="cannot be read as an image"):
        stopped = configured(config, on_corrupt="stop", run=str(tmp_path / "other"))
        pretrain(stopped, tmp_path / "other", lambda line: None)


def test_views_of_several_sizes_train_by_name(jpegs: list[Path], tmp_path: Path) -> None:
    """--policy dino: two global views and local ones of 96 / 224 of their size."""
    from fastssl.data.loading import build_views

    folder = copies(jpegs, 100, tmp_path / "x")
    small = {**QUICK, "image_size": 28, "batch_size": 16, "data": str(folder)}
    config = recipe_config("barlow-cpu", **small, policy="dino", views=4)
    assert [view.size for view in build_views(config)] == [28, 28, 12, 12]
    summary = pretrain(config, tmp_path / "run", lambda line: None)
    losses = [m["loss"] for m in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert summary["steps"] == 5 and np.isfinite(losses).all()
