"""Odd and broken images: each has one expected outcome, the same in every engine.

Unless noted, an image is read as Pillow reads it (EXIF ignored), bit for bit in the resident and
DALI engines; FFCV gets it through `convert`.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import Config
from fastssl.data.splits import ArraySplit, open_split
from fastssl_pipelines import Pipeline, View, open_pipeline
from fastssl_pipelines.augment import as_images, views_of
from fastssl_pipelines.sources.convert import convert
from fastssl_pipelines.sources.decoding import Decoding, decode
from fastssl_pipelines.sources.doctor import diagnose
from fastssl_pipelines.sources.image_files import open_encoded
from fastssl_pipelines.sources.jpeg import plain_jpeg
from fastssl_pipelines.sources.unreadable import (
    UnreadableDataError,
    UnreadableError,
    UnreadableImages,
)
from tests.helpers.expected_decode import planned
from tests.helpers.requires import needs

pytestmark = needs("ffcv", "nvidia.dali")

VIEWS = (View(size=16), View(size=8, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0))
READ: dict[str, tuple[int, int]] = {  # height, width
    "33-type_error.jpg": (1600, 2560),
    "Landscape_1.jpg": (1200, 1800),
    "Landscape_6.jpg": (1800, 1200),
    "Portrait_3.jpg": (1800, 1200),
    "app13-multiple.jpg": (160, 256),
    "derived_cmyk.jpg": (375, 500),
    "derived_progressive_420.jpg": (375, 500),
    "derived_progressive_444.jpg": (375, 500),
    "derived_restart_markers.jpg": (375, 500),
    "hopper_16bit_qtables.jpg": (128, 128),
    "hopper_bad_exif.jpg": (500, 500),
    "hopper_gray.jpg": (128, 128),
    **{f"hopper_orientation_{k}.jpg": (128, 128) for k in range(2, 9)},
    "icc-after-SOF.jpg": (10, 10),
    "icc_profile_big.jpg": (250, 425),
    "jolla.jpg": (2448, 3264),
    "pil_sample_cmyk.jpg": (100, 100),
    "png_named.jpg": (20, 30),
    "sixteen_bit.png": (20, 30),
    "palette.png": (20, 30),
    "alpha.png": (20, 30),
    "trailing_bytes.jpg": (128, 128),
}
REFUSED = {
    "jfif_unit_cm.jpg": "1 x 1 pixels: these views need at least 2 x 2",
    "truncated_jpeg.jpg": "truncated",
    "ultrahdr.jpg": "truncated",
    "cut_off.jpg": "truncated",
    "empty.jpg": "the file is empty",
    "text.jpg": "not an image: it starts with b'once upo'",
    "bad_tables.jpg": "broken data stream",
}


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of jpeg-odd, and more of what people's folders hold."""
    folder = tmp_path_factory.mktemp("odd")
    for file in (data / "jpeg-odd").iterdir():
        (folder / file.name).symlink_to(file)
    whole = (data / "jpeg-odd" / "hopper_orientation_2.jpg").read_bytes()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    (folder / "png_named.jpg").write_bytes(png.getvalue())
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    Image.fromarray(deep).save(folder / "sixteen_bit.png")
    Image.fromarray(pixels).convert("P").save(folder / "palette.png")
    Image.fromarray(pixels).convert("RGBA").save(folder / "alpha.png")
    (folder / "trailing_bytes.jpg").write_bytes(whole + b"junk")
    (folder / "cut_off.jpg").write_bytes(whole[:-1000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("once upon a time")
    (folder / "bad_tables.jpg").write_bytes(without_tables(whole))
    return folder


def without_tables(jpeg: bytes) -> bytes:
    """A JPEG whose Huffman tables declare nonsense: complete, and no decoder reads it."""
    at = jpeg.index(b"\xff\xc4")
    return jpeg[: at + 5] + b"\xff" * 16 + jpeg[at + 21 :]


def opened(source: Any, engine: str, **changes: Any) -> Pipeline:
    options = {"quota": 1.0} if engine != "resident" else {}
    given = {"views": VIEWS, "seed": 0, "device": "cpu", "batch_size": 1, **options, **changes}
    return open_pipeline(engine, source, **given)


def base(name: str) -> str:
    return name.rpartition("/")[2]


def test_every_file_has_a_stated_outcome(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == set(READ) | set(REFUSED)


@pytest.mark.parametrize("name", sorted(READ))
def test_pillow_reads(name: str, folder: Path) -> None:
    assert decode(np.fromfile(folder / name, np.uint8)).shape == (*READ[name], 3)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_pillow_gives_the_reason(name: str, folder: Path) -> None:
    with pytest.raises(UnreadableError, match=REFUSED[name]):
        decode(np.fromfile(folder / name, np.uint8))


def test_sixteen_bits_keep_their_high_byte(folder: Path) -> None:
    pixels = decode(np.fromfile(folder / "sixteen_bit.png", np.uint8))
    expected = (np.arange(600).reshape(20, 30) * 109) >> 8
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], expected)


def test_exif_on_request(folder: Path) -> None:
    data = np.fromfile(folder / "Landscape_6.jpg", np.uint8)
    assert decode(data).shape == (1800, 1200, 3)
    assert decode(data, Decoding(oriented=True)).shape == (1200, 1800, 3)
    small = [folder / f"hopper_orientation_{k}.jpg" for k in range(2, 9)]
    upright = as_images([decode(np.fromfile(f, np.uint8), Decoding(oriented=True)) for f in small])
    given: dict[str, Any] = {"batch_size": 7, "scaled": False}
    batch = next(opened(small, "dali", oriented=True, **given).epoch(0))
    truth, _ = views_of(upright.select(batch.index), VIEWS, 0, 0, batch.index)
    assert torch.equal(batch.views[0], truth[0])
    as_stored = next(opened(small, "dali", **given).epoch(0))
    assert not torch.equal(as_stored.views[0], truth[0])


@pytest.mark.parametrize("scaled", [True, False])
def test_dali(scaled: bool, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Readable ones give Pillow's pixels, the others are left out and named once."""
    encoded = open_encoded(folder)
    pipeline = opened(folder, "dali", batch_size=len(encoded), scaled=scaled)
    batches = [next(pipeline.epoch(epoch)) for epoch in (0, 1)]
    reasons = {base(name): reason for name, reason in pipeline.unreadable.reasons.items()}  # type: ignore[attr-defined]
    assert set(reasons) == set(REFUSED)
    assert all(REFUSED[name] in reason for name, reason in reasons.items())
    for name in REFUSED:
        assert (
            sum(f"/{name} cannot be read" in record.getMessage() for record in caplog.records) == 1
        )
    read = sorted(i for i, name in enumerate(encoded.names) if base(name) in READ)
    for epoch, batch in enumerate(batches):
        assert sorted(batch.index.tolist()) == read
        images, shrinks = planned(pipeline, encoded, batch.index, epoch)
        assert (max(shrinks) == 8) == scaled
        truth, _ = views_of(images, VIEWS, 0, epoch, batch.index)
        for view, expected in zip(batch.views, truth, strict=True):
            assert torch.equal(view, expected)


def test_resident(folder: Path) -> None:
    """What a run with the resident engine loads: the same are left out, and named."""
    left_out: dict[str, str] = {}
    config = Config(data=str(folder), load_size=16, holdout=0.5, corrupt_quota=1.0)
    count = 0
    for part in ("train", "test"):
        split = open_split(config, part, hold=True)
        assert isinstance(split, ArraySplit) and split.pixels.shape[1:] == (16, 16, 3)
        count += len(split)
        left_out |= split.skipped
    assert count == len(READ)
    assert {base(name) for name in left_out} == set(REFUSED)
    assert all(REFUSED[base(name)] in reason for name, reason in left_out.items())


def test_ffcv_after_convert(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "odd.beton"
    report = convert(folder, target, quota=1.0)
    assert {base(name) for name in report.skipped} == set(REFUSED)
    assert all(REFUSED[base(name)] in reason for name, reason in report.skipped.items())
    assert report.written == len(READ)
    batch = next(opened(target, "ffcv", batch_size=len(READ), scaled=False).epoch(0))
    encoded = open_encoded([file for file in sorted(folder.iterdir()) if file.name in READ])
    images = as_images([decode(encoded.read(i)) for i in range(len(encoded))])
    truth, _ = views_of(images.select(batch.index), VIEWS, 0, 0, batch.index)
    for name, view, expected in zip(
        [encoded.names[i] for i in batch.index.tolist()], batch.views[0], truth[0], strict=True
    ):  # noise does not survive a JPEG at quality 90; photographs do
        bound = 0.2 if base(name) in ("png_named.jpg", "palette.png", "alpha.png") else 0.04
        assert (view - expected).abs().mean() * 0.225 < bound, name


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data:UserWarning"
)  # of hopper_bad_exif.jpg, by Pillow
def test_doctor(folder: Path) -> None:
    found = diagnose(folder, workers=2)
    assert {base(name) for name in found.unreadable} == set(REFUSED)
    assert found.count == len(READ) + len(REFUSED)
    assert found.rotated == 10
    text = "\n".join(found.lines())
    assert f"{found.count} images, {len(REFUSED)} unreadable" in text
    assert "empty.jpg: the file is empty" in text


@pytest.mark.parametrize("engine", ["dali"])
def test_stop_and_quota(engine: str, folder: Path) -> None:
    count = len(READ) + len(REFUSED)
    with pytest.raises(
        UnreadableDataError, match=r"\.jpg cannot be read as an image \(.*\); repair or remove it"
    ):
        list(opened(folder, engine, batch_size=count, on_corrupt="stop").epoch(0))
    with pytest.raises(
        UnreadableDataError, match="1 of 35 images are unreadable, more than the quota"
    ):
        list(opened(folder, engine, batch_size=count, quota=0.01).epoch(0))
    within = opened(folder, engine, batch_size=count, quota=len(REFUSED) / count)
    assert len(next(within.epoch(0)).index) == len(READ)


def test_a_batch_without_images(folder: Path) -> None:
    files = [folder / "empty.jpg", folder / "text.jpg"]
    with pytest.raises(UnreadableDataError, match="a whole batch is unreadable"):
        list(opened(files, "dali", batch_size=2).epoch(0))


def test_a_file_that_vanishes(folder: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes((folder / "hopper_gray.jpg").read_bytes())
    pipeline = opened(tmp_path, "dali", batch_size=2)
    (tmp_path / "b.jpg").unlink()
    assert next(pipeline.epoch(0)).index.tolist() == [0]
    (reason,) = pipeline.unreadable.reasons.values()  # type: ignore[attr-defined]
    assert reason == "the file cannot be opened: No such file or directory"


@pytest.mark.parametrize("scaled", [True, False])
def test_dali_recovers(scaled: bool, folder: Path) -> None:
    """A JPEG that only DALI's decoder can find broken ends its pipeline; nothing else is lost."""
    good = folder / "hopper_orientation_2.jpg"
    assert plain_jpeg(np.fromfile(folder / "bad_tables.jpg", np.uint8)) == (128, 128)
    files = [good, good, folder / "bad_tables.jpg", good, good, good]
    pipeline = opened(files, "dali", batch_size=1, scaled=scaled)
    for epoch in (0, 1):
        batches = []
        for step in range(6):
            try:
                batches.append(next(pipeline.epoch(epoch, skip=step)))
            except UnreadableDataError:
                continue
        assert sorted(int(batch.index) for batch in batches) == [0, 1, 3, 4, 5]
    pairs = opened(files, "dali", batch_size=2, scaled=scaled)
    for epoch in range(3):
        indices = [batch.index.tolist() for batch in pairs.epoch(epoch)]
        assert sorted(map(len, indices)) == [1, 2, 2]
        assert sorted(i for batch in indices for i in batch) == [0, 1, 3, 4, 5]


def test_patches_need_large_enough_images(folder: Path) -> None:
    files = [folder / "hopper_gray.jpg", folder / "icc-after-SOF.jpg"]
    pipeline = opened(files, "dali", batch_size=2, views=(View(size=8, patch=64),))
    assert next(pipeline.epoch(0)).index.tolist() == [0]
    (reason,) = pipeline.unreadable.reasons.values()  # type: ignore[attr-defined]
    assert reason == "10 x 10 pixels: these views need at least 64 x 64"


def test_corrupt_mistakes() -> None:
    with pytest.raises(ValueError, match="choose 'skip' or 'stop'"):
        UnreadableImages(3, on_corrupt="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quota is 2"):
        UnreadableImages(3, quota=2)
