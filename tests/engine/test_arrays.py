"""Arrays of every layout that people have, read in one pass; labels checked before use."""

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastssl.config import Config
from fastssl.data.arrays import read_images
from fastssl.data.datasets import _array_rows, load_array, load_labels
from fastssl.data.splits import open_split

X = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
Y = np.arange(12) % 3


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def images(data: str, part: Any = "train") -> Any:
    return load_array(data, part, holdout=0.25)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (X, X),
        (X[..., 0], np.repeat(X[..., :1], 3, -1)),
        (X[..., :1], np.repeat(X[..., :1], 3, -1)),
        (np.moveaxis(X, -1, 1).copy(), X),
        (np.moveaxis(X[..., :1], -1, 1).copy(), np.repeat(X[..., :1], 3, -1)),
        (np.concatenate([X, X[..., :1]], axis=-1), X),
        ((X / 255).astype(np.float32), X),
        (X[:, :6], X[:, :6]),
    ],
)
def test_layouts(x: Any, expected: Any, tmp_path: Path) -> None:
    data = saved(tmp_path / "x.npz", x_train=x, x_test=x[::-1].copy())
    np.testing.assert_array_equal(images(data), expected)
    np.testing.assert_array_equal(images(data, "test"), expected[::-1])


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "val_images", "val_labels"),
        ("x", "y", "x_test", "y_test"),
        ("arr_0", "arr_1", "x_test", "y_test"),
    ],
)
def test_names(names: tuple[str, ...], tmp_path: Path) -> None:
    arrays = (X, Y, X[:6] // 2, Y[:6])
    data = saved(tmp_path / "x.npz", **dict(zip(names, arrays, strict=True)))
    np.testing.assert_array_equal(images(data), X)
    np.testing.assert_array_equal(images(data, "test"), X[:6] // 2)
    for part, expected in (("train", Y), ("test", Y[:6])):
        np.testing.assert_array_equal(load_labels(data, part, 0.25), expected)  # type: ignore[arg-type]


def test_held_out_rows_are_those_of_one_permutation(tmp_path: Path) -> None:
    data = saved(tmp_path / "x.npz", x_train=X, y_train=Y)
    chosen = np.sort(np.random.default_rng(0).permutation(12)[:3])
    np.testing.assert_array_equal(images(data, "test"), X[chosen])
    np.testing.assert_array_equal(load_labels(data, "test", 0.25), Y[chosen])
    np.testing.assert_array_equal(images(data), np.delete(X, chosen, axis=0))


def test_npy_and_idx(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.testing.assert_array_equal(
        np.sort(
            np.concatenate([images(str(tmp_path / "x.npy"), p) for p in ("train", "test")]), axis=0
        ),
        np.sort(X, axis=0),
    )
    for part, stop in (("train", 12), ("t10k", 6)):
        head = b"\0\0\x08\x03" + np.array([stop, 8, 8], ">u4").tobytes()
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(head + X[:stop, ..., 0].tobytes())
        head = b"\0\0\x08\x01" + np.array([stop], ">u4").tobytes()
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(
            head + Y[:stop].astype(np.uint8).tobytes()
        )
    data = str(tmp_path)
    np.testing.assert_array_equal(images(data)[..., 0], X[..., 0])
    np.testing.assert_array_equal(load_labels(data, "test", 0.25), Y[:6])


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        (np.eye(3)[Y], Y),
        (np.eye(3, dtype=bool)[Y], Y),
        (Y[:, None], Y),
        (Y.astype(np.float32), Y),
        (np.array(["cat", "dog", "eel"])[Y], Y),
        (np.array([10**9, 5, 7])[Y], np.array([2, 0, 1])[Y]),
        (Y == 1, Y == 1),
    ],
)
def test_labels_that_are_understood(y: Any, expected: Any, tmp_path: Path) -> None:
    data = saved(tmp_path / "x.npz", x_train=X, y_train=y, x_test=X, y_test=y)
    for part in ("train", "test"):
        np.testing.assert_array_equal(load_labels(data, part, 0.25), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.r_[Y, 0], "holds 13 labels for 12 images"),
        (Y[:-1], "holds 11 labels for 12 images"),
        (np.eye(3)[Y] * 0.5, "3 values for each image and is not one-hot"),
        (np.where(Y == 1, np.nan, Y), "holds nan at 1: labels are whole numbers"),
        (Y + 0.5, "holds 0.5 at 0"),
        (Y - 1, "holds -1 at 0: labels are not negative"),
        (Y.astype(object), "Python objects: save it as numbers"),
        (np.arange(12), "12 training images have 12 different labels: these are ids"),
        (Y + 1j, "is complex128; wanted whole numbers"),
    ],
)
def test_labels_that_are_refused(y: Any, message: str, tmp_path: Path) -> None:
    data = saved(tmp_path / "x.npz", x_train=X, y_train=y)
    with pytest.raises(ValueError, match=message):
        load_labels(data, "train", holdout=0.25)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    data = saved(tmp_path / "x.npz", x_train=X, y_train=Y, x_test=X[:, :6, :6], y_test=Y)
    with pytest.raises(ValueError, match="training images have 8 x 8 px and test images 6 x 6 px"):
        images(data)
    data = saved(tmp_path / "y.npz", x_train=X, y_train=Y, x_test=X, y_test=Y + 1)
    with pytest.raises(ValueError, match="classes the training part lacks: 3"):
        load_labels(data, "test", holdout=0.25)


