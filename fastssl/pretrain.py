"""One run from Config to summary: load, train, evaluate, write; and the evaluation again from the
folder alone."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.config import Config, read_config
from fastssl.data.datasets import Images
from fastssl.data.loading import (
    SPLITS,
    Data,
    build_views,
    centre_features,
    choose_device,
    load_split,
    open_data,
    seeded_backbone,
    split_labels,
    unreadable,
)
from fastssl.distributed import Ranks, global_batch_norm, joined_ranks, rank_batch
from fastssl.evaluation.online_knn import OnlineProbe
from fastssl.evaluation.probes import (
    LABELS_PER_CLASS,
    NEUTRAL,
    Accuracy,
    Probe,
    Shares,
    evaluate_features,
    raw_pixels,
)
from fastssl.evaluation.spectrum import rankme
from fastssl.objectives import build_objective
from fastssl.objectives.oracles import Oracle, build_oracle
from fastssl.runtime import run_dir
from fastssl.runtime.checkpoint import load_backbone, save_backbone
from fastssl.runtime.metrics_log import draw_curves, read_metrics
from fastssl.schedule import ramp
from fastssl.train import Trained, train

RANKME_SAMPLES = 25_600  # enough, says arXiv:2210.02885, appendix G
PROBE_IMAGES = 10_000  # of each split, at most, that the online probe looks at
Table = dict[
    str, dict[str, Accuracy]
]  # "raw pixels" | "untrained" | "pretrained" -> name -> accuracy


def pretrain(config: Config, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and evaluate in `folder`; returns what its summary.json then holds.

    An unfinished run of the same config is resumed. Under torchrun every rank calls it; the first
    writes, speaks and evaluates, the others return {}. Raises ValueError, with nothing written,
    where the folder is taken or the config and the data do not fit together.
    """
    with ExitStack() as until_evaluated:
        with joined_ranks(config.device) as ranks:
            say = say if ranks.first else _silent
            run = _train(config, folder, say, ranks, until_evaluated)
        return _evaluated(config, folder, say, run) if ranks.first else {}


@dataclass(frozen=True)
class _Run:
    """A trained run: what is told of it beside its accuracy."""

    data: Data
    trained: Trained
    load_s: float
    device: torch.device
    world: int


def _train(
    config: Config, folder: Path, say: Callable[[str], None], ranks: Ranks, holds: ExitStack
) -> _Run:
    """Pretrain, save the backbone and draw the curves. `holds` keeps the folder's lock."""
    begin = time.perf_counter()
    resumed = ranks.first and run_dir.is_resumed(folder, config)
    device = choose_device(config.device)
    own = replace(config, batch_size=rank_batch(config, ranks.world))
    if not ranks.first:
        ranks.most(0)  # the first rank reads first, and writes what engines keep beside the data
    data = open_data(own, device, say, ranks)
    if ranks.first:
        ranks.most(0)
    backbone = seeded_backbone(config, device)
    if config.init:
        say(load_backbone(Path(config.init), backbone, partial=config.init_partial))
    features: int = backbone.num_features  # type: ignore[assignment]
    oracle = _oracle(config, data) if config.oracle != "none" else None
    objective = build_objective(
        own, features=features, num_samples=len(data.images), oracle=oracle, group=ranks.group
    ).to(device)
    if config.sync_batchnorm:
        backbone = global_batch_norm(backbone, ranks)
        objective = global_batch_norm(objective, ranks)
    probe = _online_probe(config, data, folder) if ranks.first else None
    if ranks.first:  # all that can be wrong has been found
        run_dir.create(folder, config)
        holds.enter_context(run_dir.held(folder))
    say(f"{'resuming' if resumed else 'run'} {folder}")
    batches = f"{len(data.pipeline)} batches of {own.batch_size * ranks.world} x {config.views}"
    where = f"{device}" if ranks.world == 1 else f"{ranks.world} ranks, {device.type}"
    say(f"{len(data.images)} images, {batches} views, on {where}")
    torch.manual_seed(config.seed + ranks.rank * 2**32)  # what a network draws differs by rank
    load_s = time.perf_counter() - begin
    trained = train(
        *(own, data.pipeline, backbone, objective, folder, say),
        ranks=ranks,
        probe=probe,
        views_of=(lambda epoch: build_views(ramp(config, epoch))) if config.ramp_epochs else None,
    )
    if ranks.first and oracle:
        run_dir.write_text(folder / "oracle.json", json.dumps(oracle.log()))
    if ranks.first:
        save_backbone(folder / "backbone.safetensors", backbone)
        draw_curves(read_metrics(folder / "metrics.jsonl"), folder.name, folder / "curves.png")
    return _Run(data, trained, load_s, device, ranks.world)


