"""What lies below a folder: every image is read, or counted with the reason."""

import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from fastssl_pipelines.sources.image_files import open_encoded
from fastssl_pipelines.sources.scan import scan


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")  # whatever the suffix says
    return path


def names(source: Path) -> list[str]:
    return [Path(name).name for name in open_encoded(source).names]


def test_linked_folders_and_roots_are_followed(tmp_path: Path) -> None:
    image(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    image(tmp_path / "data" / "cat" / "b.jpg")
    (tmp_path / "root").symlink_to(tmp_path / "data")
    assert open_encoded(tmp_path / "root").classes == ["cat", "dog"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    image(tmp_path / "cat" / "a.jpg")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    found = scan(tmp_path)
    assert [path.name for path in found.images] == ["a.jpg"]
    assert found.left_out == {"link to a folder above": 1}


def test_runs_below_the_data_are_no_images(tmp_path: Path) -> None:
    image(tmp_path / "cat" / "a.jpg")
    image(tmp_path / "runs" / "barlow" / "curves.png")
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "runs" / "barlow" / name).touch()
    assert names(tmp_path) == ["a.jpg"]
    assert open_encoded(tmp_path).left_out == {"folder of a training run": 1}


def test_one_folder_linked_twice_is_read_twice(tmp_path: Path) -> None:
    image(tmp_path / "cat" / "a.jpg")
    (tmp_path / "dog").symlink_to(tmp_path / "cat")
    assert len(scan(tmp_path).images) == 2


def test_broken_links_are_named(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "annex" / "gone.jpg")
    encoded = open_encoded(tmp_path)
    assert len(encoded) == 1 and encoded.lost == {f"{tmp_path}/b.jpg": "a broken link"}
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"holds no images.*; 1 x a broken link"):
        open_encoded(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(tmp_path / "cat" / "a.jpg")
    image(tmp_path / "dog" / "b.jpg")
    original = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "dog":
            raise PermissionError(13, "Permission denied")
        return original(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    encoded = open_encoded(tmp_path)
    assert names(tmp_path) == ["a.jpg"]
    assert encoded.lost == {f"{tmp_path}/dog": "the folder cannot be read: Permission denied"}


def test_every_suffix_of_an_image_counts(tmp_path: Path) -> None:
    wanted = [
        f"x{k}.{s}" for k, s in enumerate("jpg JPG pgm jfif jpe avif jp2 tga webp pfm".split())
    ]
    for name in wanted:
        image(tmp_path / name)
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "README").write_text("")
    assert names(tmp_path) == sorted(wanted)
    assert open_encoded(tmp_path).left_out == {"file ending in .csv": 1, "file without suffix": 1}


def test_shards_beside_an_image(tmp_path: Path) -> None:
    image(tmp_path / "preview.jpg")
    for k in range(2):
        member = image(tmp_path.parent / f"{tmp_path.name}-{k}.jpg")
        with tarfile.open(tmp_path / f"{k}.tar", "w") as tar:
            tar.add(member, f"{k}.jpg")
    assert [name.rpartition("/")[2] for name in open_encoded(tmp_path).names] == [
        "preview.jpg",
        "0.tar:0.jpg",
        "1.tar:1.jpg",
    ]


HIDDEN = (
    ".ipynb_checkpoints/a.jpg",
    "__MACOSX/a.jpg",
    "@eaDir/a.jpg",
    "lost+found/a.jpg",
    "._a.jpg",
)


def test_hidden_and_system_entries_are_skipped(tmp_path: Path) -> None:
    for name in ("cat/a.jpg", *(f"cat/{name}" for name in HIDDEN)):
        image(tmp_path / name)
    assert names(tmp_path) == ["a.jpg"]
    assert open_encoded(tmp_path).left_out == {"hidden or system entry": 5}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "cat", "./cat")
    packed = open_encoded(tmp_path / "x.tar")
    assert [name.rpartition(":")[2] for name in packed.names] == ["./cat/a.jpg"]
    assert packed.left_out == {"hidden or system entry": 5}
