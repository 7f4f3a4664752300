"""One run from Config to summary: load, train, evaluate, write."""

import json
import time
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastssl.backbones import feature_width, load_backbone, save_backbone, seeded_backbone
from fastssl.config import Config
from fastssl.data.datasets import is_encoded, load_array, load_labels, open_files
from fastssl.data.loading import Data, build_views, open_data
from fastssl.device import choose_device
from fastssl.distributed import Ranks, global_batch_norm, init_distributed, rank_batch
from fastssl.evaluation.online_knn import OnlineKNN
from fastssl.evaluation.protocols import RunFeatures, run_features, score
from fastssl.objectives import build_objective, complete
from fastssl.objectives.oracles import build_oracle, uses_oracle
from fastssl.runtime import run_dir
from fastssl.runtime.environment import provide_user, torch_defaults
from fastssl.runtime.metrics_log import plot_curves, read_metrics
from fastssl.runtime.run_lock import locked, orphaned_workers
from fastssl.schedule import fit_warmup, ramp, require_full_views
from fastssl.train import Trained, train


@torch_defaults()
def pretrain(config: Config, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Train and evaluate in `folder`; returns the contents of its summary.json.

    An unfinished run of the same config is resumed. Under torchrun every rank calls it; rank 0
    saves, logs and evaluates, the others return {}. Raises ValueError, with nothing written, where
    the folder is taken or the config does not fit the data; MemoryError, with what fits, where a
    step does not.
    """
    provide_user()
    config = run_dir.with_absolute_paths(complete(config))
    with ExitStack() as until_evaluated:
        with init_distributed(config.device) as ranks:
            log = log if ranks.is_main else _discard
            config = fit_warmup(config, log)
            run = _train(config, folder, log, ranks, until_evaluated)
            begin = time.perf_counter()
            features = run_features(config, folder, run.data.train, run.data.test, ranks)
            # Each rank has met the unreadable images of its own batches.
            skipped = dict(ChainMap(*ranks.gather_to_main(dict(run.data.skipped))))
            skipped_test = dict(ChainMap(*ranks.gather_to_main(dict(run.data.test.skipped))))
        # The probes are fitted outside the process group: they take minutes, in which a rank that
        # waited in a collective would time out.
        if not ranks.is_main:
            return {}
        return _summary(config, folder, log, run, features, (skipped, skipped_test), begin)


@dataclass(frozen=True)
class _Run:
    """A trained run: what its summary records beside the accuracy."""

    data: Data
    trained: Trained
    load_s: float
    device: torch.device
    world: int


def _train(
    config: Config, folder: Path, log: Callable[[str], None], ranks: Ranks, locks: ExitStack
) -> _Run:
    """Pretrain, save the backbone and plot the curves. `locks` takes the lock on the folder."""
    begin = time.perf_counter()
    device = choose_device(config.device)
    per_rank = replace(config, batch_size=rank_batch(config, ranks.world))
    # Checks that need no pixels come before the data, whose decoding takes minutes.
    resumed = ranks.is_main and _claim(config, folder, log, locks)
    backbone = seeded_backbone(config, device)
    if config.init:
        log(load_backbone(Path(config.init), backbone, partial=config.init_partial))
    if ranks.is_main:
        _check_data(per_rank)
    random = torch.get_rng_state()
    # Rank 0 opens the data first: an engine may convert it to a file that all ranks then read.
    if not ranks.is_main:
        ranks.barrier()
    data = open_data(per_rank, device, log, ranks)
    if ranks.is_main:
        ranks.barrier()
    torch.set_rng_state(random)  # the head's weights depend on the seed and the backbone alone
    # The oracle is the only part of training that is given labels.
    oracle = build_oracle(config, data.train.labels()) if uses_oracle(config) else None
    objective = build_objective(
        per_rank,
        features=feature_width(backbone),
        num_samples=len(data.train),
        oracle=oracle,
        group=ranks.group,
    ).to(device)
    if config.sync_batchnorm:
        backbone = global_batch_norm(backbone, ranks)
        objective = global_batch_norm(objective, ranks)
    probe = None
    if config.probe_epochs:
        probe = OnlineKNN(folder / "probes.jsonl", config, data.train, data.test, ranks)
    if ranks.is_main:  # nothing is written before everything above has been checked
        run_dir.create(folder, config)
    log(f"{'resuming' if resumed else 'run'} {folder}")
    images_per_batch = per_rank.batch_size * ranks.world
    batches = f"{len(data.pipeline)} batches of {images_per_batch} x {config.views}"
    where = f"{device}" if ranks.world == 1 else f"{ranks.world} ranks, {device.type}"
    log(f"{len(data.train)} images, {batches} views, on {where}")
    # Random layers of a network (dropout, stochastic depth) must differ from rank to rank.
    torch.manual_seed(config.seed + ranks.rank * 2**32)
    load_s = time.perf_counter() - begin
    trained = train(
        per_rank,
        data.pipeline,
        backbone,
        objective,
        folder,
        log,
        ranks=ranks,
        probe=probe,
        views_of=(lambda epoch: build_views(ramp(config, epoch))) if config.ramp_epochs else None,
    )
    if trained.steps < config.ramp_epochs * len(data.pipeline):
        log("warning: the run ended inside --ramp-epochs, before any epoch with the full views")
    if ranks.is_main and oracle:
        run_dir.write_text(folder / "oracle.json", json.dumps(oracle.log()))
    if ranks.is_main:
        save_backbone(folder / "backbone.safetensors", backbone)
        plot_curves(read_metrics(folder / "metrics.jsonl"), folder.name, folder / "curves.png")
    ranks.barrier()  # all ranks read the backbone for the evaluation
    return _Run(data, trained, load_s, device, ranks.world)


def _claim(config: Config, folder: Path, log: Callable[[str], None], locks: ExitStack) -> bool:
    """Lock the folder of a run and check what it contains; whether the run is resumed."""
    run_dir.is_resumed(folder, config)  # before the lock, which needs a folder that can be written
    locks.enter_context(locked(folder))
    if orphans := orphaned_workers():
        numbers = " ".join(map(str, orphans))
        log(f"warning: workers of a torchrun that was killed still run; `kill {numbers}` ends them")
    if not run_dir.is_resumed(folder, config):
        return False
    for line in run_dir.changes(run_dir.read_config(folder), config):
        log(line)
    return True


def _check_data(config: Config) -> None:
    """ValueError where the views, the labels or the test part would fail a run later. Nothing is
    decoded."""
    require_full_views(config)
    for epoch in (0, config.ramp_epochs):
        build_views(ramp(config, epoch))
    train = load_labels(config.data, "train", config.holdout)
    test = load_labels(config.data, "test", config.holdout)
    if uses_oracle(config):
        build_oracle(config, None if train is None else torch.from_numpy(train))
    if config.probe_epochs and (train is None or test is None):
        raise ValueError(f"--probe-epochs needs labels, and {config.data} has none; drop it")
    if not is_encoded(config.data):
        load_array(config.data, "test", config.holdout)
        return
    open_files(config.data, "test", config.holdout)
    count = len(open_files(config.data, "train", config.holdout))
    if config.batch_size > count:
        raise ValueError(
            f"--batch-size {config.batch_size} is larger than the data set of {count} images"
        )


def _summary(
    config: Config,
    folder: Path,
    log: Callable[[str], None],
    run: _Run,
    features: RunFeatures,
    skipped: tuple[Mapping[str, str], Mapping[str, str]],
    begin: float,
) -> dict[str, Any]:
    """Score the features of a trained run; write and return its summary.

    skipped: the unreadable images of the training and the test part, by name, with the reason.
    begin: when the evaluation began.
    """
    unreadable = {**skipped[0], **skipped[1]}
    if unreadable:
        log(f"skipped {len(unreadable)} unreadable images; summary.json lists them")
    table, rank = score(config, features)
    device = run.device
    summary = {
        "accuracy": {row: {k: asdict(cell) for k, cell in table[row].items()} for row in table},
        "rankme": rank,
        "load_s": round(run.load_s, 2),
        "train_s": round(run.trained.train_s, 2),
        "evaluate_s": round(time.perf_counter() - begin, 2),
        "steps": run.trained.steps,
        "views_per_s": round(_views_per_s(run.trained, folder) * run.world, 1),
        "images": run.data.train.total - len(skipped[0]),
        "unreadable": unreadable,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "ranks": run.world,
        "versions": {name: _version(name) for name in ("fastssl-torch", "torch", "triton", "timm")},
        "config": run_dir.flat(config),
    }
    run_dir.write_text(folder / "summary.json", json.dumps(summary, indent=2))
    return summary


def _views_per_s(trained: Trained, folder: Path) -> float:
    """Of this session; of the last report where the run had ended before it."""
    if trained.views_per_s:
        return trained.views_per_s
    reports = read_metrics(folder / "metrics.jsonl")
    return reports[-1]["views_per_s"] if reports else 0.0


def _discard(line: str) -> None:
    """The log of every rank but rank 0."""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
