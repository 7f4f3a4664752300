"""The FFCV engine: files of either writer, scaled decoding, page order, both ways of reading."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl_pipelines import View, open_pipeline
from fastssl_pipelines.engines.ffcv import FfcvPipeline
from fastssl_pipelines.sources.beton import Beton, importing_ffcv
from fastssl_pipelines.sources.convert import convert
from fastssl_pipelines.sources.unreadable import UnreadableDataError
from tests.helpers.requires import needs

pytestmark = needs("ffcv")

VIEWS = (View(size=16), View(size=12, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8))


@pytest.fixture(scope="module")
def files(data: Path) -> list[Path]:
    """Real JPEGs around the median size, RGB and gray."""
    found = sorted((data / "imagenet-samples").iterdir(), key=lambda f: f.stat().st_size)
    return found[60:84]


@pytest.fixture(scope="module")
def beton(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(files, tmp_path_factory.mktemp("beton") / "x.beton").target


def opened(source: Any, **changes: Any) -> FfcvPipeline:
    given = {"views": VIEWS, "batch_size": 5, "seed": 1, "device": "cpu", **changes}
    pipeline = open_pipeline("ffcv", source, **given)
    assert isinstance(pipeline, FfcvPipeline)
    return pipeline


def write(path: Path, images: list[np.ndarray], **options: Any) -> Path:
    """A file of FFCV's own writer, as its users have them: index last, and fields we do not
    read."""
    with importing_ffcv():
        from ffcv.fields import FloatField, IntField, JSONField, RGBImageField
        from ffcv.writer import DatasetWriter
    fields = {"weight": FloatField(), "photo": RGBImageField(**options)}
    fields |= {"note": JSONField(), "index": IntField()}
    count = len(images)
    samples = [(0.5, image, {"n": k}, count - 1 - k) for k, image in enumerate(images)]
    writer = DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=1)
    writer.from_indexed_dataset(samples)
    return path


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # FFCV's writer forks
@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion"])
def test_files_of_ffcvs_writer(mode: str, files: list[Path], tmp_path: Path) -> None:
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files[:12]]
    path = write(tmp_path / "x.beton", images, write_mode=mode, jpeg_quality=95)
    read = Beton(path)
    assert int(read.raw.sum()) in {"raw": (12,), "jpg": (0,)}.get(mode, range(1, 12))
    assert read.row.tolist() == list(range(11, -1, -1)), "the index field numbers the images"
    for row, image in enumerate(images):
        height, width = read.size[row].tolist()
        assert (height, width, 3) == image.shape
        out = np.empty(image.size, np.uint8)
        assert read.decode(row, 1, out) == ""
        difference = np.abs(out.reshape(image.shape).astype(int) - image)
        assert difference.mean() < (0.01 if read.raw[row] else 6)
    batch = next(opened(path, batch_size=12).epoch(0))
    assert sorted(batch.index.tolist()) == list(range(12))


def test_plain_ffcv_reads_what_convert_writes(files: list[Path], beton: Path) -> None:
    with importing_ffcv():
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
    pipelines = {"image": [CenterCropRGBImageDecoder((64, 64), 1.0)], "index": [IntDecoder()]}
    loader = Loader(
        str(beton), batch_size=8, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines
    )
    for start, (images, index, *_) in zip(range(0, 24, 8), loader, strict=True):
        assert index.ravel().tolist() == list(range(start, start + 8))
        for row, file in zip(images, files[start : start + 8], strict=True):
            whole = Image.open(file).convert("RGB")
            side = min(whole.size)
            left, top = (whole.width - side) // 2, (whole.height - side) // 2
            crop = whole.crop((left, top, left + side, top + side)).resize((64, 64), Image.BOX)
            assert np.abs(np.asarray(crop).astype(int) - row).mean() < 6


def test_both_ways_of_reading_give_one_stream(beton: Path) -> None:
    for a, b in zip(
        opened(beton, os_cache=True).epoch(0), opened(beton, os_cache=False).epoch(0), strict=True
    ):
        assert torch.equal(a.index, b.index) and torch.equal(a.views[1], b.views[1])


def test_scaled_decoding_covers_every_view(
    files: list[Path], beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decoded smaller still has a pixel for each pixel of each view, of the same look."""
    shrinks: list[int] = []
    original = Beton.decode

    def spy(self: Beton, row: int, shrink: int, out: Any, smallest: int) -> str:
        shrinks.append(shrink)
        return original(self, row, shrink, out, smallest)

    monkeypatch.setattr(Beton, "decode", spy)
    views = (View(size=24, scale=(0.3, 1.0)), View(size=32, scale=(0.3, 1.0)))
    scaled = next(opened(beton, batch_size=24, views=views, keep_params=True).epoch(0))
    assert {4, 8} <= set(shrinks) <= {1, 2, 4, 8}
    for params, view in zip(scaled.params, views, strict=True):
        smallest = torch.minimum(params["height"], params["width"])
        assert smallest.min() >= view.size
    shrinks.clear()
    whole = (View(size=24, scale=(1.0, 1.0), ratio=(0.1, 10.0)),)  # one geometry at every scale
    small, full = (
        next(opened(beton, batch_size=24, views=whole, scaled=scaled).epoch(0)).views[0]
        for scaled in (True, False)
    )
    assert set(shrinks) == {1, 8}
    filters = [
        np.stack([np.asarray(Image.open(f).convert("RGB").resize((24, 24), kind)) for f in files])
        for kind in (Image.BOX, Image.BILINEAR)
    ]
    box_for_triangle = np.abs(filters[0].astype(int) - filters[1]).mean() / 255
    assert ((small - full).abs() * 0.225).mean() < box_for_triangle, "more than a choice of filter"
    shrinks.clear()
    next(opened(beton, batch_size=24, views=(View(size=16, patch=32),)).epoch(0))
    assert set(shrinks) == {1}, "a patch is measured in the image's own pixels"


