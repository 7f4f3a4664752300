"""What a run starts from: device, views, backbone, images and the pipeline over them.

Shapes: M data set, S pixels per side.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.backbones import build_backbone
from fastssl.config import Config
from fastssl.data.datasets import (
    Images,
    Labels,
    Split,
    beton_of,
    encoded_images,
    is_encoded,
    load_images,
    load_labels,
)
from fastssl.distributed import ALONE, Ranks
from fastssl.evaluation.probes import extract_features
from fastssl.runtime.state import device_of
from fastssl_pipelines import Pipeline, View, choose_engine, open_pipeline, policies
from fastssl_pipelines.engines.streaming import StreamingPipeline
from fastssl_pipelines.memory import require_memory

SPLITS: tuple[Split, Split] = ("train", "test")


def choose_device(name: str) -> torch.device:
    """The torch device of --device; 'auto' is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try 'cpu'"
        ) from error
    return device


def build_views(config: Config) -> tuple[View, ...]:
    """The views of `config.policy`; ValueError lists the policies, or says that a policy fixes its
    own views."""
    views = policies.policy_views(config.policy, config.views, config.image_size)
    return tuple(replace(view, channels_last=config.channels_last) for view in views)


def seeded_backbone(config: Config, device: torch.device) -> nn.Module:
    """The backbone as `config.seed` initialises it, on `device`."""
    torch.manual_seed(config.seed)
    net = build_backbone(config.backbone, stem=config.stem, image_size=config.image_size)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return net.to(device).to(memory_format=layout)


@dataclass(frozen=True)
class Data:
    """What a run trains and is evaluated on: `images` (M, S, S, 3) without the unreadable ones,
    which `left_out` names; a `pipeline` over the same images."""

    images: Images
    left_out: dict[str, str]
    pipeline: Pipeline


def open_data(
    config: Config, device: torch.device, say: Callable[[str], None], ranks: Ranks = ALONE
) -> Data:
    """The training images and their pipeline; ValueError where a batch does not fit."""
    views = build_views(config)
    needed = sum(4 * config.batch_size * 3 * view.size**2 for view in views)  # float32
    what = f"one batch of {config.batch_size} x {len(views)} views of {config.image_size} px"
    require_memory(needed, what, "lower --image-size, --batch-size or --views", device)
    left_out: dict[str, str] = {}
    images = load_split(config, "train", left_out)
    if config.batch_size > len(images):
        raise ValueError(
            f"--batch-size {config.batch_size} is larger than the data set of {len(images)} images"
        )
    engine, source = _training_source(config, images, left_out, device, say)
    pipeline = open_pipeline(
        *(engine, source),
        views=views,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
        shard=(ranks.rank, ranks.world),
        **_engine_options(config, engine),
    )
    return Data(images, left_out, pipeline)


def _training_source(
    config: Config,
    images: Images,
    left_out: dict[str, str],
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[str, Any]:
    """(engine, what it reads): the same images in the same order for every engine."""
    engine: str = config.engine
    if engine == "auto":
        encoded = config.data if config.data.endswith(".beton") else [b""]
        engine, why = choose_engine(encoded if is_encoded(config.data) else images, device)
        say(f"engine {engine}: {why}")
    if engine == "resident":
        return engine, images
    files = encoded_images(config.data, "train", holdout=config.holdout)
    readable = [i for i, name in enumerate(files.names) if name not in left_out]
    files = files.select(readable[: len(images)])
    return engine, files if engine == "dali" else beton_of(files, say)


def unreadable(pipeline: Pipeline) -> dict[str, str]:
    return pipeline.unreadable.reasons if isinstance(pipeline, StreamingPipeline) else {}


def load_split(config: Config, split: Split, left_out: dict[str, str]) -> Images:
    """The images of one split; `left_out` gains the unreadable ones."""
    size, holdout = config.load_size, config.holdout
    options = _corrupt_options(config)
    images = load_images(
        *(config.data, split),
        size=size,
        holdout=holdout,
        oriented=config.oriented,
        left_out=left_out,
        **options,
    )
    return images[: config.train_images or None] if split == "train" else images


def _engine_options(config: Config, engine: str) -> dict[str, Any]:
    """What `config` says to this engine alone."""
    if engine == "resident":
        return {}
    options = {**_corrupt_options(config), "scaled": config.scaled}
    if engine == "dali":
        options |= {"render": config.render, "oriented": config.oriented}
    return options


def _corrupt_options(config: Config) -> dict[str, Any]:
    return {"on_corrupt": config.on_corrupt, "quota": config.corrupt_quota}


def training_images(config: Config) -> Images:
    """The images that a run trains on, (M, S, S, 3) uint8."""
    return load_split(config, "train", {})


def split_labels(
    config: Config, split: Split, count: int, left_out: Collection[str]
) -> Labels | None:
    """The labels of the `count` images of `load_split`, row for row; None where the data has none.
    left_out: the names of the unreadable ones."""
    found = load_labels(config.data, split, holdout=config.holdout, left_out=left_out)
    return None if found is None else found[:count]


def centre_features(config: Config, backbone: nn.Module, images: Images) -> Tensor:
    """Features (M, F) float32, on the CPU, of one centre view of images (M, S, S, 3), as the
    config's views are normalised."""
    view, device = build_views(config)[0], device_of(backbone)
    size, mean, std = config.image_size, view.mean, view.std
    return extract_features(backbone, images, image_size=size, mean=mean, std=std, device=device)


def load_both(config: Config) -> tuple[list[Images], list[Labels | None]]:
    """The images of a run's training and test part, and their labels, row for row, as `evaluate`
    sees them."""
    left_out: dict[str, str] = {}
    images = [load_split(config, split, left_out) for split in SPLITS]
    labels = [
        split_labels(config, split, len(rows), left_out)
        for split, rows in zip(SPLITS, images, strict=True)
    ]
    return images, labels
