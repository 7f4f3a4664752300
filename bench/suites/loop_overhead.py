"""Overhead of the training loop beside the step: data, monitoring and logging.

The same number of steps on one fixed batch and on the pipeline's batches; and,
called alone, what `train` does beside them: the guard, the spectrum, the log, the online probe. The
latter are too small to be seen as a difference of whole runs on a shared machine.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import Call, Case
from bench.suites.train_step import build, resident
from bench.suites.views import random_images
from fastssl.backbones import feature_width
from fastssl.config import Config
from fastssl.evaluation.collapse import SpectrumQueue
from fastssl.evaluation.features import centre_features
from fastssl.evaluation.probes import knn_accuracy
from fastssl.recipes import recipe_config
from fastssl.runtime.metrics_log import MetricsLog
from fastssl.runtime.nan_guard import NonFiniteGuard
from fastssl.step import Model, Step
from fastssl_pipelines import Batch, Pipeline

STEPS = 20  # in a call
IMAGES = 5000


def cases(device: str) -> Iterator[Case]:
    """Barlow Twins, two views of 16 px, the small net."""
    parameters = {"recipe": "cifar-small-barlow", "images": IMAGES}
    for name, variants in (
        (f"training loop, {STEPS} steps", _fed),
        (f"beside {STEPS} steps", _beside),
        ("online probe beside an epoch", _probed),
    ):
        yield Case(
            name,
            parameters,
            partial(_built, variants, device),
            lambda variants: None,  # one step, however it is fed: tests/engine/test_train.py
            work={"steps": STEPS},
            graph=False,
        )


@dataclass
class Loop:
    """The parts of a training run."""

    config: Config
    model: Model
    step: Step
    pipeline: Pipeline
    images: Tensor  # (M, 32, 32, 3) uint8
    fixed: Batch

    def run(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            metrics, _ = self.step(batch.views, batch.index, 1e-4)
        metrics["loss"].item()


def _built(variants: Callable[[Loop], dict[str, Call]], device: str) -> dict[str, Call]:
    config = recipe_config("cifar-small-barlow", device=device)
    images = random_images(IMAGES, 32, 32)
    model, step = build(config, IMAGES)
    pipeline = resident(config, images)
    fixed = next(pipeline.epoch(0))
    return variants(Loop(config, model, step, pipeline, torch.from_numpy(images), fixed))


def _fed(loop: Loop) -> dict[str, Call]:
    epochs = count()
    return {
        "one batch": lambda: loop.run([loop.fixed] * STEPS),
        "+ pipeline": lambda: loop.run(islice(loop.pipeline.epoch(next(epochs)), STEPS)),
    }


def _beside(loop: Loop) -> dict[str, Call]:
    """The rest of what `train` does in 20 steps, with a report of the spectrum at their end: more
    than it does, since reports are limited to 1 % of the time."""
    metrics, features = loop.step(loop.fixed.views, loop.fixed.index, 1e-4)
    finite = metrics.pop("finite")
    width = feature_width(loop.model.backbone, loop.config.image_size)
    spectrum = SpectrumQueue(width, features[0].device)
    guard = NonFiniteGuard(loop.model, "stop", print)
    log = MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl", 10**9)

    def guarded() -> None:
        for number in range(STEPS):
            guard.add(number, loop.fixed.index, finite)
        guard.check()

    def logged() -> None:
        values = {name: value.item() for name, value in metrics.items()}
        log.write(0, {**values, "lr": 1e-4, "views_per_s": 0.0})

    def measured() -> None:
        for _ in range(STEPS):
            spectrum.update(features)
        spectrum.report(at_once=True)

    steps = {f"{STEPS} steps": _fed(loop)["+ pipeline"]}
    return {**steps, "guard": guarded, "log": logged, "spectrum": measured}


def _probed(loop: Loop) -> dict[str, Call]:
    """kNN of 1,000 images among the 5,000 training images."""
    epochs = count()
    labels = torch.arange(IMAGES) % 10

    def probe() -> None:
        train = centre_features(loop.config, loop.model.backbone, loop.images.numpy())
        test = centre_features(loop.config, loop.model.backbone, loop.images[:1000].numpy())
        knn_accuracy(train, labels, test, labels[:1000])

    epoch = {"an epoch": lambda: loop.run(loop.pipeline.epoch(next(epochs)))}
    return {**epoch, "online probe": probe}
