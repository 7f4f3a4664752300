"""Time to one kNN accuracy against lightly, and where the gain comes from, step by step.

    python -m bench.against_lightly OUT.jsonl [--images 5000] [--epochs 10] [--seed 0]

Barlow Twins on CIFAR-10 (FASTSSL_CIFAR10), one net, one optimizer and schedule, one probe, one
machine. The first variant has lightly's transform and loss and a DataLoader with 2 workers; each
further one changes one thing. All use the same loop, whose overhead `bench.suites.loop_overhead`
measures. The target is the accuracy of lightly's run after 3/4 of its epochs. The time of probes is
not counted (README.md).
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.experiments import time_to
from bench.measure import environment
from bench.suites.train_step import resident
from fastssl.backbones import feature_width, seeded_backbone
from fastssl.config import Config
from fastssl.data.datasets import Images
from fastssl.data.loading import build_views
from fastssl.data.splits import ArraySplit, open_split
from fastssl.evaluation.online_knn import OnlineKNN, read_probes
from fastssl.objectives import build_objective, configured
from fastssl.objectives.base import ProjectedObjective
from fastssl.recipes import recipe_config
from fastssl.train import train
from fastssl_pipelines import Batch, View

CPU = torch.device("cpu")


class LightlyViews(Dataset):  # type: ignore[type-arg]
    """Two views of each image by lightly's SimCLR transform, as its CIFAR-10 examples set it."""

    def __init__(self, images: Images, view: View):
        from lightly.transforms import SimCLRTransform

        self._images = images
        self._transform = SimCLRTransform(
            input_size=view.size,
            cj_strength=0.5,
            gaussian_blur=0.0,
            normalize={"mean": list(view.mean), "std": list(view.std)},
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._images[index])), index


class LightlyPipeline:
    """A DataLoader over `LightlyViews` with the interface of a `Pipeline`."""

    def __init__(self, images: Images, views: tuple[View, ...], config: Config):
        self.views = views
        generator = torch.Generator().manual_seed(config.seed)
        self._loader: DataLoader[Any] = DataLoader(
            LightlyViews(images, views[0]),
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=2,
            persistent_workers=True,
            generator=generator,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(
        self, epoch: int, skip: int = 0, views: Sequence[View] | None = None
    ) -> Iterator[Batch]:
        assert skip == 0 and views is None  # these runs are never resumed
        for views, index in self._loader:
            yield Batch(views, index)


class LightlyBarlow(ProjectedObjective):
    """fastssl's projector, lightly's loss."""

    def __init__(self, features: int, config: Config):
        from lightly.loss import BarlowTwinsLoss

        knobs: Any = config.objective
        super().__init__(features, knobs)
        self._loss = BarlowTwinsLoss(lambda_param=knobs.lambd or 5e-3)

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        return self._loss(*embeddings)


def variants(epochs: int) -> Iterator[tuple[str, Config, bool, bool]]:
    """(name, config, lightly's views, lightly's loss), each with one change to the one before."""
    config = recipe_config(
        "cifar-small-barlow",
        image_size=32,
        backbone="fastnet-16",
        batch_size=256,
        epochs=epochs,
        projector_width=2048,
        lambd=0.001,
        channels_last=False,
        precision="float32",
        probe_epochs=1,
    )
    yield "lightly: transform, DataLoader, loss", config, True, True
    yield "+ fastssl's views", config, False, True
    yield "+ fastssl's loss", config, False, False
    config = configured(config, channels_last=True)
    yield "+ channels last", config, False, False
    config = configured(config, precision="bfloat16")
    yield "+ bfloat16", config, False, False
    config = configured(config, projector_width=256, lambd=None)
    yield "+ projector of 256, tuned weight", config, False, False
    config = configured(config, views=4, epochs=max(1, epochs // 2))
    yield "+ 4 views, half the epochs", config, False, False
    config = configured(config, views=2, epochs=epochs, compile=True)
    yield "2 views again, + torch.compile, its time counted", config, False, False


def run(name: str, config: Config, images: int, theirs: tuple[bool, bool]) -> dict[str, Any]:
    """Train one variant; its probes, one per epoch."""
    config = configured(config, data=os.environ["FASTSSL_CIFAR10"], train_images=images)
    splits = []
    for part, limit in (("train", images), ("test", 2000)):
        split = open_split(config, part, hold=True)  # type: ignore[arg-type]
        assert isinstance(split, ArraySplit)
        splits.append(ArraySplit(config, part, split.pixels[:limit]))  # type: ignore[arg-type]
    train_images = splits[0].pixels
    views = build_views(config)
    backbone = seeded_backbone(config, CPU)
    features = feature_width(backbone, config.image_size)
    objective = (
        LightlyBarlow(features, config)
        if theirs[1]
        else build_objective(config, features=features, num_samples=images)
    )
    pipeline: Any = (
        LightlyPipeline(train_images, views, config)
        if theirs[0]
        else resident(configured(config, device="cpu"), train_images)
    )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        probe = OnlineKNN(path / "probes.jsonl", config, splits[0], splits[1])
        trained = train(config, pipeline, backbone, objective, path, lambda line: None, probe=probe)
        probes = read_probes(path / "probes.jsonl")
    return {
        "case": name,
        "parameters": {"images": images, "epochs": config.epochs, "seed": config.seed},
        "train_s": trained.train_s,
        "views_per_s": trained.views_per_s,
        "probes": probes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", default="")
    options = parser.parse_args()
    with open(options.out, "a", buffering=1) as file:
        file.write(json.dumps({"environment": environment(), "suite": "against_lightly"}) + "\n")
        target = first_s = None
        for name, config, *theirs in variants(options.epochs):
            if options.match not in name:
                continue
            config = configured(config, seed=options.seed)
            row = run(name, config, options.images, (theirs[0], theirs[1]))
            if target is None:
                target = row["probes"][3 * options.epochs // 4 - 1]["knn"]
                first_s = time_to(row["probes"], target)
            seconds = time_to(row["probes"], target)
            row |= {"target": target, "seconds_to_target": seconds}
            row["times_faster"] = first_s / seconds if seconds and first_s else None
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
