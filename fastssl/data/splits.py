"""One part of a data set, an array in memory or files that are read on demand.

Shapes: M images of the part, N of a batch, S pixels per side. Images are uint8 RGB (N, S, S, 3).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastssl.config import Config
from fastssl.data.datasets import (
    Images,
    Part,
    is_encoded,
    load_array,
    load_labels,
    open_files,
)
from fastssl_pipelines.memory import require_memory
from fastssl_pipelines.sources.decoded_files import decoded_files
from fastssl_pipelines.sources.decoding import Decoded, Decoding, parse_bands
from fastssl_pipelines.sources.image_files import Encoded
from fastssl_pipelines.sources.unreadable import UnreadableError, UnreadableImages


def sample_indices(total: int, count: int, seed: int) -> Tensor:
    """`count` of the numbers 0 to total - 1, drawn without replacement by `seed`: (count,) int64,
    ascending, so that files are read in order; all of them where `count` is 0 or not below total.

    Wherever fewer than all images are used: a folder is sorted by class, so its first images are
    those of a few classes.
    """
    if not 0 < count < total:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].sort().values


class Split(ABC):
    """The training or the test part of a run's data: its images by number, 0 to M - 1.

    skipped: the unreadable images by name, with the reason; of files, those found so far.
    source_numbers: (M,) int64, the number of each image among all of the part, where the split has
    only some of them.
    """

    def __init__(
        self,
        config: Config,
        part: Part,
        excluded: Mapping[str, str] | None,
        source_numbers: Tensor | None,
    ):
        self._config, self._part, self._excluded = config, part, excluded or {}
        self._source_numbers = source_numbers

    @property
    def source_numbers(self) -> Tensor:
        if self._source_numbers is None:
            return torch.arange(len(self))
        return self._source_numbers

    @property
    def skipped(self) -> Mapping[str, str]:
        return self._excluded

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def total(self) -> int:
        """The number of images, all of `skipped` included."""
        return len(self) + len(self._excluded)

    @abstractmethod
    def batches(self, chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Images]]:
        """(numbers (N,), images (N, S, S, 3)) of the readable images of each chunk of numbers."""

    def labels(self) -> Tensor | None:
        """The label of every image (M,) int64, None where the data has none or the training part
        a single class, which is what a folder in a folder is. For evaluation and oracles only."""
        return self._labels

    @cached_property
    def _labels(self) -> Tensor | None:
        """Read once for oracle, probe and evaluation: a folder's labels are a scan of its files."""
        config = self._config
        found = load_labels(config.data, self._part, config.holdout, config.image_key)
        if found is None:
            return None
        numbers = self.source_numbers
        if len(numbers) and int(numbers.max()) >= len(found):
            raise ValueError(
                f"{config.data} has {len(found)} labels in its {self._part} part and had more "
                "images when the run began; restore the files"
            )
        labels = torch.from_numpy(found)[numbers]
        one_class = self._part == "train" and len(labels.unique()) < 2
        return None if one_class else labels

    def chunks(self, size: int, chosen: Tensor | None = None) -> tuple[Tensor, ...]:
        """The numbers of all images, or the chosen ones, `size` at a time."""
        return (torch.arange(len(self)) if chosen is None else chosen).split(size)


class ArraySplit(Split):
    """Images held in memory: `pixels` (M, S, S, 3), without the unreadable ones."""

    def __init__(
        self,
        config: Config,
        part: Part,
        pixels: Images,
        skipped: Mapping[str, str] | None = None,
        source_numbers: Tensor | None = None,
    ):
        super().__init__(config, part, skipped, source_numbers)
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Images]]:
        for numbers in chunks:
            yield numbers, self.pixels[numbers.numpy()]


