"""The images and tar shards below a folder, and why the other files there are left out."""

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pfm .pgm .png .pnm .ppm .tga"
    " .tif .tiff .webp".split()
)
SYSTEM = frozenset(
    {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)

RUN_FILES = frozenset({"config.json", "metrics.jsonl"})  # of a run, which has pictures too


@dataclass
class Scan:
    """Files in a fixed order: by the parts of their paths.

    left_out: the number of files that are no images, by reason. lost: images that are named there
    and cannot be opened, with the reason: broken links, folders without permission.
    """

    images: list[Path] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    lost: dict[str, str] = field(default_factory=dict)


def is_hidden(name: str) -> bool:
    """Whether a path has a part that is hidden (`._x.jpg`, `.ipynb_checkpoints`) or of a system."""
    return any(
        part in SYSTEM or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


def is_image(name: str) -> bool:
    """Whether a file's suffix is one of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def scan(folder: Path) -> Scan:
    """All that lies below `folder`; links to files and folders are followed, each loop once."""
    found = Scan()
    _walk(folder, found, ())
    found.images.sort()
    found.shards.sort()
    return found


def _walk(folder: Path, found: Scan, above: tuple[tuple[int, int], ...]) -> None:
    """above: the identities of the folders that contain this one, to end loops of links."""
    try:
        stat = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        found.lost[str(folder)] = f"the folder cannot be read: {os.strerror(error.errno or 0)}"
        return
    identity = (stat.st_dev, stat.st_ino)
    if identity in above:
        found.left_out["link to a folder above"] += 1
        return
    if RUN_FILES <= {entry.name for entry in entries}:
        found.left_out["folder of a training run"] += 1  # such as runs/ below the data
        return
    for entry in entries:
        if is_hidden(entry.name):
            found.left_out["hidden or system entry"] += 1
        elif entry.is_dir():
            _walk(folder / entry.name, found, (*above, identity))
        else:
            _add(folder / entry.name, found)


def _add(path: Path, found: Scan) -> None:
    image = is_image(path.name)
    if not image and path.suffix != ".tar":
        found.left_out[
            f"file ending in {path.suffix}" if path.suffix else "file without suffix"
        ] += 1
        return
    try:
        path.stat()
    except OSError as error:
        broken = error.errno in (errno.ENOENT, errno.ELOOP)
        found.lost[str(path)] = (
            "a broken link" if broken else f"it cannot be opened: {os.strerror(error.errno or 0)}"
        )
        return
    (found.images if image else found.shards).append(path)
