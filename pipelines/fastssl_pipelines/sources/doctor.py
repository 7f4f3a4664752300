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
from fastssl_pipelines.sources.decoding import Decoding, count_frames, decode_checked
from fastssl_pipelines.sources.exif import exif_orientation
from fastssl_pipelines.sources.image_files import Encoded, open_encoded
from fastssl_pipelines.sources.jpeg import plain_jpeg
from fastssl_pipelines.sources.unreadable import UnreadableError


@dataclass(frozen=True)
class Finding:
    """One image: its size, which decoders read it, its EXIF orientation, its frames and what is
    damaged in it; or the reason why none reads it."""

    height: int = 0
    width: int = 0
    reader: str = ""
    orientation: int = 1
    frames: int = 1
    damage: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """`count` images, `unreadable` and `damaged` by name; heights and widths in px of the readable
    ones; the images of each part and its classes; what lies beside them and is not read."""

    count: int
    unreadable: dict[str, str]
    damaged: dict[str, str]
    readers: Counter[str]
    rotated: int  # have an EXIF orientation, which training ignores by default
    several_frames: int  # of which the first is read
    sides: list[tuple[int, int]]
    parts: dict[str, tuple[int, int]]  # (images, classes)
    left_out: Counter[str]

    def lines(self) -> list[str]:
        """The report as text."""
        text = [f"unreadable: {name}: {reason}" for name, reason in self.unreadable.items()]
        text += [f"damaged: {name}: {damage}" for name, damage in self.damaged.items()]
        share = len(self.unreadable) / self.count
        text.append(f"{self.count} images, {len(self.unreadable)} unreadable ({share:.2%})")
        if self.damaged:
            text.append(
                f"{len(self.damaged)} are damaged and used as decoded; --on-damage skip leaves them"
                " out"
            )
        for part, (images, classes) in self.parts.items():
            where = f"part {part}" if part else "no parts: some are held out for evaluation"
            text.append(
                f"{where}: {images} images, " + (f"{classes} classes" if classes else "no classes")
            )
        text += [f"left out: {number} x {reason}" for reason, number in self.left_out.most_common()]
        text += [f"{number} are {reader}" for reader, number in self.readers.most_common()]
        if self.rotated:
            text.append(f"{self.rotated} are turned by their EXIF tag, which is ignored by default")
        if self.several_frames:
            text.append(f"{self.several_frames} have several frames or pages; the first is read")
        if self.sides:
            short = np.array([min(side) for side in self.sides])
            low, middle, high = np.percentile(short, [0, 50, 100]).astype(int)
            text.append(f"shorter side {low} to {high} px, median {middle} px")
        return text


def diagnose(
    source: Any,
    *,
    workers: int | None = None,
    decoding: Decoding | None = None,
    image_key: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Decode all images of `source`, a .beton or what `open_encoded` takes, and report problems.

    ValueError where there are no images at all.
    """
    workers, how = workers or os.cpu_count() or 1, decoding or Decoding()
    is_beton = isinstance(source, str | os.PathLike) and Path(source).suffix == ".beton"
    encoded = Beton(source) if is_beton else open_encoded(source, image_key=image_key)
    findings: list[Finding] = []

    def examine(i: int) -> Finding:
        return _examine_row(encoded, i) if isinstance(encoded, Beton) else _examine(encoded, i, how)

    with ThreadPoolExecutor(workers, thread_name_prefix="fastssl-doctor") as pool:
        submitted = prefetch(
            range(len(encoded)),
            lambda i: pool.submit(examine, i),
            lambda future: future.result(),
            4 * workers,
        )
        for finding in submitted:
            findings.append(finding)
            progress(len(findings), len(encoded))
    named = list(zip(encoded.names, findings, strict=True))
    good = [finding for finding in findings if finding.reason is None]
    return Diagnosis(
        count=len(findings) + len(encoded.lost),
        unreadable=encoded.lost | {n: f.reason for n, f in named if f.reason is not None},
        damaged={name: f.damage for name, f in named if f.damage},
        readers=Counter(finding.reader for finding in good),
        rotated=sum(finding.orientation != 1 for finding in good),
        several_frames=sum(finding.frames > 1 for finding in good),
        sides=[(finding.height, finding.width) for finding in good],
        parts=_parts(encoded),
        left_out=encoded.left_out + encoded.layout.left_out,
    )


def _parts(encoded: Encoded) -> dict[str, tuple[int, int]]:
    """(images, classes) of each part."""
    classes = encoded.classes
    return {
        part: (len(chosen), len({classes[i] for i in chosen} - {""}))
        for part, chosen in encoded.layout.parts.items()
    }


def _examine(encoded: Encoded, i: int, how: Decoding) -> Finding:
    try:
        data = encoded.read(i)
        pixels, damage = decode_checked(data, how)
    except UnreadableError as error:
        return Finding(reason=str(error))
    plain = plain_jpeg(data) is not None
    reader = "plain JPEGs, for every decoder" if plain else "others, read by Pillow"
    frames = 1 if plain else count_frames(data)
    height, width = pixels.shape[:2]
    return Finding(height, width, reader, exif_orientation(data), frames, damage)


def _examine_row(beton: Beton, i: int) -> Finding:
    row = int(beton.row[i])
    height, width = beton.size[row].tolist()
    try:
        damage = beton.decode(row, 1, np.empty(3 * height * width, np.uint8))
    except UnreadableError as error:
        return Finding(reason=str(error))
    return Finding(height, width, "pixels" if beton.raw[row] else "JPEGs", damage=damage)