def test_a_test_part_that_cannot_be_evaluated_is_passed_over(tmp_path: Path) -> None:
    """Empty, or without the labels that the training part has: training images are held out."""
    for test in ({"x_test": X[:0], "y_test": Y[:0]}, {"x_test": X}):
        data = saved(tmp_path / "x.npz", x_train=X, y_train=Y, **test)
        assert len(images(data)) == 9 and len(images(data, "test")) == 3
        assert len(load_labels(data, "test", 0.25)) == 3  # type: ignore[arg-type]
    unlabelled = saved(tmp_path / "y.npz", x_train=X, x_test=X[:6])
    assert len(images(unlabelled)) == 12 and len(images(unlabelled, "test")) == 6
    assert load_labels(unlabelled, "test", 0.25) is None


def test_one_class_is_no_label(tmp_path: Path) -> None:
    config = Config(data=saved(tmp_path / "x.npz", x_train=X, y_train=0 * Y))
    assert open_split(config, "train").labels() is None


@pytest.mark.parametrize("name", ["npz-cut.npz", "npz-empty.npz", "npz-npy.npz", "npz-long.npz"])
def test_damaged_files(name: str, data: Path) -> None:
    path = str(data / "odd-inputs" / name)
    with pytest.raises(ValueError, match=rf"{name}.*(copy it again|labels for)"):
        images(path)
        load_labels(path, "train", holdout=0.25)


def test_one_hot_of_the_samples(data: Path) -> None:
    path = str(data / "odd-inputs" / "npz-onehot.npz")
    found = load_labels(path, "train", holdout=0.25)
    assert found is not None and found.ndim == 1 and len(found) == len(images(path))


@pytest.mark.parametrize("cut", [3, 60, 400, 2000])
def test_any_cut_of_an_npy_is_one_line(cut: int, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"x\.npy cannot be read \(.*make or copy it again"):
        images(str(tmp_path / "x.npy"))


@pytest.mark.parametrize("kind", ["rgb", "gray", "float"])
def test_loading_takes_the_memory_of_the_result(kind: str, tmp_path: Path) -> None:
    x = np.zeros((3000, 64, 64, 3), np.uint8)
    x = {"rgb": x, "gray": x[..., 0], "float": x.astype(np.float32)}[kind]
    np.savez_compressed(tmp_path / "x.npz", x_train=x)
    source, rows = _array_rows(tmp_path / "x.npz", "train", 0.25)
    read_images(source, rows[:1])  # imports
    tracemalloc.start()
    pixels = read_images(source, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * pixels.nbytes
