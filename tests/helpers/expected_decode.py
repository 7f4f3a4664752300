"""What the streaming engines should decode, by Pillow alone."""

from typing import Any

import torch
from torch import Tensor

from fastssl_pipelines.augment import Images, as_images
from fastssl_pipelines.sources.decoding import decode
from fastssl_pipelines.sources.image_files import Encoded
from fastssl_pipelines.sources.jpeg import plain_jpeg


def planned(pipeline: Any, encoded: Encoded, index: Tensor, epoch: int) -> tuple[Images, list[int]]:
    """The readable images at `index` (N,) as `pipeline` shrinks them in this epoch, and by what."""
    files = [encoded.read(i) for i in index.tolist()]
    how = getattr(pipeline, "decoding", None)
    sizes = [decode(file, how).shape[:2] if plain_jpeg(file) else (1, 1) for file in files]
    shrinks = pipeline._shrinks(index.cpu(), epoch, torch.tensor(sizes), pipeline.views).tolist()
    pixels = [decode(f, how, shrink=s) for f, s in zip(files, shrinks, strict=True)]
    return as_images(pixels), shrinks
