"""The DALI engine beyond the common contract: sources, shards, its library missing."""

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl_pipelines import Pipeline, View, open_pipeline
from fastssl_pipelines.augment import views_of
from fastssl_pipelines.sources.decoding import decode
from fastssl_pipelines.sources.image_files import open_encoded
from fastssl_pipelines.sources.jpeg import plain_jpeg
from tests.helpers.expected_decode import planned
from tests.helpers.requires import needs

pytestmark = needs("nvidia.dali")

VIEWS = (View(size=16), View(size=16, blur=0.5))


def opened(source: Any, **changes: Any) -> Pipeline:
    given = {"views": VIEWS, "batch_size": 8, "seed": 2, "device": "cpu", **changes}
    return open_pipeline("dali", source, **given)


def test_a_tar_is_read_in_place(data: Path, tmp_path: Path) -> None:
    """Straight from its bytes, unpacked by nobody, as from its files."""
    path = data / "imagenette-224-1000.tar"
    encoded = open_encoded(path)
    assert len(encoded) == 1000
    with tarfile.open(path) as tar:
        names = [m.name for m in tar if m.isfile()]
        tar.extractall(tmp_path, members=[tar.getmember(n) for n in names[:5]], filter="data")
    assert encoded.names == [f"{path}:{name}" for name in names]
    for i in range(5):
        assert encoded.read(i).tobytes() == (tmp_path / names[i]).read_bytes()
    assert encoded.classes[0] == Path(names[0]).parent.name


def test_ranks_read_disjoint_members(data: Path) -> None:
    path = data / "imagenette-224-1000.tar"
    seen = [
        {i for batch in opened(path, shard=(rank, 4), batch_size=100).epoch(0)
         for i in batch.index.tolist()}
        for rank in range(4)
    ]  # fmt: skip
    assert all(len(part) == 200 for part in seen)
    assert len(set.union(*seen)) == 800


def test_a_class_sorted_tar_mixes(data: Path) -> None:
    """The chi-square of the classes in the batches of a real, sorted data set."""
    encoded = open_encoded(data / "imagenette-224-1000.tar")
    classes = sorted(set(encoded.classes))
    label = torch.tensor([classes.index(name) for name in encoded.classes])
    order = opened(encoded, batch_size=100).order(0)  # type: ignore[attr-defined]
    counts = torch.nn.functional.one_hot(label[order], 10).sum(1).double()
    chi_square = ((counts - 10) ** 2 / 10).sum(1)  # 9 degrees of freedom
    assert chi_square.max() < 30  # p < 0.001 for each


def test_decoded_size_is_read_from_the_header(data: Path) -> None:
    for file in sorted((data / "imagenet-samples").iterdir())[::10]:
        encoded = np.fromfile(file, np.uint8)
        assert plain_jpeg(encoded) == decode(encoded).shape[:2]
        for cut in (2, 20, 200, len(encoded) // 2, len(encoded) - 1):
            assert plain_jpeg(encoded[:cut]) is None


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_jpegs_are_decoded_smaller(shrink: int, data: Path) -> None:
    """To exactly the size that was planned, and the look of the whole."""
    files = [np.fromfile(f, np.uint8) for f in sorted((data / "imagenet-samples").iterdir())[::20]]
    rng = np.random.default_rng(0)
    for height, width, mode in ((16, 9, "RGB"), (15, 23, "L"), (17, 31, "RGB"), (64, 33, "RGB")):
        coarse = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        photo.convert(mode).save(file, "JPEG", quality=95)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    for file in files:
        whole, small = decode(file), decode(file, shrink=shrink)
        height, width = whole.shape[:2]
        assert small.shape == (-(-height // shrink), -(-width // shrink), 3)
        inside = whole[: height // shrink * shrink, : width // shrink * shrink].astype(int)
        boxes = inside.reshape(height // shrink, shrink, width // shrink, shrink, 3).mean((1, 3))
        cut = small[: height // shrink, : width // shrink]
        assert np.abs(boxes - cut).mean() < 4


def test_turned_images_are_planned_as_they_are_shown(data: Path) -> None:
    """EXIF turns this one by 90 degrees: its crops are drawn on 1200 x 1800 px."""
    source = [data / "jpeg-odd" / "Landscape_6.jpg"]
    pipeline: Any = opened(source, batch_size=1, oriented=True)
    assert pipeline._load(0, 2)[1:3] == (1200, 1800)
    for epoch in range(3):
        batch = next(pipeline.epoch(epoch))
        images, (shrink,) = planned(pipeline, pipeline.encoded, batch.index, epoch)
        assert shrink > 1 and images.pixels(0).shape == (1200 // shrink, 1800 // shrink, 3)
        truth, _ = views_of(images, VIEWS, 2, epoch, batch.index)
        assert all(torch.equal(a, b) for a, b in zip(batch.views, truth, strict=True))


def test_pixels_that_lie_apart_are_gathered(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What DALI does not hold in one piece gives the same views."""
    files = sorted((data / "imagenet-samples").iterdir(), key=lambda f: f.stat().st_size)[:16]
    one_piece = list(opened(files, scaled=False).epoch(0))
    monkeypatch.setattr("fastssl_pipelines.engines.dali._Dali.flat", lambda self, scheduled: None)
    for a, b in zip(one_piece, opened(files, scaled=False).epoch(0), strict=True):
        assert torch.equal(a.views[1], b.views[1])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere", "/nowhere does not exist"),
        ([], "source is list; wanted a folder"),
        (np.zeros((3, 8, 8, 3), np.uint8), "source is ndarray; wanted a folder"),
    ],
)
def test_mistakes(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(source)


def test_bad_containers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images: fastssl reads files ending in"):
        opened(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b not a tar" * 100)
    with pytest.raises(ValueError, match=r"x\.tar cannot be read as an uncompressed tar"):
        opened(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"))
    with pytest.raises(ValueError, match=r"x\.tar holds no images"):
        opened(tmp_path / "x.tar")


def test_a_missing_library_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"pip install 'fastssl-torch\[dali\]'"):
        opened(data / "imagenette-224-1000.tar")
