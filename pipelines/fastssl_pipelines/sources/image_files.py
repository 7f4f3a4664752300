"""Encoded images of a folder, of tar shards or in memory: indexed once, read on demand.

The index gives each image a number that is the same in every run, so that an engine can determine
the order of an epoch: exact skip, disjoint shards, and a shuffle over the whole data set rather
than a window of it.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.sources.layout import Layout, read_layout
from fastssl_pipelines.sources.scan import SUFFIXES, Scan, is_hidden, is_image, scan
from fastssl_pipelines.sources.tar_members import Member, TarIndex, index_tar
from fastssl_pipelines.sources.unreadable import UnreadableError

Bytes = NDArray[np.uint8]

WANTED = (
    "a folder of images, a .tar or a folder of .tar shards, a list of files, or a list of bytes"
)
LABEL_FIELDS = ("label", "cls", "class", "target")  # of a sample's .json in a tar
MASKS = ("mask", "seg", "label", "annot", "depth", "target")  # in the keys of what is no image


class FileSpan(NamedTuple):
    """The bytes of one image: `size` of them from `offset` on; size -1 is the whole file."""

    file: Path
    offset: int
    size: int


class Entry(NamedTuple):
    """One image: its name for people, its path below the source, its bytes, those of its label."""

    name: str
    path: str
    span: FileSpan | bytes
    label: FileSpan | None = None


class Encoded:
    """M encoded images. `names[i]` is the path of image i, prefixed with that of its tar; `read(i)`
    returns its bytes.

    lost: images that the source names and that cannot be opened, with the reason. left_out: what
    else lies there and is not read, counted by reason.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        source: str = "",
        lost: Mapping[str, str] | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        self._entries, self.source = entries, source
        self._whole: Encoded | None = None  # of which this is the part at the positions `_chosen`
        self._chosen: Sequence[int] = ()
        self.lost, self.left_out = dict(lost or {}), Counter(left_out or {})

    @cached_property
    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, i: int) -> Bytes:
        """The encoded bytes of image i. UnreadableError where its file cannot be opened."""
        return _read(self._entries[i].span)

    def select(self, chosen: Sequence[int]) -> "Encoded":
        """The images at positions `chosen`, renumbered from 0, with the classes that they have in
        the whole."""
        part = Encoded([self._entries[i] for i in chosen], self.source)
        part._whole, part._chosen = self, chosen
        return part

    @cached_property
    def layout(self) -> Layout:
        """The parts and the classes that the paths of the images state."""
        return read_layout([entry.path for entry in self._entries], self.source)

    @cached_property
    def classes(self) -> list[str]:
        """The class of each image, "" where it has none: of its label file, else of its path."""
        if self._whole is not None:
            return [self._whole.classes[i] for i in self._chosen]
        if any(entry.label for entry in self._entries):
            return [_label(entry) for entry in self._entries]
        return self.layout.classes

    @cached_property
    def class_numbers(self) -> dict[str, int]:
        """The number of each class of the training part, or of all images where it is no part."""
        if self._whole is not None:
            return self._whole.class_numbers
        parts = self.layout.parts
        return class_numbers(self.classes[i] for i in parts.get("train", parts.get("", [])))

    def fingerprint(self) -> list[Any]:
        """Changes when the images do: the names, sizes and modification times of their files."""
        spans = [entry.span for entry in self._entries]
        files = sorted({span.file for span in spans if isinstance(span, FileSpan)})
        stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        return [len(self), *stats]


def _read(span: FileSpan | bytes) -> Bytes:
    if isinstance(span, bytes):
        return np.frombuffer(span, np.uint8)
    try:
        return np.fromfile(span.file, np.uint8, count=span.size, offset=span.offset)
    except OSError as error:
        raise UnreadableError(f"the file cannot be opened: {error.strerror}") from error


def _label(entry: Entry) -> str:
    """The content of a .cls, or the label in a .json; "" where there is none."""
    if entry.label is None:
        return ""
    text = _read(entry.label).tobytes().decode(errors="replace").strip()
    if not text.startswith("{"):
        return text
    try:
        sample = json.loads(text)
    except json.JSONDecodeError:
        return ""
    return next((str(sample[name]) for name in LABEL_FIELDS if name in sample), "")


def class_numbers(classes: Iterable[str]) -> dict[str, int]:
    """The number of each class: that which its name is, where all names are numbers 0 to K - 1,
    else its rank among the sorted names, as torchvision's ImageFolder."""
    names = sorted(set(classes))
    if {str(k) for k in range(len(names))} == set(names):
        return {name: int(name) for name in names}
    return {name: k for k, name in enumerate(names)}


def is_encoded(source: Any) -> bool:
    """Whether `source` names files or holds encoded bytes, rather than pixels."""
    first = source[0] if isinstance(source, list | tuple) and source else source
    return isinstance(first, str | os.PathLike | bytes | Encoded)


