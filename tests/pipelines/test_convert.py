"""Converting: what was there before is there after, in every format, or nothing is there."""

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastssl.cli import run
from fastssl_pipelines.sources import convert as module
from fastssl_pipelines.sources.beton import Beton
from fastssl_pipelines.sources.convert import convert
from fastssl_pipelines.sources.decoding import decode
from fastssl_pipelines.sources.image_files import open_encoded
from fastssl_pipelines.sources.unreadable import UnreadableDataError, UnreadableError
from tests.helpers.requires import needs

pytestmark = needs("ffcv")


@pytest.fixture(scope="module")
def classes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imagenette: 10 classes of 3 images, unpacked."""
    root = tmp_path_factory.mktemp("nette")
    with tarfile.open(data / "imagenette-224-1000.tar") as tar:
        members = [m for m in tar if m.isfile() and m.name.startswith("train/")][::25]
        tar.extractall(root, members=members, filter="data")
    return root / "train"


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.JPEG"))


def test_jpegs_are_copied_byte_for_byte(classes: Path, tmp_path: Path) -> None:
    originals = [file.read_bytes() for file in files(classes)]
    assert convert(classes, tmp_path / "x.beton").written == 30
    beton = Beton(tmp_path / "x.beton")
    assert [beton.stored(k).tobytes() for k in range(30)] == originals
    convert(classes, tmp_path / "shards")
    shards = open_encoded(tmp_path / "shards")
    assert [shards.read(k).tobytes() for k in range(30)] == originals
    convert(shards, tmp_path / "again.beton")
    again = Beton(tmp_path / "again.beton")
    assert [again.stored(k).tobytes() for k in range(30)] == originals


def test_labels_travel(classes: Path, tmp_path: Path) -> None:
    convert(classes, tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "000000.tar") as tar:
        names = tar.getnames()
        labels = [int(tar.extractfile(n).read()) for n in names if n.endswith(".cls")]  # type: ignore[union-attr]
    assert labels == [k // 3 for k in range(30)]
    assert names[:2] == ["00000000.jpg", "00000000.cls"]
    convert(classes, tmp_path / "x.beton")
    with module.importing_ffcv():
        from ffcv.reader import Reader
    reader = Reader(str(tmp_path / "x.beton"))
    assert reader.field_names == ["image", "index", "label"]
    assert reader.metadata["f1"].tolist() == list(range(30))
    assert reader.metadata["f2"].tolist() == labels


def test_squares_for_the_resident_engine(classes: Path, tmp_path: Path) -> None:
    report = convert(classes, tmp_path / "x.npy", size=48)
    array = np.load(tmp_path / "x.npy")
    assert array.shape == (30, 48, 48, 3) and array.dtype == np.uint8 and report.written == 30
    for row, file in zip(array, files(classes), strict=True):
        image = Image.open(file).convert("RGB")
        expected = ImageOps.fit(image, (48, 48), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(row, np.asarray(expected))


def test_an_npz_becomes_any_format(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=pixels)
    convert(tmp_path / "x.npz", tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), pixels)
    convert(tmp_path / "x.npz", tmp_path / "x.beton", quality=100)
    data = Beton(tmp_path / "x.beton").stored(5)
    assert decode(data).shape == (9, 9, 3)


def test_sizes_and_quality(classes: Path, tmp_path: Path) -> None:
    convert(classes, tmp_path / "small", size=100)
    convert(classes, tmp_path / "poor", size=100, quality=20)
    small, poor = open_encoded(tmp_path / "small"), open_encoded(tmp_path / "poor")
    assert {min(decode(small.read(k)).shape[:2]) for k in range(30)} == {100}
    assert (
        sum(len(poor.read(k)) for k in range(30)) < sum(len(small.read(k)) for k in range(30)) / 2
    )


def test_shards_are_cut_by_size(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 100_000)
    convert(classes, tmp_path / "shards")
    shards = sorted((tmp_path / "shards").iterdir())
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert max(shard.stat().st_size for shard in shards) < 200_000
    assert len(open_encoded(tmp_path / "shards")) == 30


def test_it_resumes(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, with the last record torn; the second run converts only what is missing."""
    target = tmp_path / "x.beton"

    def interrupt(done: int, total: int) -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(classes, target, progress=interrupt)
    part = tmp_path / "x.beton.part"
    assert part.is_dir() and not target.exists()
    records = (part / "records").read_text()
    assert records.count("\n") == 17
    (part / "records").write_text(records[:-20])
    converted: list[int] = []
    original = module._Encoder.encode

    def count(encoder: module._Encoder, i: int) -> Any:
        converted.append(i)
        return original(encoder, i)

    monkeypatch.setattr(module._Encoder, "encode", count)
    assert convert(classes, target).written == 30
    assert sorted(converted) == list(range(16, 30))
    convert(classes, tmp_path / "whole.beton")
    assert target.read_bytes() == (tmp_path / "whole.beton").read_bytes()
    assert not part.exists()