def test_scaled_pixels_are_libjpegs(files: list[Path], beton: Path) -> None:
    read = Beton(beton)
    for row in range(0, 24, 5):
        height, width = read.size[row].tolist()
        for shrink in (2, 4, 8):
            small = (-(-height // shrink), -(-width // shrink))
            out = np.empty(3 * small[0] * small[1], np.uint8)
            assert read.decode(row, shrink, out) == ""
            image = Image.open(files[row])
            image.draft("RGB", (small[1], small[0]))
            expected = np.asarray(image.convert("RGB"))
            if expected.shape[:2] == small:
                assert np.abs(out.reshape(*small, 3).astype(int) - expected).mean() < 6


def test_quasi_random_order_stays_in_windows_of_pages(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 300, 300, 3), dtype=np.uint8)
    path = tmp_path / "pages.beton"
    write(path, list(pixels), write_mode="raw")
    monkeypatch.setattr("fastssl_pipelines.engines.ffcv.WINDOW", 2)
    pipeline = opened(path, order="quasi_random", batch_size=4)
    page = pipeline.beton.page[pipeline.beton.row]
    assert int(page.max()) >= 9
    orders = [pipeline.order(epoch).flatten() for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(64))
        turns = [len(set(page[order[k : k + 14]].tolist())) for k in range(0, 50, 14)]
        assert max(turns) <= 5  # a window holds 2 pages of 7 images; a stretch meets 2 or 3 windows
    assert not torch.equal(orders[0], orders[1])
    at_random = opened(path, batch_size=4).order(0).flatten()
    assert len(set(page[at_random[:14]].tolist())) > 5
    again = opened(path, order="quasi_random", batch_size=2, shard=(1, 2))
    assert torch.equal(again.order(0), pipeline.order(0)[:, 2:])


def test_a_broken_row_is_named(beton: Path, tmp_path: Path) -> None:
    """A JPEG damaged inside the file: left out, named with its row."""
    read = Beton(beton)
    content = bytearray(beton.read_bytes())
    start = read._start[7]
    content[start : start + 400] = bytes(400)
    path = tmp_path / "damaged.beton"
    path.write_bytes(content)
    pipeline = opened(path, batch_size=24, quota=0.1)
    for epoch in (0, 1):
        assert 7 not in next(pipeline.epoch(epoch)).index
    assert list(pipeline.unreadable.reasons) == [f"{path}: image 7"]
    for options, message in (
        ({"on_corrupt": "stop"}, "image 7 cannot be read"),
        ({"quota": 0.01}, "1 of 24 images are unreadable, more than the quota"),
    ):
        with pytest.raises(UnreadableDataError, match=message):
            next(opened(path, batch_size=24, **options).epoch(0))


def test_mistakes(beton: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.beton").write_bytes(b"not a beton at all" * 10)
    (tmp_path / "short.beton").write_bytes(beton.read_bytes()[:300_000])
    (tmp_path / "cut.beton").write_bytes(beton.read_bytes()[:-100])
    for source, message in (
        (tmp_path, "engine ffcv reads a .beton: `fastssl convert` makes one"),
        (tmp_path / "no.beton", r"no\.beton does not exist"),
        (tmp_path / "bad.beton", r"bad\.beton is no .beton file of version 2"),
        (tmp_path / "short.beton", "breaks off"),
        (tmp_path / "cut.beton", "breaks off: copy or convert it again"),
        (np.zeros((3, 8, 8, 3), np.uint8), "engine ffcv reads a .beton"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(source)
    with pytest.raises(ValueError, match="choose 'random' or 'quasi_random'"):
        opened(beton, order="sequential")


def test_a_missing_library_is_one_line(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv.reader", None)
    with pytest.raises(ValueError, match=r"pip install 'fastssl-torch\[ffcv\]'.*setuptools"):
        opened(beton)
