"""Feature extraction, a batch at a time, for probes, spectra and protocols.

Images are read, turned into one centre view and passed through a network batch by batch, over all
ranks; no more than the batches in flight are decoded.

Shapes: M images of a part, N batch, F features, S pixels per side.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.config import Config
from fastssl.data.datasets import Images
from fastssl.data.loading import build_views
from fastssl.data.splits import Split
from fastssl.device import device_of
from fastssl.distributed import SINGLE_PROCESS, Ranks

BATCH = 256  # images
RAW_SIZE_PX = 32  # raw pixels are compared at no more than this, 3072 values

Item = TypeVar("Item")
Function = Callable[[Images], Tensor]  # (N, S, S, 3) uint8 -> (N, F) float32 on the CPU


def extract(
    split: Split,
    functions: Mapping[str, Function],
    *,
    chosen: Tensor | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each of `functions` on the readable images of `split`, or on the chosen ones: (their numbers
    (M,) int64, name -> (M, F)).

    A collective call: each rank takes its share of the batches; rank 0 returns all rows, in the
    order of a single process, the others none.
    """
    chunks = split.chunks(BATCH, chosen)[ranks.rank :: ranks.world]
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for numbers, images in split.batches(chunks):
        if len(numbers):
            found.append((numbers, {name: f(images) for name, f in functions.items()}))
    parts = interleave(ranks.gather_to_main(found))
    if not parts:
        return torch.empty(0, dtype=torch.int64), {}
    numbers = torch.cat([part for part, _ in parts])
    return numbers, {name: torch.cat([rows[name] for _, rows in parts]) for name in functions}


def interleave(by_rank: list[list[Item]]) -> list[Item]:
    """The first of every rank, then the second of every rank, and so on."""
    longest = max((len(items) for items in by_rank), default=0)
    return [items[k] for k in range(longest) for items in by_rank if k < len(items)]


def centre_features(config: Config, backbone: nn.Module, images: Images) -> Tensor:
    """Features (M, F) float32, on the CPU, of one centre view of images (M, S, S, 3), as the
    config's views are normalised."""
    view, device = build_views(config)[0], device_of(backbone)
    size, mean, std = config.image_size, view.mean, view.std
    return extract_features(backbone, images, image_size=size, mean=mean, std=std, device=device)


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: Images,
    *,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device,
    batch_size: int = BATCH,
) -> Tensor:
    """Features (M, F) float32 on the CPU of images (M, S, S, 3) uint8, in evaluation mode, one
    centre view each."""
    training = backbone.training
    backbone.eval()
    shift = torch.tensor(mean, device=device).view(3, 1, 1)
    scale = torch.tensor(std, device=device).view(3, 1, 1)
    features = []
    for start in range(0, len(images), batch_size):
        pixels = _centre_view(images[start : start + batch_size], image_size, device)
        features.append(backbone((pixels - shift) / scale).float().cpu())
    backbone.train(training)
    return torch.cat(features)


def raw_pixels(images: Images) -> Tensor:
    """The images themselves as features: (M, 3 S S) float32 in [0, 1], S at most RAW_SIZE_PX."""
    size, cpu = min(images.shape[1], RAW_SIZE_PX), torch.device("cpu")
    parts = [_centre_view(images[i : i + 1024], size, cpu) for i in range(0, len(images), 1024)]
    return torch.cat([part.flatten(1) for part in parts])


def _centre_view(images: Images, size: int, device: torch.device) -> Tensor:
    """(N, 3, size, size) float32 in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
    if x.shape[-2:] != (size, size):
        x = functional.interpolate(
            x, size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )
    return x