def test_other_settings_start_anew(classes: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(classes, tmp_path / "x.npy", size=16, progress=interrupt)
    convert(classes, tmp_path / "x.npy", size=20)
    assert np.load(tmp_path / "x.npy").shape == (30, 20, 20, 3)


@pytest.mark.parametrize("name", ["x.npy", "x.beton", "x"])
@pytest.mark.parametrize("place", ["stage", "pack"])
def test_a_full_disk_leaves_nothing(
    name: str, place: str, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    if place == "stage":
        monkeypatch.setattr(module._Encoder, "encode", full)
    else:
        monkeypatch.setattr(module, "_verify", full)
    with pytest.raises(OSError, match=r"could not be written \(.*No space left.*nothing was left"):
        convert(classes, tmp_path / name, size=16)
    assert not list(tmp_path.iterdir())


def test_a_really_full_disk(classes: Path) -> None:
    """/dev/full refuses every byte; the target lies on it by way of a link."""
    with pytest.raises(OSError, match="could not be written"):
        convert(classes, Path("/dev/full/x.npy"), size=16)


def test_damage_while_writing_is_found(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module._pack

    def damaged(kind: str, part: Path, records: Any) -> Path:
        packed = original(kind, part, records)
        content = bytearray(packed.read_bytes())
        at = content.index((classes / files(classes)[7]).read_bytes()[-50:])
        content[at] ^= 1
        packed.write_bytes(content)
        return packed

    monkeypatch.setattr(module, "_pack", damaged)
    with pytest.raises(ValueError, match="reads back changed"):
        convert(classes, tmp_path / "x.beton")
    assert not list(tmp_path.iterdir())


def test_unreadable_images_are_reported(classes: Path, tmp_path: Path) -> None:
    shutil.copytree(classes, tmp_path / "in")
    (tmp_path / "in" / "note.jpg").write_text("not an image")
    with pytest.raises(UnreadableDataError, match=r"note\.jpg cannot be read.*1 of 31 images"):
        convert(tmp_path / "in", tmp_path / "out.beton")
    report = convert(tmp_path / "in", tmp_path / "out.beton", quota=0.05)
    assert report.written == 30 and len(Beton(tmp_path / "out.beton")) == 30
    assert list(report.skipped) == [str(tmp_path / "in" / "note.jpg")]
    with pytest.raises(UnreadableDataError, match="repair or remove it"):
        convert(tmp_path / "in", tmp_path / "stop.beton", on_corrupt="stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.beton"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.zip", {}, r"ends in \.zip; wanted \.npy"),
        ("x.npy", {}, "give it, such as --size 256"),
        ("x.beton", {"size": 1}, "size is 1"),
        ("x.beton", {"quality": 0}, "quality is 0"),
        ("x.beton", {"workers": 0}, "workers is 0"),
        ("there.beton", {}, "exists; remove it"),
    ],
)
def test_mistakes(
    name: str, options: dict[str, Any], message: str, classes: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.beton").write_text("precious")
    with pytest.raises(ValueError, match=message):
        convert(classes, tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.beton"]
    assert (tmp_path / "there.beton").read_text() == "precious"


def test_the_command(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x.npy"
    assert run(["convert", str(classes), str(target), "--size", "16", "--workers", "2"]) == 0
    assert f"30 images in {target}, 0 skipped" in capsys.readouterr().out.replace("\n", "")[-400:]
    for arguments, message in (
        ([str(classes), str(target), "--size", "16"], "exists; remove it"),
        (["/nowhere", str(tmp_path / "y.beton")], "/nowhere does not exist"),
        ([str(classes)], "the following arguments are required: target; see `fastssl convert"),
        ([str(classes), "y.beton", "--size", "big"], "invalid int value: 'big'"),
    ):
        assert run(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastssl: ") and message in error and error.count("\n") == 1


def test_records_are_plain(classes: Path, tmp_path: Path) -> None:
    """What a resumed run trusts: one line of JSON per image, in order."""

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(classes, tmp_path / "x", progress=interrupt)
    lines = (tmp_path / "x.part" / "records").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["name"] for record in records] == [str(f) for f in files(classes)[:5]]
    ends = [record["offset"] + record["length"] for record in records]
    assert [0, *ends[:-1]] == [record["offset"] for record in records]


def test_one_process_at_a_time_writes_a_target(classes: Path, tmp_path: Path) -> None:
    with module._locked(tmp_path / "x.npy"):
        with pytest.raises(ValueError, match=r"another process is converting to .*x\.npy; wait"):
            convert(classes, tmp_path / "x.npy", size=16)
        assert (tmp_path / "x.npy.lock").exists()
    convert(classes, tmp_path / "x.npy", size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_parts_are_converted_one_by_one(data: Path, tmp_path: Path) -> None:
    source = data / "imagenette-224-1000.tar"
    with pytest.raises(ValueError, match="has the parts train, val: convert each by itself, with"):
        convert(source, tmp_path / "x.npy", size=8)
    with pytest.raises(ValueError, match="has no part test; it has train, val"):
        convert(source, tmp_path / "x.npy", size=8, part="test")
    assert convert(source, tmp_path / "x.npy", size=8, part="val").written == 250


def test_what_a_format_cannot_hold_is_left_out(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("strip-70000x4.png", "three-extraneous-bytes-before-EOI.jpg"):
        shutil.copy(data / "odd-inputs" / name, folder)
    report = convert(folder, tmp_path / "x.beton", quota=0.5)
    assert list(report.skipped.values()) == [
        "70000 x 4 pixels: a JPEG holds at most 65500 a side; pass --size"
    ]
    assert report.written == 1 and "extraneous bytes" in str(report.damaged)
    beton = Beton(tmp_path / "x.beton")
    height, width = beton.size[0].tolist()
    assert beton.decode(0, 1, np.empty(3 * height * width, np.uint8)) == "", "encoded anew"


def test_a_beton_that_is_cut_while_it_is_open(classes: Path, tmp_path: Path) -> None:
    path = convert(classes, tmp_path / "x.beton").target
    beton = Beton(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UnreadableError, match="was cut since it was opened"):
        for i in range(len(beton)):
            beton.read(i)
