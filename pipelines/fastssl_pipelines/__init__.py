"""Views of images, fast: one contract, several engines. Needs torch and numpy; each engine brings
its own library."""

from collections.abc import Sequence
from typing import Any

import torch

from fastssl_pipelines import policies
from fastssl_pipelines.augment import Quality
from fastssl_pipelines.resident import ResidentPipeline
from fastssl_pipelines.spec import Batch, Pipeline, View

__all__ = ["Batch", "Pipeline", "View", "open_pipeline", "policies"]

ENGINES = {"resident": ResidentPipeline}


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
) -> Pipeline:
    """A pipeline over `source` that renders `views` on `device`, in batches of `batch_size` per
    rank.

    engine: "resident" holds all images in memory: source is uint8 RGB, an array or tensor (M, H, W,
    3) or a sequence of (H, W, 3) of any sizes. shard: (rank, world). quality: "exact" is
    torchvision's semantics, "affine" one colour matrix per view. keep_params: yield what was drawn
    in `Batch.params`, a tuple of V `Params`. ValueError says what is wrong before the first batch.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}: choose one of {sorted(ENGINES)}")
    return ENGINES[engine](
        source,
        views=views,
        batch_size=batch_size,
        seed=seed,
        device=device,
        shard=shard,
        quality=quality,
        keep_params=keep_params,
    )
