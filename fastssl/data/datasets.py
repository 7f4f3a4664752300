"""Data sets: images for training, labels for evaluation, read by different functions.

`load_array` and `open_files` never read a label and `load_labels` never reads a pixel, so training
code, which gets the results of the first two, has no access to labels.

Shapes: M data set, S pixels per side. Images are uint8 RGB (M, S, S, 3), labels int64 (M,).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastssl.data import arrays
from fastssl.data.arrays import ArrayPart, ArraySource, Images, Labels
from fastssl_pipelines.sources.beton import Beton
from fastssl_pipelines.sources.convert import convert
from fastssl_pipelines.sources.decoding import Decoding
from fastssl_pipelines.sources.image_files import Encoded, open_encoded
from fastssl_pipelines.sources.unreadable import OnCorrupt, OnDamage

Part = Literal["train", "test"]

FILES = (".npz", ".npy", ".tar", ".beton")
CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR10_HELP = (
    "pass --data with an .npz (x_train, y_train, x_test, y_test), the folder cifar-10-batches-py, "
    "or a folder of images"
)


def load_array(data: str, part: Part, holdout: float) -> Images:
    """The images of one part of a data set that is an array, (M, S, S, 3) uint8."""
    if data == "digits":
        return _held_out(_digits_images(), part, holdout)
    if data == "cifar10" or _is_cifar_batches(data):
        return np.asarray(_cifar10(data, part).data)
    source, rows = _array_rows(_existing(data), part, holdout)
    return arrays.read_images(source, rows)


def open_files(data: str, part: Part, holdout: float, image_key: str = "") -> Encoded:
    """The encoded images of one part, in a folder, tar shards or a .beton; nothing is decoded.

    The test part is the folder test/, or val/ where that one has the classes of train/ and test/
    has none; where neither has them, images of train/ are held out. Images that the source names
    and that cannot be opened are `lost` in the training part. ValueError where the data set is an
    array, and where there are no images.
    """
    if not is_encoded(data):
        raise ValueError(f"--data {data} is not a folder of images: pass --engine resident with it")
    path = _existing(data)
    whole = Beton(path) if path.suffix == ".beton" else open_encoded(path, image_key=image_key)
    parts = whole.layout.parts
    first = np.array(parts.get("train", parts.get("", [])))
    test = test_part(whole)
    if test is None:
        chosen = _held_out(first, part, holdout)
    else:
        chosen = first if part == "train" else np.array(parts[test])
    images = whole.select(chosen.tolist())
    if part == "train":
        images.lost, images.left_out = whole.lost, whole.left_out + whole.layout.left_out
    return images


def test_part(whole: Encoded) -> str | None:
    """The part to evaluate on, None where images of the training part are held out.

    ValueError where its classes are not those of the training part.
    """
    parts, classes = whole.layout.parts, whole.layout.classes
    others = [part for part in ("test", "val") if part in parts]
    known = {classes[i] for i in parts.get("train", ())} - {""}
    if not known:
        return others[0] if others else None
    for part in others:
        found = {classes[i] for i in parts[part]}
        unknown = sorted(found - known)
        if "" in found or found == set(unknown[:1]):
            continue  # no labels: a flat part, or one folder that is no class
        arrays.require_known(unknown, f"{whole.source}: the {part} part")
        return part
    return None


def beton_of(
    images: Encoded,
    decoding: Decoding,
    on_damage: OnDamage,
    on_corrupt: OnCorrupt,
    quota: float,
    log: Callable[[str], None],
) -> tuple[Beton, dict[str, str]]:
    """(these images in a .beton, the unreadable ones by name with the reason).

    The .beton is the source itself, or a copy in the user's cache, JPEGs byte for byte, written
    once and without the unreadable images; its images keep the names of their files.
    """
    if isinstance(images, Beton):
        return images, {}
    settings = [images.names, images.fingerprint(), asdict(decoding), on_damage]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = cache_folder() / f"{key}.beton"
    skipped_path = path.with_suffix(".skipped.json")
    if not path.exists():
        log(f"converting {len(images)} images to {path}, once")
        report = convert(
            images,
            path,
            decoding=decoding,
            on_damage=on_damage,
            on_corrupt=on_corrupt,
            quota=quota,
            progress=periodic(log, "converted"),
        )
        skipped_path.write_text(json.dumps(report.skipped))
    skipped = json.loads(skipped_path.read_text()) if skipped_path.is_file() else {}
    beton = Beton(path)
    beton.names = [name for name in images.names if name not in skipped]
    return beton, skipped


def periodic(
    log: Callable[[str], None], done_what: str, period_s: float = 10.0
) -> Callable[[int, int], None]:
    """A function (done, total) that logs progress, at most every `period_s` seconds."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= period_s:
            last = time.monotonic()
            log(f"{done_what} {done:,} of {total:,} images")

    return progress


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastssl"


def is_encoded(data: str) -> bool:
    """Whether `data` is a folder, shards or a .beton of encoded images, rather than an array."""
    return data not in ("digits", "cifar10") and not (
        _is_cifar_batches(data) or data.endswith((".npz", ".npy")) or arrays.is_idx(_path(data))
    )


def _path(data: str) -> Path:
    return Path(data).expanduser()


