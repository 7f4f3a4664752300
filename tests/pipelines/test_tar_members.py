"""A tar is read to its last byte: what is lost is named, what is cut is refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from fastssl_pipelines.sources.image_files import open_encoded
from fastssl_pipelines.sources.tar_members import index_tar
from fastssl_pipelines.sources.unreadable import UnreadableDataError, UnreadableImages


def add(tar: tarfile.TarFile, name: str, content: bytes = b"x") -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def packed(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, name, name.encode())
    return path


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("damaged-header-member-5-of-10.tar", 8192),
        ("one-bit-flipped-header.tar", 8192),
    ],
)
def test_a_damaged_header(name: str, offset: int, data: Path) -> None:
    path = data / "odd-inputs" / name
    index = index_tar(path)
    assert [int(member.name[:8]) for member in index.members] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert index.lost == {f"{path}: byte {offset}": "a damaged header; what follows it is lost"}
    encoded = open_encoded(path)
    with pytest.raises(UnreadableDataError, match=f"byte {offset} cannot be read.*1 of 10 images"):
        UnreadableImages(len(encoded) + len(encoded.lost), lost=encoded.lost)


def test_a_hole_of_zeros(data: Path, tmp_path: Path) -> None:
    path = data / "odd-inputs" / "hole-of-zeros.tar"
    index = index_tar(path)
    assert len(index.members) == 9 and len(index.lost) == 1
    whole = bytearray(packed(tmp_path / "x.tar", *(f"{k}.jpg" for k in range(9))).read_bytes())
    whole[1024 * 4 : 1024 * 5] = bytes(1024)  # one header and its one block of content
    (tmp_path / "x.tar").write_bytes(whole)
    index = index_tar(tmp_path / "x.tar")
    assert len(index.members) == 8
    assert index.lost == {f"{tmp_path}/x.tar: byte 4096": "a hole of 1024 zeros in the archive"}


@pytest.mark.parametrize("keep", [0, 1, 511, 512])
def test_an_incomplete_copy_is_refused(keep: int, data: Path, tmp_path: Path) -> None:
    whole = packed(tmp_path / "x.tar", "a.jpg", "b.jpg").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 1024 + keep])  # within the second header
    with pytest.raises(ValueError, match=r"x.tar .*(incomplete copy|copy it again)"):
        index_tar(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="ends at byte 12488 without the blocks that end an"):
        open_encoded(data / "odd-inputs" / "cut-in-header.tar")


def test_concatenated_archives_are_read_as_one(tmp_path: Path) -> None:
    first = packed(tmp_path / "a.tar", "a.jpg").read_bytes()
    second = packed(tmp_path / "b.tar", "b.jpg").read_bytes()
    (tmp_path / "c.tar").write_bytes(first + second)
    index = index_tar(tmp_path / "c.tar")
    assert [member.name for member in index.members] == ["a.jpg", "b.jpg"] and not index.lost


def test_bytes_after_the_end_are_reported(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", "a.jpg")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"z" * 1024)
    assert list(index_tar(path).lost) == [f"{path}: byte {size}"]


def test_links_are_resolved(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, target in (
            ("dog/first.jpg", tarfile.SYMTYPE, "../cat/a.jpg"),  # before its target
            ("dog/hard.jpg", tarfile.LNKTYPE, "cat/a.jpg"),
            ("dog/gone.jpg", tarfile.SYMTYPE, "../cat/none.jpg"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
        add(tar, "cat/a.jpg", b"pixels")
    encoded = open_encoded(path)
    assert [encoded.read(i).tobytes() for i in range(len(encoded))] == [b"pixels"] * 3
    assert encoded.classes == ["dog", "dog", "cat"]
    assert list(encoded.lost) == [f"{path}:dog/gone.jpg"]


def test_labels_of_a_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for k in range(12):
            add(tar, f"{k:03d}.jpg")
            if k % 2:
                add(tar, f"{k:03d}.cls", str(k % 3).encode())
            else:
                add(tar, f"{k:03d}.json", json.dumps({"label": k % 3, "width": 4}).encode())
    assert open_encoded(path).classes == [str(k % 3) for k in range(12)]


def test_the_image_of_a_sample_with_several(data: Path, tmp_path: Path) -> None:
    path = data / "odd-inputs" / "image-mask-pairs.tar"
    encoded = open_encoded(path)
    assert [name.rpartition(":")[2] for name in encoded.names] == [
        f"{k:06d}.input.jpg" for k in range(4)
    ]
    assert encoded.left_out["image of another key than input.jpg"] == 4
    masks = open_encoded(path, image_key="mask.png")
    assert {name.rpartition(".")[2] for name in masks.names} == {"png"}
    two = packed(tmp_path / "two.tar", "0.left.jpg", "0.right.jpg", "1.left.jpg", "1.right.jpg")
    with pytest.raises(
        ValueError, match=r"images left\.jpg, right\.jpg: choose one with --image-key"
    ):
        open_encoded(two)
    assert len(open_encoded(two, image_key="left.jpg")) == 2
    assert len(open_encoded(packed(tmp_path / "c.tar", "0.jpg", "0.png", "1.jpg"))) == 3