def open_encoded(source: Any, *, image_key: str = "") -> Encoded:
    """The index of `source`: a folder of images and tar shards, a .tar, a list of either, or a list
    of bytes.

    Images are numbered by sorted name; members of tars (webdataset shards) by their order in the
    tar, after the files. image_key: of samples of several images in tars, the one to take, by what
    follows the first dot of its name, such as "input.jpg". ValueError where there are none.
    """
    if isinstance(source, Encoded):
        return source
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source).expanduser(), image_key)
    if isinstance(source, Sequence) and source and isinstance(source[0], bytes):
        names = (f"image {i} in memory" for i in range(len(source)))
        return Encoded([Entry(n, n, data) for n, data in zip(names, source, strict=True)])
    if isinstance(source, Sequence) and source and isinstance(source[0], str | os.PathLike):
        files = [Path(file).expanduser() for file in source]
        shards = [file for file in files if file.suffix == ".tar"]
        if shards and len(shards) == len(files):
            return _opened(Scan(shards=shards), None, "", image_key)
        return _opened(Scan(images=files), None, "", image_key)
    raise ValueError(f"source is {type(source).__name__}; wanted {WANTED}")


def _open_path(path: Path, image_key: str) -> Encoded:
    if path.is_file():
        if path.suffix != ".tar":
            raise ValueError(f"{path} is a file but no .tar; wanted {WANTED}")
        return _opened(Scan(shards=[path]), path.parent, str(path), image_key)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; wanted {WANTED}")
    return _opened(scan(path), path, str(path), image_key)


def _opened(found: Scan, root: Path | None, source: str, image_key: str) -> Encoded:
    """The images of the files and the tars in `found`; root: what their paths are relative to."""

    def relative(file: Path) -> str:  # of a file in a list, the folder it lies in is its class
        return "/".join(file.parts[-2:]) if root is None else file.relative_to(root).as_posix()

    entries = [Entry(str(file), relative(file), FileSpan(file, 0, -1)) for file in found.images]
    lost, left_out = dict(found.lost), Counter(found.left_out)
    for shard in found.shards:
        index = index_tar(shard)
        lost |= index.lost
        folder = "" if root is None else shard.parent.relative_to(root).as_posix()
        entries += _entries(shard, folder, index, left_out)
    entries = _chosen_images(entries, image_key, left_out)
    if not entries:
        raise ValueError(_nothing(source or "the source", lost, left_out))
    return Encoded(entries, source, lost, left_out)


def _nothing(source: str, lost: Mapping[str, str], left_out: Mapping[str, int]) -> str:
    known = " ".join(sorted(SUFFIXES))
    text = f"{source} holds no images: fastssl reads files ending in {known}, or .tar"
    counts = Counter(lost.values()) + Counter(left_out)
    return text + "".join(f"; {number} x {reason}" for reason, number in counts.most_common(5))


def _entries(shard: Path, folder: str, index: TarIndex, left_out: Counter[str]) -> Iterable[Entry]:
    """The images of one tar, each with the file of its label."""
    labels = {_split(m.name): m for m in index.members if m.name.endswith((".cls", ".json"))}
    for member in index.members:
        if is_hidden(member.name):
            left_out["hidden or system entry"] += 1
        elif is_image(member.name):
            key = _split(member.name)[0]
            label = labels.get((key, "cls")) or labels.get((key, "json"))
            path = f"{folder}/{member.name}"
            name = f"{shard}:{member.name}"
            yield Entry(
                name, path, _span(shard, member), None if label is None else _span(shard, label)
            )
        elif not member.name.endswith((".cls", ".json")):
            left_out[f"file ending in {Path(member.name).suffix} in a tar"] += 1


def _span(shard: Path, member: Member) -> FileSpan:
    return FileSpan(shard, member.offset, member.size)


def _split(name: str) -> tuple[str, str]:
    """(key, extension) of a file in a webdataset: up to the first dot of its name, and after."""
    folder, _, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}/{key}", extension.lower()


def _chosen_images(entries: list[Entry], image_key: str, left_out: Counter[str]) -> list[Entry]:
    """One image of each sample, where every sample in the tars holds the same several ones."""
    if image_key:
        chosen = [e for e in entries if _split(e.path)[1] == image_key.lower()]
        left_out[f"image of another key than {image_key}"] += len(entries) - len(chosen)
        return chosen
    samples: dict[tuple[Path, str], set[str]] = {}
    for entry in entries:
        if isinstance(entry.span, FileSpan) and entry.span.size >= 0:
            key, extension = _split(entry.path)
            samples.setdefault((entry.span.file, key), set()).add(extension)
    kinds = {frozenset(extensions) for extensions in samples.values()}
    if len(kinds) != 1 or len(next(iter(kinds))) == 1:
        return entries
    keys = sorted(next(iter(kinds)))
    images = [key for key in keys if not any(word in key for word in MASKS)]
    if len(images) != 1:
        raise ValueError(
            f"every sample holds the images {', '.join(keys)}: choose one with --image-key"
        )
    return _chosen_images(entries, images[0], left_out)
