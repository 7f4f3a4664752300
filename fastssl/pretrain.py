"""One run from Config to summary: load, train, evaluate, write."""

import json
import time
from collections import ChainMap
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.backbones import feature_width, seeded_backbone
from fastssl.config import Config
from fastssl.data.arrays import Labels
from fastssl.data.datasets import (
    Part,
    class_names,
    file_labels,
    is_encoded,
    load_array,
    load_labels,
    open_files,
)
from fastssl.data.loading import Data, build_views, open_data, size_step
from fastssl.device import choose_device, resolved
from fastssl.distributed import Ranks, global_batch_norm, init_distributed, rank_batch
from fastssl.evaluation.online_knn import OnlineKNN, read_probes
from fastssl.evaluation.protocols import Evaluation, evaluate, evaluation_summary
from fastssl.objectives import build_objective, complete
from fastssl.objectives.oracles import build_oracle, uses_oracle
from fastssl.runtime import run_dir
from fastssl.runtime.environment import provide_user, torch_defaults
from fastssl.runtime.metrics_log import plot_curves, read_metrics
from fastssl.runtime.run_lock import locked, orphaned_workers
from fastssl.runtime.run_log import RunLog, discard
from fastssl.runtime.weights import FILE, Metadata, initialise, save_backbone
from fastssl.schedule import fit_warmup, ramp, require_full_views
from fastssl.train import Trained, train

PARTS: tuple[Part, Part] = ("train", "test")
PROBES = "probes.jsonl"  # of a run folder


