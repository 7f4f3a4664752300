"""Data sets: images for training, labels for evaluation, read by different functions.

`load_array` and `open_files` never read a label and `load_labels` never reads a pixel, so training
code, which gets the results of the first two, has no access to labels.

Shapes: M data set, S pixels per side. Images are uint8 RGB (M, S, S, 3), labels int64 (M,).
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.sources.beton import Beton, beton_labels
from fastssl_pipelines.sources.convert import convert
from fastssl_pipelines.sources.image_files import Encoded, find_images, open_encoded
from fastssl_pipelines.sources.unreadable import OnCorrupt

Part = Literal["train", "test"]
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

TEST_FOLDERS = ("test", "val")
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
    return _npz_images(_existing(data), part, holdout)


def open_files(data: str, part: Part, holdout: float) -> Encoded:
    """The encoded images of one part, in a folder, tar shards or a .beton; nothing is decoded.

    ValueError where the data set is an array, and where there are no images.
    """
    if not is_encoded(data):
        raise ValueError(f"--data {data} is not a folder of images: pass --engine resident with it")
    path = _existing(data)
    if _is_shards(path) or path.suffix == ".beton":
        images = Beton(path) if path.suffix == ".beton" else open_encoded(path)
        return images.select(_held_out(np.arange(len(images)), part, holdout).tolist())
    paths, has_parts = _folder_files(path, part)
    if not has_parts:
        paths = list(_held_out(np.array(paths, dtype=object), part, holdout))
    return open_encoded(paths)


def beton_of(
    images: Encoded, on_corrupt: OnCorrupt, quota: float, log: Callable[[str], None]
) -> tuple[Beton | Path, dict[str, str]]:
    """(these images in a .beton, the unreadable ones by name with the reason).

    The .beton is the source itself, or a copy in the user's cache, JPEGs byte for byte, written
    once and without the unreadable images.
    """
    if isinstance(images, Beton):
        return images, {}
    key = hashlib.sha256(json.dumps([images.names, images.fingerprint()]).encode()).hexdigest()[:16]
    path = cache_folder() / f"{key}.beton"
    skipped_path = path.with_suffix(".skipped.json")
    if not path.exists():
        log(f"converting {len(images)} images to {path}, once")
        report = convert(images, path, on_corrupt=on_corrupt, quota=quota)
        skipped_path.write_text(json.dumps(report.skipped))
    skipped = json.loads(skipped_path.read_text()) if skipped_path.is_file() else {}
    return path, skipped


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastssl"


def is_encoded(data: str) -> bool:
    """Whether `data` is a folder, shards or a .beton of encoded images, rather than an array."""
    return not (data in ("digits", "cifar10") or _is_cifar_batches(data) or data.endswith(".npz"))


def _is_shards(path: Path) -> bool:
    return path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))


def load_labels(
    data: str, part: Part, holdout: float, *, skipped: Collection[str] = ()
) -> Labels | None:
    """The labels of the images of `load_array` or `open_files`, without those of the files named
    `skipped`; None where the data has none. For evaluation and oracles only."""
    if data == "digits":
        from sklearn.datasets import load_digits

        return _held_out(load_digits().target.astype(np.int64), part, holdout)
    if data == "cifar10" or _is_cifar_batches(data):
        return np.asarray(_cifar10(data, part).targets, dtype=np.int64)
    path = _existing(data)
    if path.suffix == ".npz":
        return _npz_labels(path, part, holdout)
    if _is_shards(path):
        return None
    labels = _beton_labels(path, part, holdout) if path.suffix == ".beton" else None
    labels = _folder_labels(path, part, holdout) if path.is_dir() else labels
    if labels is None or not skipped:
        return labels
    names = open_files(data, part, holdout).names
    return labels[[name not in skipped for name in names]]


def class_names(data: str) -> tuple[str, ...] | None:
    """The names of the classes in the order of their labels; None where the data has none, or
    they cannot be read: nothing depends on them."""
    if data == "digits":
        return tuple("0123456789")
    if data == "cifar10" or _is_cifar_batches(data):
        return CIFAR10_CLASSES
    try:
        path = _existing(data)
        paths, has_parts = _folder_files(path, "train") if path.is_dir() else ([], False)
    except (OSError, ValueError):
        return None
    names = _class_names(path, paths, has_parts)
    return tuple(sorted(set(names))) if names and all(names) else None


def _existing(data: str) -> Path:
    if not data:
        raise ValueError(
            "no data: pass --data with a folder of images, an .npz, 'digits' or 'cifar10'"
        )
    path = Path(data).expanduser()
    if not path.exists():
        raise ValueError(
            f"--data {data} does not exist; pass a folder of images, an .npz, 'digits' or 'cifar10'"
        )
    if path.is_file() and path.suffix not in (".npz", ".tar", ".beton"):
        raise ValueError(
            f"--data {data} is not an .npz, .tar or .beton file; pass one of these or a folder of"
            " images"
        )
    return path


def _held_out(rows: Any, part: Part, holdout: float) -> Any:
    """The rows of one part; the split depends on the number of rows, never on a seed."""
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
    return bool(data) and any(p.is_file() for p in _cifar_files(Path(data).expanduser()))


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
    path = Path(data).expanduser()
    beside, below = _cifar_files(path)
    folder = beside.parent if beside.is_file() else below.parent
    try:
        reader = type("CIFAR10", (CIFAR10,), {"base_folder": folder.name})
        return reader(folder.parent, train=part == "train")
    except RuntimeError as error:
        raise ValueError(
            f"{folder} is not the official CIFAR-10: {error}; {CIFAR10_HELP}"
        ) from error


def _npz_images(path: Path, part: Part, holdout: float) -> Images:
    with np.load(path, allow_pickle=False) as arrays:
        has_test = "x_test" in arrays.files
        key = "x_test" if has_test and part == "test" else "x_train"
        if key not in arrays.files:
            raise ValueError(
                f"{path} has no array {key}; it needs x_train (M, S, S, 3), for evaluation y_train"
            )
        images = arrays[key]
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    if images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise ValueError(
            f"{path}: {key} has shape {images.shape}; wanted (M, S, S, 3) or (M, S, S)"
        )
    if images.dtype != np.uint8:
        images = _to_uint8(images, f"{path}: {key}")
    return images if has_test else _held_out(images, part, holdout)


def _to_uint8(images: NDArray[Any], name: str) -> Images:
    """Floats in [0, 1] as uint8; ValueError for anything else."""
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name} is {images.dtype}; wanted uint8, or floats in [0, 1]")
    bad = ~np.isfinite(images).all(axis=(1, 2, 3))
    if bad.any():
        raise ValueError(
            f"{name} has NaN or Inf in {bad.sum()} images, the first at {bad.argmax()}; repair it"
        )
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"{name} has floats from {images.min():g} to {images.max():g}; scale them to [0, 1]"
        )
    return np.round(images * 255).astype(np.uint8)


def _npz_labels(path: Path, part: Part, holdout: float) -> Labels | None:
    with np.load(path, allow_pickle=False) as arrays:
        has_test = "x_test" in arrays.files
        key = "y_test" if has_test and part == "test" else "y_train"
        if key not in arrays.files:
            return None
        labels = arrays[key].astype(np.int64).reshape(-1)
    return labels if has_test else _held_out(labels, part, holdout)


def _folder_files(path: Path, part: Part) -> tuple[list[Path], bool]:
    """(image files of the split, sorted; whether the folder has a part for each split)."""
    test = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    has_parts = test is not None and (path / "train").is_dir()
    root = path
    if has_parts:
        root = path / "train" if part == "train" or test is None else test
    return find_images(root), has_parts


def _folder_labels(path: Path, part: Part, holdout: float) -> Labels | None:
    """A file's class is the first folder below its split's root; classes are numbered by the
    training part."""
    paths, has_parts = _folder_files(path, part)
    classes = _class_names(path, _folder_files(path, "train")[0], has_parts)
    names = _class_names(path, paths, has_parts)
    if not all(classes):
        return None
    if unknown := sorted(set(names) - set(classes)):
        raise ValueError(
            f"{path}: the test part has classes the training part lacks: {', '.join(unknown)}"
        )
    numbers = {name: k for k, name in enumerate(sorted(set(classes)))}
    labels = np.array([numbers[name] for name in names], dtype=np.int64)
    return labels if has_parts else _held_out(labels, part, holdout)


def _beton_labels(path: Path, part: Part, holdout: float) -> Labels | None:
    labels = beton_labels(path)
    return None if labels is None else _held_out(labels, part, holdout)


def _class_names(path: Path, files: Sequence[Path], has_parts: bool) -> list[str]:
    """The class folder of each file, "" for a file in no class folder."""
    depth = 1 if has_parts else 0
    parts = [file.relative_to(path).parts[depth:-1] for file in files]
    return [part[0] if part else "" for part in parts]
