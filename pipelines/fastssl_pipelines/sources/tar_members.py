"""The members of an uncompressed tar, with every byte of the file accounted for.

`tarfile` ends at the first header that it cannot read, as if the archive ended there. This walk
goes on at the next readable header and reports what lies between.
"""

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastssl_pipelines.sources.unreadable import describe

BLOCK = tarfile.BLOCKSIZE  # 512 bytes
RECORD = tarfile.RECORDSIZE  # 10,240 bytes, to whose multiple writers pad an archive
READ_BYTES = 2**20


@dataclass(frozen=True)
class Member:
    """One regular file of a tar: `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


@dataclass
class TarIndex:
    """`members` in their order; `lost`: the damage found, by "TAR: byte OFFSET"."""

    members: list[Member] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)


def index_tar(path: Path) -> TarIndex:
    """The regular files of a tar, links resolved; archives that were concatenated are read as one.

    ValueError where the file is no uncompressed tar or ends before the blocks that end an archive.
    """
    index, found = TarIndex(), list[tarfile.TarInfo]()
    size = path.stat().st_size
    try:
        with (
            open(path, "rb") as file,
            tarfile.open(fileobj=file, ignore_zeros=True, mode="r:") as tar,
        ):
            end = 0
            for member in tar:
                _account(index, path, file, end, member.offset)
                end = tar.offset
                found.append(member)
            _end(index, path, file, end, size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar ({describe(error)}); unpack or copy it "
            "again"
        ) from error
    if not found and index.lost:
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar; unpack it, or copy it again"
        )
    files = {member.name: member for member in found if member.isreg()}
    for member in found:
        target = files.get(_target(member)) if member.islnk() or member.issym() else member
        if target is None:
            index.lost[f"{path}:{member.name}"] = f"a link to {member.linkname}, not in the archive"
        elif target.isreg():
            index.members.append(Member(member.name, target.offset_data, target.size))
    return index


def _target(link: tarfile.TarInfo) -> str:
    """The name of the member that a link points to."""
    return link.linkname if link.islnk() else _joined(link.name, link.linkname)


def _joined(name: str, link: str) -> str:
    """The name that a symbolic link at `name` points to, "..", too."""
    parts = list(Path(name).parent.parts)
    for part in Path(link).parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _account(index: TarIndex, path: Path, file: BinaryIO, start: int, stop: int) -> None:
    """Record what lies between two members, unless an archive ends and the next one begins."""
    damaged = _first_nonzero(file, start, stop)
    if damaged is not None:
        index.lost[f"{path}: byte {damaged}"] = "a damaged header; what follows it is lost"
    elif stop > start and (stop % RECORD or stop - start < 2 * BLOCK):
        index.lost[f"{path}: byte {start}"] = f"a hole of {stop - start} zeros in the archive"


def _end(index: TarIndex, path: Path, file: BinaryIO, start: int, size: int) -> None:
    """Check that the archive ends in blocks of zeros."""
    damaged = _first_nonzero(file, start, size)
    if size - start < BLOCK or (damaged is not None and size - damaged < BLOCK):
        raise ValueError(
            f"{path} ends at byte {size} without the blocks that end an archive: it is an "
            "incomplete copy; copy it again"
        )
    if damaged is not None:
        index.lost[f"{path}: byte {damaged}"] = "a damaged header; what follows it is lost"


def _first_nonzero(file: BinaryIO, start: int, stop: int) -> int | None:
    """The position of the first block in [start, stop) that is not of zeros."""
    for at in range(start, stop, READ_BYTES):
        file.seek(at)
        piece = file.read(min(READ_BYTES, stop - at))
        rest = piece.lstrip(b"\0")
        if rest:
            return at + (len(piece) - len(rest)) // BLOCK * BLOCK
    return None
