"""Accuracy and the seconds it took: recipes trained from scratch, frozen features, the neutral
protocol.

Runs on the digits where scikit-learn is installed, and on CIFAR-10 where FASTSSL_CIFAR10 names an
.npz.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastssl.config import Config
from fastssl.pretrain import pretrain
from fastssl.recipes import RECIPES

SEEDS = (0, 1, 2)


def configs(device: str) -> Iterator[tuple[str, Config]]:
    """(name, Config), the quickest first: the digits recipes, then short CIFAR-10 runs on a GPU."""
    if find_spec("sklearn"):
        for seed in SEEDS:
            for name in ("digits-diet", "digits-barlow"):
                yield name, replace(RECIPES[name], seed=seed, device=device)
    data = os.environ.get("FASTSSL_CIFAR10")
    if data and device == "cuda":
        fast = {
            "data": data,
            "device": device,
            "precision": "bfloat16",
            "epochs": 20,
            "warmup_epochs": 2,
        }
        for name in ("cifar10-barlow", "cifar10-vicreg", "cifar10-diet"):
            yield f"{name}, 20 epochs", replace(RECIPES[name], **fast)


def rows(device: str, end: float, match: str) -> Iterator[dict[str, Any]]:
    """One row per run: seconds and accuracies. A run is started only while there is time left."""
    for name, config in configs(device):
        if match not in name or time.monotonic() >= end:
            continue
        head = {
            "case": name,
            "parameters": {"seed": config.seed, "epochs": config.epochs, "views": config.views},
        }
        with tempfile.TemporaryDirectory() as folder:
            try:
                summary = pretrain(config, Path(folder) / "run", lambda line: None)
            except (ValueError, RuntimeError, ArithmeticError) as error:
                yield {**head, "failed": f"{type(error).__name__}: {error}"}
                continue
        accuracy = {
            f"{row}_{probe}": cells[probe]["mean"]
            for row, cells in summary["accuracy"].items()
            for probe in cells
        }
        times = {name: summary[name] for name in ("load_s", "train_s", "evaluate_s", "views_per_s")}
        yield {**head, **times, **accuracy}
