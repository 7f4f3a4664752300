"""Accuracy and training time by experiment: frozen features, the neutral protocol.

    digits     the two recipes of the README, on scikit-learn's digits
    methods    every method on 5,000 images of CIFAR-10, one small net, the same for all
    views      arXiv:2312.10725: projectors of 8192 and 256, 2 to 8 views; minutes to an accuracy
    data       the same: 2, 4 and 8 views on all, half and a quarter of the images, equal steps
    emp_ssl    arXiv:2304.03977: 1 and 10 epochs of 20 patches
    diet       DIET's claim that its training loss predicts the probe
    engines    one run on JPEGs, fed by each engine
    gpu        short CIFAR-10 runs of a ResNet-18

`python -m bench --only accuracy --match EXPERIMENT` runs one. CIFAR-10 is an .npz or a folder that
FASTSSL_CIFAR10 names, the JPEGs a folder or .tar that FASTSSL_IMAGENETTE names; experiments without
their data are skipped. On a GPU, views, data and emp_ssl take a ResNet-18 and all of CIFAR-10. What
counts as time: see bench/README.md.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastssl.config import Config
from fastssl.evaluation.online_knn import read_probes
from fastssl.objectives import configured
from fastssl.pretrain import pretrain
from fastssl.recipes import RECIPES, recipe_config
from fastssl.runtime.metrics_log import read_metrics

SEEDS = (0, 1, 2)
Named = tuple[str, Config]
Experiment = Callable[[str], Iterator[Named]]


def digits(device: str) -> Iterator[Named]:
    for name in ("digits-diet", "digits-barlow"):
        yield name, recipe_config(name)


def methods(device: str) -> Iterator[Named]:
    for name in RECIPES:
        if name.startswith("cifar-small"):
            yield name, recipe_config(name)


def _many_views(device: str) -> Config:
    """Two views and a small projector, the tuned weights of arXiv:2312.10725; as many probes on any
    device."""
    if device == "cuda":
        short = {"epochs": 20, "warmup_epochs": 2, "probe_epochs": 1}
        return recipe_config("cifar10-barlow-2-views", **short)
    return recipe_config("cifar-small-barlow", probe_epochs=2)


def views(device: str) -> Iterator[Named]:
    base = configured(_many_views(device), label_draws=2)
    for method in ("barlow", "vicreg"):
        for count, width in ((2, 8192), (2, 256), (4, 256), (8, 256)):
            config = configured(base, method=method, views=count, projector_width=width)
            yield f"{method}, {count} views, width {width}", config


def data(device: str) -> Iterator[Named]:
    base = configured(_many_views(device), label_draws=2)
    images = base.train_images or 50_000
    for share in (1, 2, 4):
        longer = {"epochs": share * base.epochs, "probe_epochs": share * base.probe_epochs}
        for count in (2, 4, 8):
            config = configured(base, views=count, train_images=images // share, **longer)
            yield f"barlow, {count} views, {images // share} images", config


def emp_ssl(device: str) -> Iterator[Named]:
    name = "cifar10-emp_ssl" if device == "cuda" else "cifar-small-emp_ssl"
    for epochs in (1, 10):
        yield f"{name}, {epochs} epochs", recipe_config(name, epochs=epochs, label_draws=2)


def diet(device: str) -> Iterator[Named]:
    yield (
        "digits-diet, probed",
        recipe_config("digits-diet", probe_epochs=2, log_every=11, label_draws=2),
    )


def engines(device: str) -> Iterator[Named]:
    """load_size: what every image of the subset has, so that all engines crop the same pixels."""
    base = recipe_config("barlow-cpu", load_size=224, epochs=15, label_draws=2)
    for engine in ("resident", "dali", "ffcv"):
        yield f"barlow-cpu, 15 epochs, {engine}", configured(base, engine=engine)


def gpu(device: str) -> Iterator[Named]:
    fast: dict[str, Any] = {"precision": "bfloat16", "epochs": 20, "warmup_epochs": 2}
    for name in ("cifar10-barlow", "cifar10-vicreg", "cifar10-diet"):
        yield f"{name}, 20 epochs", recipe_config(name, **fast, probe_epochs=1)


def runs(device: str) -> Iterator[tuple[str, str, Config]]:
    """(experiment, name, Config), the fastest and most informative first, all seeds of one case
    together; on a GPU, where a budget is short, one seed after another."""
    cifar, jpegs = os.environ.get("FASTSSL_CIFAR10"), os.environ.get("FASTSSL_IMAGENETTE")
    handwritten = "digits" if find_spec("sklearn") else None
    cuda = device == "cuda"
    experiments: dict[Experiment, str | None] = {gpu: cifar} if cuda else {}
    experiments |= {digits: handwritten, diet: handwritten, emp_ssl: cifar, views: cifar}
    experiments |= {data: cifar, methods: cifar, engines: jpegs}
    cases = [
        (experiment.__name__, name, configured(config, device=device, data=where))
        for experiment, where in experiments.items()
        if where
        for name, config in experiment(device)
    ]
    order = product(SEEDS, cases) if cuda else ((seed, case) for case in cases for seed in SEEDS)
    for seed, (experiment, name, config) in order:
        yield experiment, name, configured(config, seed=seed)


def rows(device: str, end: float, match: str) -> Iterator[dict[str, Any]]:
    """One row per run: seconds, accuracies, online probes. A run is started only while time is
    left."""
    for experiment, name, config in runs(device):
        if match not in f"{experiment}: {name}" or time.monotonic() >= end:
            continue
        head = {
            "experiment": experiment,
            "case": name,
            "parameters": {
                "seed": config.seed,
                "epochs": config.epochs,
                "views": config.views,
                "width": getattr(config.objective, "projector_width", None),
                "images": config.train_images,
                "threads": torch.get_num_threads(),
            },
        }
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            try:
                summary = pretrain(config, run, lambda line: None)
            except Exception as error:  # the next run may succeed
                yield {**head, "failed": f"{type(error).__name__}: {error}"}
                continue
            losses = {m["step"]: m["loss"] for m in read_metrics(run / "metrics.jsonl")}
            probes = [
                {**probe, "loss": losses.get(int(probe["step"]))}
                for probe in read_probes(run / "probes.jsonl")
            ]
        accuracy = {
            f"{row}_{probe}": cells[probe]["mean"]
            for row, cells in summary["accuracy"].items()
            for probe in cells
        }
        times = {name: summary[name] for name in ("load_s", "train_s", "evaluate_s", "views_per_s")}
        yield {**head, **times, "steps": summary["steps"], **accuracy, "probes": probes}