class FileSplit(Split):
    """Images that are decoded on demand, to squares of `load_size`, and not cached.

    excluded: unreadable images that `files` does not contain, by name, with the reason.
    """

    def __init__(
        self,
        config: Config,
        part: Part,
        files: Encoded,
        excluded: Mapping[str, str] | None = None,
        source_numbers: Tensor | None = None,
    ):
        super().__init__(config, part, excluded, source_numbers)
        self.files = files
        self._unreadable = UnreadableImages(
            len(files) + len(files.lost),
            config.on_corrupt,
            config.corrupt_quota,
            config.on_damage,
            files.lost,
        )

    @property
    def total(self) -> int:
        return super().total + len(self.files.lost)

    @property
    def skipped(self) -> Mapping[str, str]:
        return {**self._excluded, **self._unreadable.reasons}

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Images]]:
        numbers = [number for chunk in chunks for number in chunk.tolist()]
        how, size = decoding_of(self._config), self._config.load_size
        with closing(decoded_files(self.files, numbers, how, size)) as decoded:
            for chunk in chunks:
                yield self._readable(chunk, decoded)

    def _readable(
        self, chunk: Tensor, decoded: Iterator[Decoded | UnreadableError]
    ) -> tuple[Tensor, Images]:
        """The images of one chunk, from the next results of `decoded`."""
        size = self._config.load_size
        pixels = np.empty((len(chunk), size, size, 3), np.uint8)
        numbers: list[int] = []
        for number in chunk.tolist():
            result = next(decoded)
            if isinstance(result, UnreadableError):
                self._unreadable.add(self.files.names[number], str(result))
            elif self._unreadable.keeps(self.files.names[number], result.damage):
                pixels[len(numbers)] = result.pixels
                numbers.append(number)
        return torch.tensor(numbers, dtype=torch.int64), pixels[: len(numbers)]


def open_split(
    config: Config,
    part: Part,
    *,
    hold: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Split:
    """One part of the run's data: an array in memory, or files that are decoded on demand, or with
    `hold` now and held in memory, reporting (done, total) to `progress`. Of the training part,
    `train_images` drawn by the seed."""
    count = config.train_images if part == "train" else 0
    if not is_encoded(config.data):
        pixels = load_array(config.data, part, config.holdout)
        chosen = sample_indices(len(pixels), count, config.seed)
        return ArraySplit(config, part, _compact(pixels, chosen), source_numbers=chosen)
    files = open_files(config.data, part, config.holdout, config.image_key)
    chosen = sample_indices(len(files), count, config.seed)
    sample = files.select(chosen.tolist())
    sample.lost, sample.left_out = files.lost, files.left_out
    split = FileSplit(config, part, sample, source_numbers=chosen)
    return _decode_all(config, part, split, progress) if hold else split


def decoding_of(config: Config) -> Decoding:
    """How the images of a run are decoded, in training and evaluation."""
    return Decoding(config.oriented, config.depth, parse_bands(config.bands), config.max_pixels)


def _compact(pixels: Images, chosen: Tensor) -> Images:
    """pixels[chosen], moved to the front of `pixels` in place; chosen is ascending."""
    if len(chosen) == len(pixels):
        return pixels
    for start in range(0, len(chosen), 1024):
        rows = chosen[start : start + 1024].numpy()
        pixels[start : start + len(rows)] = pixels[rows]
    return pixels[: len(chosen)]


def _decode_all(
    config: Config, part: Part, split: FileSplit, progress: Callable[[int, int], None]
) -> ArraySplit:
    """The readable images of `split`, decoded."""
    size = config.load_size
    require_memory(
        len(split) * size * size * 3,
        f"holding {len(split)} images of {size} px",
        "lower --load-size",
    )
    pixels = np.empty((len(split), size, size, 3), np.uint8)
    readable: list[Tensor] = []
    filled = 0
    for numbers, images in split.batches(split.chunks(256)):
        pixels[filled : filled + len(numbers)] = images
        filled += len(numbers)
        readable.append(numbers)
        progress(filled, len(split))
    if not filled:
        raise ValueError(
            f"none of {len(split)} images can be read; `fastssl doctor` lists the reasons"
        )
    source_numbers = split.source_numbers[torch.cat(readable)]
    return ArraySplit(config, part, pixels[:filled], split.skipped, source_numbers)
