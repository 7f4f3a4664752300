"""Data sets as arrays: images for training, labels for evaluation, read by different functions.

`load_images` never touches a label and `load_labels` never touches a pixel, so training code that
holds what the first returns has no way to a label.

Shapes: M data set, S pixels per side. Images are uint8 RGB (M, S, S, 3), labels int64 (M,).
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Split = Literal["train", "test"]
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

IMAGE_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
TEST_FOLDERS = ("test", "val")
CIFAR10_HELP = (
    "pass --data with an .npz (x_train, y_train, x_test, y_test), the folder cifar-10-batches-py, "
    "or a folder of images"
)


def load_images(data: str, split: Split, *, size: int, holdout: float) -> Images:
    """The images of one split, (M, S, S, 3) uint8. `size` is S of a folder; arrays keep theirs."""
    if data == "digits":
        return _split(_digits_images(), split, holdout)
    if data == "cifar10" or _is_cifar_batches(data):
        return np.asarray(_cifar10(data, split).data)
    path = _existing(data)
    if path.suffix == ".npz":
        return _npz_images(path, split, holdout)
    paths, names_split = _folder_files(path, split)
    if not names_split:
        paths = list(_split(np.array(paths, dtype=object), split, holdout))
    return _decode(paths, size)


def load_labels(data: str, split: Split, *, holdout: float) -> Labels | None:
    """The labels of the images of `load_images`, or None where the data has none. For evaluation
    only."""
    if data == "digits":
        from sklearn.datasets import load_digits

        return _split(load_digits().target.astype(np.int64), split, holdout)
    if data == "cifar10" or _is_cifar_batches(data):
        return np.asarray(_cifar10(data, split).targets, dtype=np.int64)
    path = _existing(data)
    if path.suffix == ".npz":
        return _npz_labels(path, split, holdout)
    return _folder_labels(path, split, holdout)


def require_memory(needed: int, what: str, remedy: str, device: torch.device | None = None) -> None:
    """ValueError where `what` needs more bytes than the device has free."""
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device and device.type == "cuda"
        else _available_bytes()
    )
    if needed > free:
        gib = 2**30
        raise ValueError(
            f"{what} needs {needed / gib:.1f} GiB, {free / gib:.1f} GiB are free; {remedy}"
        )


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


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
    if path.is_file() and path.suffix != ".npz":
        raise ValueError(f"--data {data} is a file but no .npz; pass a folder of images or an .npz")
    return path


def _split(rows: Any, split: Split, holdout: float) -> Any:
    """The rows of one part; which ones are held out depends on their number, never on a seed."""
    count = len(rows)
    held_out = round(count * holdout)
    if held_out < 1 or held_out >= count:
        raise ValueError(f"{count} images cannot be split with --holdout {holdout}; add images")
    order = np.random.default_rng(0).permutation(count)
    chosen = order[:held_out] if split == "test" else order[held_out:]
    return rows[np.sort(chosen)]


def _digits_images() -> Images:
    from sklearn.datasets import load_digits

    grey = np.round(load_digits().images * (255 / 16)).astype(
        np.uint8
    )  # (1797, 8, 8), 0 to 16 in the original
    return np.repeat(grey[..., None], 3, axis=-1)


def _is_cifar_batches(data: str) -> bool:
    return bool(data) and any(p.is_file() for p in _cifar_files(Path(data).expanduser()))


def _cifar_files(path: Path) -> tuple[Path, Path]:
    return path / "data_batch_1", path / "cifar-10-batches-py" / "data_batch_1"


def _cifar10(data: str, split: Split) -> Any:
    """torchvision's CIFAR10, which checks the files' checksums before it reads them."""
    from torchvision.datasets import CIFAR10

    if data == "cifar10":
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastssl"
        try:
            return CIFAR10(root, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"CIFAR-10 could not be downloaded ({error}); {CIFAR10_HELP}"
            ) from error
    path = Path(data).expanduser()
    beside, below = _cifar_files(path)
    folder = beside.parent if beside.is_file() else below.parent
    try:
        reader = type("CIFAR10", (CIFAR10,), {"base_folder": folder.name})
        return reader(folder.parent, train=split == "train")
    except RuntimeError as error:
        raise ValueError(
            f"{folder} is not the official CIFAR-10: {error}; {CIFAR10_HELP}"
        ) from error


def _npz_images(path: Path, split: Split, holdout: float) -> Images:
    with np.load(path, allow_pickle=False) as arrays:
        own = "x_test" in arrays.files
        key = "x_test" if own and split == "test" else "x_train"
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
    return images if own else _split(images, split, holdout)


def _to_uint8(images: NDArray[Any], name: str) -> Images:
    """Floats in [0, 1] as uint8; anything else is refused, NaN by name."""
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name} is {images.dtype}; wanted uint8, or floats in [0, 1]")
    bad = ~np.isfinite(images).all(axis=(1, 2, 3))
    if bad.any():
        raise ValueError(
            f"{name} holds NaN or Inf in {bad.sum()} images, the first at {bad.argmax()}; repair"
        )
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"{name} holds floats from {images.min():g} to {images.max():g}; scale them to [0, 1]"
        )
    return np.round(images * 255).astype(np.uint8)


def _npz_labels(path: Path, split: Split, holdout: float) -> Labels | None:
    with np.load(path, allow_pickle=False) as arrays:
        own = "x_test" in arrays.files
        key = "y_test" if own and split == "test" else "y_train"
        if key not in arrays.files:
            return None
        labels = arrays[key].astype(np.int64).reshape(-1)
    return labels if own else _split(labels, split, holdout)


def _folder_files(path: Path, split: Split) -> tuple[list[Path], bool]:
    """(image files of the split, sorted; whether the folder names its splits itself)."""
    test = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), None)
    names_split = test is not None and (path / "train").is_dir()
    root = path
    if names_split:
        root = path / "train" if split == "train" or test is None else test
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{root} holds no images; fastssl reads files ending in {known}")
    return paths, names_split


def _folder_labels(path: Path, split: Split, holdout: float) -> Labels | None:
    """A file's class is the first folder below its split's root; classes are numbered by the
    training part."""
    paths, names_split = _folder_files(path, split)
    classes = _class_names(path, _folder_files(path, "train")[0], names_split)
    names = _class_names(path, paths, names_split)
    if not all(classes):
        return None
    if strangers := sorted(set(names) - set(classes)):
        raise ValueError(
            f"{path}: the test part has classes the training part lacks: {', '.join(strangers)}"
        )
    numbers = {name: k for k, name in enumerate(sorted(set(classes)))}
    labels = np.array([numbers[name] for name in names], dtype=np.int64)
    return labels if names_split else _split(labels, split, holdout)


def _class_names(path: Path, files: Sequence[Path], names_split: bool) -> list[str]:
    """The class folder of each file, "" for a file in no class folder."""
    depth = 1 if names_split else 0
    parts = [file.relative_to(path).parts[depth:-1] for file in files]
    return [part[0] if part else "" for part in parts]


def _decode(paths: Sequence[Path], size: int) -> Images:
    """Files to squares: the shorter side resized to `size` with antialias, the centre cropped. (M,
    S, S, 3)"""
    require_memory(
        len(paths) * size * size * 3,
        f"holding {len(paths)} images of {size} px",
        "lower --load-size",
    )
    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # Pillow decodes without the interpreter's lock
        return np.stack(list(pool.map(lambda path: _decode_one(path, size), paths)))


def _decode_one(path: Path, size: int) -> Images:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
            return np.asarray(fitted)
    except Exception as error:  # Pillow's plug-ins raise what they like on a corrupt file
        raise ValueError(
            f"{path} cannot be read as an image ({error}); repair or remove it"
        ) from error
