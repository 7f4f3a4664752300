"""Fast augmented views of images: one contract, several engines. Needs torch and numpy; an engine
imports its decoding library when it is opened."""

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastssl_pipelines import policies
from fastssl_pipelines.augment import Quality
from fastssl_pipelines.engines.base import EngineSettings
from fastssl_pipelines.engines.dali import DaliPipeline
from fastssl_pipelines.engines.ffcv import FfcvPipeline
from fastssl_pipelines.engines.resident import ResidentPipeline
from fastssl_pipelines.sources.beton import Beton
from fastssl_pipelines.sources.image_files import is_encoded
from fastssl_pipelines.spec import Batch, Pipeline, View

__all__ = ["Batch", "Pipeline", "View", "choose_engine", "open_pipeline", "policies"]

ENGINES = {"resident": ResidentPipeline, "dali": DaliPipeline, "ffcv": FfcvPipeline}


def open_pipeline(
    engine: str,
    source: Any,
    *,
    views: Sequence[View],
    batch_size: int,
    seed: int,
    device: torch.device | str,
    shard: tuple[int, int] = (0, 1),
    quality: Quality = "exact",
    keep_params: bool = False,
    drop_last: bool = True,
    **options: Any,
) -> Pipeline:
    """A pipeline over `source` that renders `views` on `device`, in batches of `batch_size` per
    rank.

    engine: "resident" holds all images in memory: source is uint8 RGB, an array or tensor (M, H, W,
    3), a sequence of (H, W, 3) or of PIL images of any sizes, or what "dali" reads, decoded once.
    "dali" decodes a folder of images, .tar shards, a list of either, or a list of bytes; "ffcv" a
    .beton file. "auto" takes `choose_engine`'s choice and logs it. shard: (rank, world). quality:
    "exact" is torchvision's semantics, "affine" one colour matrix per view. keep_params: yield the
    sampled parameters in `Batch.params`, V `Params`. drop_last: False yields the images after the
    last full batch as a shorter one. options: of the engine, see `ResidentPipeline`,
    `DaliPipeline`, `FfcvPipeline` and `StreamingPipeline`. ValueError is raised before the first
    batch.
    """
    if engine == "auto":
        engine, why = choose_engine(source, device)
        logging.getLogger(__name__).info("engine %s: %s", engine, why)
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}: choose 'auto' or one of {sorted(ENGINES)}")
    settings = EngineSettings(
        views=tuple(views),
        batch_size=batch_size,
        seed=seed,
        device=torch.device(device),
        shard=shard,
        quality=quality,
        keep_params=keep_params,
        drop_last=drop_last,
    )
    return ENGINES[engine](source, settings, **options)


def choose_engine(source: Any, device: torch.device | str) -> tuple[str, str]:
    """(engine, why) of the fastest engine that reads `source` here.

    ValueError where that engine is not installed, with the command that installs it.
    """
    if not is_encoded(source):
        return "resident", "the images are in memory already"
    suffix = Path(source).suffix if isinstance(source, str | os.PathLike) else ""
    if suffix == ".npy":
        return "resident", "the source is one array"
    if suffix == ".beton" or isinstance(source, Beton):
        engine, why = "ffcv", "the source is a .beton file"
    else:
        on = "GPU" if torch.device(device).type == "cuda" else "CPU"
        engine, why = "dali", f"the images are encoded, and DALI decodes on this {on}"
    if not _is_installed("nvidia.dali" if engine == "dali" else "ffcv"):
        raise ValueError(f"{why}, but it is missing: pip install 'fastssl-torch[{engine}]'")
    return engine, why


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