def load_labels(data: str, part: Part, holdout: float, image_key: str = "") -> Labels | None:
    """The labels of the images of `load_array` or `open_files`; None where the data has none. For
    evaluation and oracles only."""
    if data == "digits":
        from sklearn.datasets import load_digits

        return _held_out(load_digits().target.astype(np.int64), part, holdout)
    if data == "cifar10" or _is_cifar_batches(data):
        return np.asarray(_cifar10(data, part).targets, dtype=np.int64)
    if is_encoded(data):
        return file_labels(open_files(data, part, holdout, image_key))
    train, test = _array_parts(_existing(data))
    if train.labels is None:
        return None
    labels = [_array_labels(found) for found in (train, test) if found is not None]
    numbers = arrays.numbered(labels[0], labels[-1], data)
    if test is None:
        return _held_out(numbers[0], part, holdout)
    return numbers[0 if part == "train" else 1]


def _array_labels(part: ArrayPart) -> NDArray[Any]:
    """The labels of the images; ValueError where there are more or fewer."""
    assert part.labels is not None
    found, wanted = arrays.read_labels(part.labels), arrays.count(part.images)
    if len(found) != wanted:
        raise ValueError(
            f"{part.labels.name} holds {len(found)} labels for {wanted} images: give one for each"
        )
    return found


def file_labels(images: Encoded) -> Labels | None:
    """The numbers of the images' classes, None where an image has none. For evaluation and oracles
    only."""
    numbers = images.class_numbers
    if "" in numbers or len(numbers) < 2:
        return None
    classes = images.classes
    arrays.require_known(sorted(set(classes) - set(numbers)), f"{images.source}: the test part")
    return np.array([numbers[name] for name in classes], dtype=np.int64)


def class_names(data: str) -> tuple[str, ...] | None:
    """The names of the classes in the order of their labels; None where the data has none, or
    they cannot be read: nothing depends on them."""
    if data == "digits":
        return tuple("0123456789")
    if data == "cifar10" or _is_cifar_batches(data):
        return CIFAR10_CLASSES
    try:
        numbers = open_files(data, "train", 0).class_numbers if is_encoded(data) else {}
    except (OSError, ValueError):
        return None
    return tuple(sorted(numbers, key=numbers.__getitem__)) if len(numbers) > 1 else None


def _existing(data: str) -> Path:
    if not data:
        raise ValueError(
            "no data: pass --data with a folder of images, an .npz, 'digits' or 'cifar10'"
        )
    path = _path(data)
    if not path.exists():
        raise ValueError(
            f"--data {data} does not exist; pass a folder of images, an .npz, 'digits' or 'cifar10'"
        )
    if path.is_file() and path.suffix not in FILES:
        raise ValueError(
            f"--data {data} is not a file ending in {', '.join(FILES)}; pass one of these or a"
            " folder of images"
        )
    return path


def _held_out(rows: Any, part: Part, holdout: float) -> Any:
    """The rows of one part; the split depends on the number of rows, never on a seed. With a
    `holdout` of 0 the training part has all rows, the test part none."""
    if not holdout:
        return rows if part == "train" else rows[:0]
    count = len(rows)
    held_out = round(count * holdout)
    if held_out < 1 or held_out >= count:
        raise ValueError(f"{count} images cannot be split with --holdout {holdout}; add images")
    order = np.random.default_rng(0).permutation(count)
    chosen = order[:held_out] if part == "test" else order[held_out:]
    return rows[np.sort(chosen)]


def _digits_images() -> Images:
    from sklearn.datasets import load_digits

    images = load_digits().images  # (1797, 8, 8), 0 to 16
    grey = np.round(images * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _is_cifar_batches(data: str) -> bool:
    return bool(data) and any(p.is_file() for p in _cifar_files(_path(data)))


def _cifar_files(path: Path) -> tuple[Path, Path]:
    return path / "data_batch_1", path / "cifar-10-batches-py" / "data_batch_1"


def _cifar10(data: str, part: Part) -> Any:
    """torchvision's CIFAR10, which checks the files' checksums before it reads them."""
    from torchvision.datasets import CIFAR10

    if data == "cifar10":
        try:
            return CIFAR10(cache_folder(), train=part == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"CIFAR-10 could not be downloaded ({error}); {CIFAR10_HELP}"
            ) from error
    beside, below = _cifar_files(_path(data))
    folder = beside.parent if beside.is_file() else below.parent
    try:
        reader = type("CIFAR10", (CIFAR10,), {"base_folder": folder.name})
        return reader(folder.parent, train=part == "train")
    except RuntimeError as error:
        raise ValueError(
            f"{folder} is not the official CIFAR-10: {error}; {CIFAR10_HELP}"
        ) from error


def _array_rows(path: Path, part: Part, holdout: float) -> tuple[ArraySource, NDArray[np.int64]]:
    """The array that holds the images of one part, and the rows that are this part."""
    train, test = _array_parts(path)
    if test is None:
        return train.images, _held_out(np.arange(arrays.count(train.images)), part, holdout)
    sizes = [" x ".join(map(str, arrays.size(found.images))) for found in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{path}: training images have {sizes[0]} px and test images {sizes[1]} px; resize one "
            "of them"
        )
    chosen = (train if part == "train" else test).images
    return chosen, np.arange(arrays.count(chosen))


def _array_parts(path: Path) -> tuple[ArrayPart, ArrayPart | None]:
    """(training part, test part); None where that is missing, empty, or lacks the labels that the
    training part has: then training images are held out."""
    train, test = arrays.find_part(path, "train"), arrays.find_part(path, "test")
    assert train is not None
    if test is None or arrays.count(test.images) == 0 or (train.labels and not test.labels):
        return train, None
    return train, test
