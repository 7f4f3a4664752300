"""The doctor decodes every image and reports problems; see test_unreadable.py for each odd file."""

import tarfile
from pathlib import Path

import pytest

from fastssl.cli import run
from fastssl_pipelines.sources.convert import convert
from fastssl_pipelines.sources.doctor import diagnose
from tests.helpers.requires import needs

pytestmark = needs("ffcv")


def test_a_healthy_tar(data: Path) -> None:
    seen: list[int] = []
    found = diagnose(
        data / "imagenette-224-1000.tar", workers=2, progress=lambda n, total: seen.append(n)
    )
    assert found.count == 1000 and not found.unreadable and not found.rotated
    assert set(found.sides) == {(224, 224)}
    assert found.lines() == [
        "1000 images, 0 unreadable (0.00%)",
        "part train: 750 images, 10 classes",
        "part val: 250 images, 10 classes",
        "1000 are plain JPEGs, for every decoder",
        "shorter side 224 to 224 px, median 224 px",
    ]
    assert seen == list(range(1, 1001))


def test_a_damaged_beton(data: Path, tmp_path: Path) -> None:
    with tarfile.open(data / "imagenette-224-1000.tar") as tar:
        members = [m for m in tar if m.isfile()][:9]
        tar.extractall(tmp_path, members=members, filter="data")
    path = convert(tmp_path / "train", tmp_path / "x.beton").target
    assert diagnose(path).unreadable == {}
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xd8\xff", 2**21)
    content[at : at + 300] = bytes(300)
    path.write_bytes(content)
    found = diagnose(path)
    assert list(found.unreadable) == [f"{path}: image 0"] and found.count == 9


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hopper_gray.jpg", "truncated_jpeg.jpg", "hopper_orientation_6.jpg"):
        (tmp_path / name).write_bytes((data / "jpeg-odd" / name).read_bytes())
    assert run(["doctor", "--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"unreadable: {tmp_path}/truncated_jpeg.jpg: image file is truncated" in out
    assert "3 images, 1 unreadable (33.33%)" in out
    assert "1 are turned by their EXIF tag, which is ignored by default" in out
    for arguments, message in (
        (["--data", "/nowhere"], "/nowhere does not exist"),
        ([], "the following arguments are required: --data"),
    ):
        assert run(["doctor", *arguments]) == 2
        assert message in capsys.readouterr().err