@torch_defaults()
def pretrain(config: Config, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Train and evaluate in `folder`; returns the contents of its summary.json.

    An unfinished run of the same config is resumed, within its evaluation too. Under torchrun
    every rank calls it: all train and evaluate; rank 0 saves and logs, the others return {}. Raises
    ValueError, with nothing written, where the folder is taken or the config does not fit the data;
    MemoryError, with what fits, where a step does not.
    """
    provide_user()
    config = run_dir.with_absolute_paths(resolved(complete(config)))
    with ExitStack() as until_evaluated, init_distributed(config.device) as ranks:
        log = until_evaluated.enter_context(RunLog(log if ranks.is_main else discard))
        config = fit_warmup(config, log)
        run = _train(config, folder, log, ranks, until_evaluated)
        begin = time.perf_counter()
        found = None
        if config.eval:
            found = evaluate(config, folder, run.data.train, run.data.test, log, ranks=ranks)
        # Each rank has met the unreadable images of its own batches.
        skipped = dict(ChainMap(*ranks.gather(dict(run.data.skipped))))
        return _summary(config, folder, log, run, found, skipped, begin) if ranks.is_main else {}


@dataclass(frozen=True)
class _Run:
    """A trained run: what its summary records beside the accuracy."""

    data: Data
    trained: Trained
    load_s: float
    device: torch.device
    world: int


def _train(config: Config, folder: Path, log: RunLog, ranks: Ranks, locks: ExitStack) -> _Run:
    """Pretrain, save the backbone and plot the curves. `locks` takes the lock on the folder."""
    begin = time.perf_counter()
    device, step = choose_device(config.device), size_step(config)
    per_rank = replace(config, batch_size=rank_batch(config, ranks.world))
    # Checks that need no pixels come before the data, whose decoding takes minutes.
    resumed = ranks.is_main and _claim(config, folder, log, locks)
    backbone = seeded_backbone(config, device)
    if config.init:
        log(initialise(config, backbone))
    if ranks.is_main:
        _check_data(per_rank, step)
    random = torch.get_rng_state()
    with log.doing("loading the data"):
        data = open_data(per_rank, device, log, ranks)
    torch.set_rng_state(random)  # the head's weights depend on the seed and the backbone alone
    # The oracle is the only part of training that is given labels.
    oracle = build_oracle(config, data.train.labels()) if uses_oracle(config) else None
    objective = build_objective(
        per_rank,
        features=feature_width(backbone, config.image_size),
        num_samples=len(data.train),
        oracle=oracle,
        group=ranks.group,
    ).to(device)
    if config.sync_batchnorm:
        backbone = global_batch_norm(backbone, ranks)
        objective = global_batch_norm(objective, ranks)
    probe = None
    if config.probe_epochs:
        probe = OnlineKNN(folder / PROBES, config, data.train, data.test, ranks)
    if ranks.is_main:  # nothing is written before everything above has been checked
        run_dir.create(folder, config)
        log.write_to(folder / "log.txt")
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
        views_of=(lambda e: build_views(ramp(config, e, step))) if config.ramp_epochs else None,
    )
    if trained.steps < config.ramp_epochs * len(data.pipeline):
        log("warning: the run ended inside --ramp-epochs, before any epoch with the full views")
    if ranks.is_main and oracle:
        run_dir.write_text(folder / "oracle.json", json.dumps(oracle.log()))
    if ranks.is_main:
        save_backbone(folder / FILE, backbone, _metadata(config, backbone))
        metrics, probes = read_metrics(folder / "metrics.jsonl"), read_probes(folder / PROBES)
        plot_curves(metrics, folder.name, folder / "curves.png", probes)
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


def _check_data(config: Config, size_step: int) -> None:
    """ValueError where the views, the labels or the test part would fail a run later. Nothing is
    decoded."""
    require_full_views(config)
    for epoch in (0, config.ramp_epochs):
        build_views(ramp(config, epoch, size_step))
    reads_labels = config.eval or config.probe_epochs or uses_oracle(config)
    if not is_encoded(config.data):
        if reads_labels:
            train, test = (load_labels(config.data, part, config.holdout) for part in PARTS)
            _check_labels(config, train, test)
        load_array(config.data, "test", config.holdout)
        return
    files, test_files = (
        open_files(config.data, part, config.holdout, config.image_key) for part in PARTS
    )
    if reads_labels:
        _check_labels(config, file_labels(files), file_labels(test_files))
    if config.batch_size > len(files):
        raise ValueError(
            f"--batch-size {config.batch_size} is larger than the data set of {len(files)} images"
        )


def _check_labels(config: Config, train: Labels | None, test: Labels | None) -> None:
    """ValueError where the probe or the oracle could not use these labels."""
    if uses_oracle(config):
        build_oracle(config, None if train is None else torch.from_numpy(train))
    if config.probe_epochs and test is not None and not len(test):
        raise ValueError("--probe-epochs needs a test part; raise --holdout")
    if config.probe_epochs and (train is None or test is None):
        raise ValueError(f"--probe-epochs needs labels, and {config.data} has none; drop it")


def _metadata(config: Config, backbone: nn.Module) -> Metadata:
    """What the backbone's file says of it; of paths the last part alone, since it is handed on."""
    view, recipe = build_views(config)[0], run_dir.flat(config)
    del recipe["run"]
    paths = {name: Path(recipe[name]).name for name in ("data", "init")}
    return Metadata(
        architecture=config.backbone,
        stem=config.stem,
        image_size=config.image_size,
        features=feature_width(backbone, config.image_size),
        mean=view.mean,
        std=view.std,
        classes=class_names(config.data),
        recipe=recipe | paths,
    )


def _summary(
    config: Config,
    folder: Path,
    log: Callable[[str], None],
    run: _Run,
    found: Evaluation | None,
    skipped: dict[str, str],
    begin: float,
) -> dict[str, Any]:
    """Write and return the summary of a trained run and its evaluation, if any.

    skipped: the unreadable images that training met, by name, with the reason. begin: when the
    evaluation began.
    """
    of_training, of_test = found.skipped if found else ({}, {})
    of_training = {**skipped, **of_training}
    unreadable = {**of_training, **of_test}
    if unreadable:
        log(f"skipped {len(unreadable)} unreadable images; summary.json lists them")
    device = run.device
    summary = {
        **evaluation_summary(found, time.perf_counter() - begin),
        "probes": read_probes(folder / PROBES),
        "load_s": round(run.load_s, 2),
        "train_s": round(run.trained.train_s, 2),
        "steps": run.trained.steps,
        "views_per_s": round(_views_per_s(run.trained, folder) * run.world, 1),
        "images": run.data.train.total - len(of_training),
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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
