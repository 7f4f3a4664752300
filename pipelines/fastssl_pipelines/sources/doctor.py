"""Decode every image of a data set in parallel and report problems."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastssl_pipelines.prefetch import prefetch
from fastssl_pipelines.sources.beton import Beton
from fastssl_pipelines.sources.image_files import (
    Encoded,
    UnreadableError,
    decode,
    exif_orientation,
    open_encoded,
    plain_jpeg,
)


@dataclass(frozen=True)
class Finding:
    """One image: its size, which decoders read it, its EXIF orientation; or why none does."""

    height: int = 0
    width: int = 0
    reader: str = ""
    orientation: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """`count` images, `unreadable` by name; heights and widths in px of the others."""

    count: int
    unreadable: dict[str, str]
    readers: Counter[str]
    rotated: int  # have an EXIF orientation, which training ignores by default
    sides: list[tuple[int, int]]

    def lines(self) -> list[str]:
        """A readable report, problems first."""
        text = [f"unreadable: {name}: {reason}" for name, reason in self.unreadable.items()]
        share = len(self.unreadable) / self.count
        text.append(f"{self.count} images, {len(self.unreadable)} unreadable ({share:.2%})")
        text += [f"{number} are {reader}" for reader, number in self.readers.most_common()]
        if self.rotated:
            text.append(f"{self.rotated} are turned by their EXIF tag, which is ignored by default")
        if self.sides:
            short = np.array([min(side) for side in self.sides])
            low, middle, high = np.percentile(short, [0, 50, 100]).astype(int)
            text.append(f"shorter side {low} to {high} px, median {middle} px")
        return text


def diagnose(
    source: Any,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Decode all images of `source`, a .beton or what `open_encoded` takes, and report problems.

    ValueError where there are no images at all.
    """
    workers = workers or os.cpu_count() or 1
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".beton":
        beton = Beton(source)
        names = list(beton.names)
        examine: Callable[[int], Finding] = lambda i: _examine_row(beton, int(beton.row[i]))  # noqa: E731
    else:
        encoded = open_encoded(source)
        names = list(encoded.names)
        examine = lambda i: _examine(encoded, i)  # noqa: E731
    findings: list[Finding] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="fastssl-doctor") as pool:
        submitted = prefetch(
            range(len(names)),
            lambda i: pool.submit(examine, i),
            lambda future: future.result(),
            4 * workers,
        )
        for finding in submitted:
            findings.append(finding)
            progress(len(findings), len(names))
    good = [finding for finding in findings if not finding.reason]
    return Diagnosis(
        count=len(findings),
        unreadable={n: f.reason for n, f in zip(names, findings, strict=True) if f.reason},
        readers=Counter(finding.reader for finding in good),
        rotated=sum(finding.orientation != 1 for finding in good),
        sides=[(finding.height, finding.width) for finding in good],
    )


def _examine(encoded: Encoded, i: int) -> Finding:
    try:
        data = encoded.read(i)
        height, width = decode(data).shape[:2]
    except UnreadableError as error:
        return Finding(reason=str(error))
    reader = "plain JPEGs, for every decoder" if plain_jpeg(data) else "others, read by Pillow"
    return Finding(height, width, reader, exif_orientation(data))


def _examine_row(beton: Beton, row: int) -> Finding:
    height, width = beton.size[row].tolist()
    reason = beton.decode(row, 1, np.empty(3 * height * width, np.uint8))
    return Finding(height, width, "pixels" if beton.raw[row] else "JPEGs", reason=reason)