def _evaluated(
    config: Config, folder: Path, say: Callable[[str], None], run: _Run
) -> dict[str, Any]:
    """Evaluate a trained run; write and return its summary."""
    begin, data, device = time.perf_counter(), run.data, run.device
    left_out = {**data.left_out, **unreadable(data.pipeline)}
    if left_out:
        say(f"{len(left_out)} unreadable images were left out; summary.json names them")
    table, rank = evaluate(config, folder, data.images, left_out=data.left_out)
    summary = {
        "accuracy": {row: {k: asdict(cell) for k, cell in table[row].items()} for row in table},
        "rankme": rank,
        "load_s": round(run.load_s, 2),
        "train_s": round(run.trained.train_s, 2),
        "evaluate_s": round(time.perf_counter() - begin, 2),
        "steps": run.trained.steps,
        "views_per_s": round(run.trained.views_per_s * run.world, 1),
        "images": len(data.images),
        "unreadable": left_out,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "ranks": run.world,
        "versions": {name: _version(name) for name in ("fastssl-torch", "torch", "triton", "timm")},
        "config": asdict(config),
    }
    run_dir.write_text(folder / "summary.json", json.dumps(summary, indent=2))
    return summary


def _oracle(config: Config, data: Data) -> Oracle:
    """The oracle of `config`, which alone is given the training images' labels."""
    labels = split_labels(config, "train", len(data.images), data.left_out)
    return build_oracle(config, labels)


def _silent(line: str) -> None:
    """What the ranks behind the first have to say."""


def _online_probe(config: Config, data: Data, folder: Path) -> OnlineProbe | None:
    """The probe that `config.probe_epochs` asks for; ValueError where the data has no labels."""
    if not config.probe_epochs:
        return None
    left_out = dict(data.left_out)
    test_images = load_split(config, "test", left_out)
    splits = zip(SPLITS, (data.images, test_images), strict=True)
    labels = [split_labels(config, split, len(rows), left_out) for split, rows in splits]
    if labels[0] is None or labels[1] is None:
        raise ValueError(f"--probe-epochs needs labels, and {config.data} has none; drop it")
    steps = [max(1, len(images) // PROBE_IMAGES) for images in (data.images, test_images)]
    images = [data.images[:: steps[0]], test_images[:: steps[1]]]

    def extract(backbone: nn.Module) -> tuple[Tensor, Tensor]:
        train, test = (centre_features(config, backbone, x) for x in images)
        return train, test

    chosen = tuple(
        torch.from_numpy(x[::step]) for x, step in zip(labels, steps, strict=True) if x is not None
    )
    return OnlineProbe(
        *(folder / "probes.jsonl", extract, (chosen[0], chosen[1])),
        k=config.knn_k,
        temperature=config.knn_temperature,
    )


def evaluate(
    config: Config,
    folder: Path,
    train_images: Images,
    left_out: dict[str, str],
    *,
    probes: Mapping[str, Probe] = NEUTRAL,
    labels_used: Sequence[Shares] = LABELS_PER_CLASS,
) -> tuple[Table, float]:
    """(the accuracy table, empty where the data has no labels; RankMe of the pretrained features).

    `train_images` is the training part of the run's data; the test part is read here.
    `left_out` names the unreadable ones, which have no row in it.
    """
    device = choose_device(config.device)
    left_out = dict(left_out)
    test_images = load_split(config, "test", left_out)
    backbone = seeded_backbone(config, device)

    def features(images: Images) -> Tensor:
        return centre_features(config, backbone, images)

    rows = {"raw pixels": (raw_pixels(train_images), raw_pixels(test_images))}
    rows["untrained"] = features(train_images), features(test_images)
    load_backbone(folder / "backbone.safetensors", backbone)
    rows["pretrained"] = features(train_images), features(test_images)
    rank = rankme(rows["pretrained"][0][:RANKME_SAMPLES])
    splits = zip(SPLITS, (train_images, test_images), strict=True)
    labels = [split_labels(config, split, len(rows), left_out) for split, rows in splits]
    if labels[0] is None or labels[1] is None:
        return {}, rank
    train_labels, test_labels = torch.from_numpy(labels[0]), torch.from_numpy(labels[1])
    table = {}
    for row, (train_x, test_x) in rows.items():
        table[row] = evaluate_features(
            *(train_x, train_labels, test_x, test_labels),
            k=config.knn_k,
            temperature=config.knn_temperature,
            draws=config.label_draws,
            probes=probes,
            labels=labels_used,
        )
    return table, rank


def evaluate_folder(
    folder: Path,
    *,
    probes: Mapping[str, Probe] = NEUTRAL,
    labels_used: Sequence[Shares] = LABELS_PER_CLASS,
) -> tuple[Table, float]:
    """`evaluate` of a finished run, from its folder alone."""
    config = read_config(folder)
    left_out: dict[str, str] = {}
    images = load_split(config, "train", left_out)
    return evaluate(config, folder, images, left_out, probes=probes, labels_used=labels_used)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
