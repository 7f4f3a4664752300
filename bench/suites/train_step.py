"""Whole training steps, views included: ours beside torchvision's transforms and eager PyTorch.

Torchvision renders a batch on the device with one set of parameters for all of its images, its
fastest mode; the net, its precision, the optimizer and the projector are the same for all, the loss
is the official formula or ours. A call is a few steps on random bytes.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.measure import Call, Case
from bench.suites.covariance_losses import official_barlow
from bench.suites.views import random_images, shared_torchvision
from fastssl.backbones import feature_width, seeded_backbone
from fastssl.config import Config
from fastssl.data.loading import build_views
from fastssl.distributed import SINGLE_PROCESS
from fastssl.objectives import build_objective, configured
from fastssl.objectives.base import Objective, ProjectedObjective
from fastssl.optim import build_optimizer
from fastssl.recipes import recipe_config
from fastssl.step import Model, Step
from fastssl_pipelines import Pipeline, open_pipeline

STEPS = 8  # in a call
LR = 1e-4

# name: (config, height, width)
Setting = tuple[Config, int, int]
_CIFAR = recipe_config("cifar10-barlow", batch_size=512, precision="bfloat16")
_VIT = recipe_config(
    "barlow", backbone="vit_small_patch16_224", batch_size=256, precision="bfloat16"
)
CPU_SETTINGS: dict[str, Setting] = {
    "step: Barlow, fastnet, 2x16": (recipe_config("cifar-small-barlow"), 32, 32)
}
GPU_SETTINGS: dict[str, Setting] = {
    "step: Barlow, ResNet-18 with a CIFAR stem, 2x32": (_CIFAR, 32, 32),
    "step: Barlow, ViT-S/16, 2x224": (_VIT, 256, 341),
}


class OfficialBarlow(ProjectedObjective):
    """Our projector, the official loss."""

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        return official_barlow(embeddings)


def cases(device: str) -> Iterator[Case]:
    """Every case this device can run; compiled steps only on a GPU, where a minute is enough."""
    cuda = torch.device(device).type == "cuda"
    for name, (config, height, width) in (GPU_SETTINGS if cuda else CPU_SETTINGS).items():
        yield Case(
            name,
            {"backbone": config.backbone, "batch": config.batch_size, "steps": STEPS},
            partial(_variants, configured(config, device=device), height, width),
            _check,
            work={"samples": STEPS * config.batch_size},
            graph=False,
        )


def _variants(config: Config, height: int, width: int) -> dict[str, Call]:
    device = torch.device(config.device)
    images = random_images(STEPS * config.batch_size, height, width)
    variants = {
        "torchvision, official loss, eager": _by_torchvision(config, images[: config.batch_size]),
        "fastssl, eager": _by_us(config, images),
    }
    if device.type == "cuda":
        compiled = configured(config, compile=True)
        variants["fastssl, compiled"] = _by_us(compiled, images)
        variants["fastssl, CUDA graphs"] = _by_us(configured(compiled, cuda_graphs=True), images)
    return variants


def build(config: Config, images: int, official: bool = False) -> tuple[Model, Step]:
    """The model of `config` for `images` images, and its step; with the official loss or ours."""
    device = torch.device(config.device)
    backbone = seeded_backbone(config, device)
    width = feature_width(backbone, config.image_size)
    knobs: Any = config.objective
    objective: Objective = (
        OfficialBarlow(width, knobs)
        if official
        else build_objective(config, features=width, num_samples=images)
    )
    model = Model(backbone, objective.to(device)).train()
    return model, Step(
        config, model, build_optimizer(config, [backbone, objective]), SINGLE_PROCESS, print
    )


def resident(config: Config, images: np.ndarray) -> Pipeline:
    """The views of `config`, of images held in memory."""
    return open_pipeline(
        "resident",
        images,
        views=build_views(config),
        batch_size=config.batch_size,
        seed=config.seed,
        device=config.device,
    )


def _by_torchvision(config: Config, images: np.ndarray) -> Call:
    _, step = build(config, len(images), official=True)
    render = shared_torchvision(images, build_views(config), config.device)
    index = torch.arange(len(images), device=config.device)

    def call() -> float:
        for _ in range(STEPS):
            metrics, _ = step(render(), index, LR)
        return metrics["loss"].item()

    return call


def _by_us(config: Config, images: np.ndarray) -> Call:
    _, step = build(config, len(images))
    pipeline = resident(config, images)

    def call() -> float:
        for batch in pipeline.epoch(0):
            metrics, _ = step(batch.views, batch.index, LR)
        return metrics["loss"].item()

    return call


def _check(variants: dict[str, Call]) -> None:
    """Every variant has a finite loss; the losses suite checks that the losses agree."""
    losses = {name: call() for name, call in variants.items()}
    assert all(np.isfinite(loss) for loss in losses.values()), losses
