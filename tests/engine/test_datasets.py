"""Reading data: every accepted form gives its images, labels are separate, errors are clear."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import Config
from fastssl.data.datasets import Images, Part, load_labels, open_files
from fastssl.data.splits import ArraySplit, FileSplit, Split, open_split, sample_indices
from fastssl_pipelines.memory import require_memory
from fastssl_pipelines.sources.convert import convert
from tests.helpers.requires import needs


def load_images(data: str, part: Part) -> Images:
    """All images of one part, decoded to squares of 16 px."""
    config = Config(data=data, load_size=16, on_corrupt="stop")
    split = open_split(config, part, hold=True)
    assert isinstance(split, ArraySplit)
    return split.pixels


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(seed + k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")


def test_digits() -> None:
    train, test = (load_images("digits", part) for part in ("train", "test"))
    assert (
        train.shape == (1438, 8, 8, 3) and test.shape == (359, 8, 8, 3) and train.dtype == np.uint8
    )
    assert train.max() == 255 and (train[..., 0] == train[..., 2]).all()
    labels = load_labels("digits", "train", holdout=0.2)
    assert labels is not None and labels.shape == (1438,) and set(labels) == set(range(10))
    pairs = {part.tobytes() for part in train} & {part.tobytes() for part in test}
    assert not pairs, "a held-out digit is among the training images"


def test_cifar10_npz_is_the_real_thing(data: Path, tmp_path: Path) -> None:
    labels = np.load(data / "cifar10" / "cifar10-labels.npz")
    mosaic = np.asarray(Image.open(data / "cifar10" / "cifar10-test.webp").convert("RGB"))
    images = mosaic.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(10_000, 32, 32, 3)
    path = tmp_path / "cifar10.npz"
    np.savez(
        path,
        x_train=images[:100],
        y_train=labels["y_test"][:100],
        x_test=images[100:],
        y_test=labels["y_test"][100:],
    )
    np.testing.assert_array_equal(load_images(str(path), "test"), images[100:])
    np.testing.assert_array_equal(
        load_labels(str(path), "train", holdout=0.2), labels["y_test"][:100]
    )


def test_official_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The python batches, through torchvision; its checksums are those of the real files, so they
    are disabled here."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    pixels = {name: rng.integers(0, 256, (4, 3072), dtype=np.uint8) for name in names}
    for k, name in enumerate(names):
        (folder / name).write_bytes(pickle.dumps({"data": pixels[name], "labels": [k] * 4}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(ValueError, match="is not the official CIFAR-10"):
        load_images(str(folder), "train")
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None}
    )
    for where in (folder, tmp_path):
        images = load_images(str(where), "train")
        assert images.shape == (20, 32, 32, 3)
        np.testing.assert_array_equal(
            images[4], pixels["data_batch_2"][0].reshape(3, 32, 32).transpose(1, 2, 0)
        )
        np.testing.assert_array_equal(load_labels(str(where), "test", holdout=0.2), [5] * 4)


def test_a_failed_download_names_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(ValueError, match=r"could not be downloaded.*pass --data with an \.npz"):
        load_images("cifar10", "train")


def test_imagenette_folder(data: Path, tmp_path: Path) -> None:
    with tarfile.open(data / "imagenette-224-1000.tar") as tar:
        members = [m for m in tar.getmembers() if m.isfile()]
        some = [m for m in members if m.name.startswith("train/")][::25] + [
            m for m in members if m.name.startswith("val/")
        ][::25]
        tar.extractall(tmp_path, members=some, filter="data")
    train, test = (load_images(str(tmp_path), part) for part in ("train", "test"))
    assert train.shape == (30, 16, 16, 3) and test.shape == (10, 16, 16, 3)
    labels = [load_labels(str(tmp_path), part, holdout=0.2) for part in ("train", "test")]
    assert labels[0] is not None and labels[0].tolist() == sorted(list(range(10)) * 3)
    assert labels[1] is not None and labels[1].tolist() == list(range(10))


def test_class_folders_are_split_alike_for_images_and_labels(tmp_path: Path) -> None:
    for number, name in enumerate(("ant", "bee")):
        folder = tmp_path / name
        folder.mkdir()
        for k in range(10):
            Image.new("RGB", (16, 16), (100 * number + k, 0, 0)).save(folder / f"{k}.png")
    for part, count in (("train", 16), ("test", 4)):
        images = load_images(str(tmp_path), part)
        labels = load_labels(str(tmp_path), part, holdout=0.2)
        assert len(images) == count
        np.testing.assert_array_equal(images[:, 0, 0, 0] // 100, labels)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 10)
    assert load_images(str(tmp_path / "flat"), "train").shape == (8, 16, 16, 3)
    assert load_labels(str(tmp_path / "flat"), "train", holdout=0.2) is None


@needs("ffcv")
def test_beton_is_the_folder_it_was_made_from(tmp_path: Path) -> None:
    """The same images and the same labels in both parts, whichever of the two is read."""
    for number, name in enumerate(("ant", "bee")):
        (tmp_path / "x" / name).mkdir(parents=True)
        for k in range(10):
            gradient = np.linspace(100 * number, 100 * number + 5 * k, 20 * 24).astype(np.uint8)
            photo = Image.fromarray(gradient.reshape(20, 24)).convert("RGB")
            photo.save(tmp_path / "x" / name / f"{k}.jpg")
    target = str(convert(tmp_path / "x", tmp_path / "x.beton").target)
    for part in ("train", "test"):
        images, expected = (load_images(data, part) for data in (target, str(tmp_path / "x")))
        np.testing.assert_array_equal(images, expected)
        labels, known = (
            load_labels(data, part, holdout=0.2) for data in (target, str(tmp_path / "x"))
        )
        assert known is not None and set(known) == {0, 1}
        np.testing.assert_array_equal(labels, known)


def test_decoding_keeps_the_centre(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for k in range(5):
        wide = np.zeros((16, 48, 3), dtype=np.uint8)
        wide[:, 16:32] = 200
        Image.fromarray(wide).save(tmp_path / "x" / f"{k}.png")
    assert (load_images(str(tmp_path), "train") == 200).all()


def test_images_never_read_labels(tmp_path: Path) -> None:
    """An .npz whose labels cannot be read at all still gives its images."""
    path = tmp_path / "poisoned.npz"
    poison = np.array([object()], dtype=object)  # np.load refuses to unpickle it
    np.savez(path, x_train=np.zeros((10, 8, 8, 3), np.uint8), y_train=poison)
    assert len(load_images(str(path), "train")) == 8
    with pytest.raises(ValueError, match="Python objects: save it as numbers"):
        load_labels(str(path), "train", holdout=0.2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.zeros(3)}, "has no images: it holds y_train; it needs x_train"),
        ({"x_train": np.zeros((4, 8))}, r"wanted \(M, S, S, 3\)"),
        ({"x_train": np.zeros((4, 8, 8, 3), np.int32)}, "wanted uint8"),
        ({"x_train": np.full((4, 8, 8, 3), 7.0)}, r"scale them to \[0, 1\]"),
        ({"x_train": np.full((4, 8, 8, 3), np.nan)}, "NaN or Inf, the first in image 0"),
    ],
)
def test_bad_arrays(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        load_images(str(path), "train")


def test_floats_become_bytes(tmp_path: Path) -> None:
    path = tmp_path / "floats.npz"
    x = np.linspace(0, 1, 5 * 2 * 2 * 3).reshape(5, 2, 2, 3)
    np.savez(path, x_train=x, x_test=x)
    np.testing.assert_array_equal(
        load_images(str(path), "train"), np.round(x * 255).astype(np.uint8)
    )


def test_missing_empty_and_corrupt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; pass a folder"):
        load_images(str(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match="holds no images"):
        load_images(str(tmp_path), "train")
    with pytest.raises(ValueError, match="pass --data"):
        load_images("", "train")
    write_images(tmp_path / "some", 9)
    (tmp_path / "some" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read as an image"):
        for part in ("train", "test"):
            load_images(str(tmp_path / "some"), part)


def test_test_classes_must_be_known(tmp_path: Path) -> None:
    for name in ("train/ant", "train/bee", "test/ant", "test/wasp"):
        write_images(tmp_path / name, 2)
    with pytest.raises(ValueError, match="classes the training part lacks: wasp"):
        open_files(str(tmp_path), "train", holdout=0.2)


def test_too_large_for_memory() -> None:
    with pytest.raises(ValueError, match=r"the views needs .* GiB are free; lower --image-size"):
        require_memory(2**60, "the views", "lower --image-size", torch.device("cpu"))
    require_memory(1, "a byte", "nothing")


def test_files_are_read_on_demand(tmp_path: Path) -> None:
    """A FileSplit yields the images of an ArraySplit, in any order, without the unreadable."""
    write_images(tmp_path / "x", 9)
    (tmp_path / "x" / "3b.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    config = Config(data=str(tmp_path / "x"), load_size=16, corrupt_quota=0.5, holdout=0.3)
    for part in ("train", "test"):
        held, files = (open_split(config, part, hold=hold) for hold in (True, False))
        assert isinstance(held, ArraySplit) and isinstance(files, FileSplit)
        found = list(files.batches(files.chunks(4)))
        assert dict(files.skipped) == dict(held.skipped)
        pixels = np.concatenate([images for _, images in found])
        np.testing.assert_array_equal(pixels, held.pixels)
        assert files.total == len(files) == held.total == len(held) + len(held.skipped)
        numbers = torch.cat([numbers for numbers, _ in found]).tolist()
        readable = [n for n, name in enumerate(files.files.names) if name not in files.skipped]
        assert numbers == readable
        (last,) = files.batches([torch.tensor(readable[-1:])])
        np.testing.assert_array_equal(last[1][0], held.pixels[-1])


def test_labels_follow_the_images(tmp_path: Path) -> None:
    """Rows of an ArraySplit and numbers of a FileSplit: both give the class of the image."""
    for number, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        for k in range(6):
            Image.new("RGB", (16, 16), (100 * number + k, 0, 0)).save(tmp_path / name / f"{k}.png")
    (tmp_path / "ant" / "2b.jpg").write_bytes(b"broken")
    config = Config(data=str(tmp_path), load_size=16, corrupt_quota=0.5)
    splits: list[Split] = [open_split(config, "train", hold=hold) for hold in (True, False)]
    for split in splits:
        labels = split.labels()
        assert labels is not None and len(labels) == len(split)
        for numbers, images in split.batches(split.chunks(3)):
            np.testing.assert_array_equal(images[:, 0, 0, 0] // 100, labels[numbers])


def test_a_sample_is_drawn_by_its_seed() -> None:
    sample = sample_indices(1000, 100, seed=3)
    assert torch.equal(sample, sample.unique()) and len(sample) == 100  # ascending, distinct
    assert torch.equal(sample, sample_indices(1000, 100, seed=3))
    assert not torch.equal(sample, sample_indices(1000, 100, seed=4))
    assert [int((sample // 250 == k).sum()) for k in range(4)] == pytest.approx([25] * 4, abs=12)
    for count in (0, 7, 8):
        assert sample_indices(7, count, seed=0).tolist() == list(range(7))


def test_train_images_of_sorted_classes_are_of_all_classes(tmp_path: Path) -> None:
    """In an array, in files held in memory and in files read on demand, each with its label."""
    for number, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "x" / name).mkdir(parents=True)
        for k in range(20):
            pixels = Image.new("RGB", (16, 16), (80 * number + k, 0, 0))
            pixels.save(tmp_path / "x" / name / f"{k:02d}.png")
    config = Config(data=str(tmp_path / "x"), load_size=16, corrupt_quota=0.5, train_images=12)
    files = open_split(config, "train")
    assert isinstance(files, FileSplit)
    names = files.files.names
    Path(names[4]).write_bytes(b"broken")
    all_images = open_split(Config(data=config.data, load_size=16, corrupt_quota=0.5), "train")
    array = np.concatenate([images for _, images in all_images.batches(all_images.chunks(64))])
    sorted_labels = array[:, 0, 0, 0] // 80
    np.savez(tmp_path / "x.npz", x_train=array, y_train=sorted_labels, x_test=array)
    in_array = open_split(Config(data=str(tmp_path / "x.npz"), train_images=12), "train")
    for split, count in (
        (files, 11),
        (open_split(config, "train", hold=True), 11),
        (in_array, 12),
    ):
        labels = split.labels()
        assert labels is not None and set(labels.tolist()) == {0, 1, 2}
        found = 0
        for numbers, images in split.batches(split.chunks(5)):
            np.testing.assert_array_equal(images[:, 0, 0, 0] // 80, labels[numbers])
            found += len(images)
        assert found == count
    other = open_split(Config(data=config.data, load_size=16, train_images=12, seed=1), "train")
    assert other.files.names != names  # type: ignore[attr-defined]


def test_without_a_held_out_part_all_images_train(tmp_path: Path) -> None:
    write_images(tmp_path / "x" / "ant", 5)
    write_images(tmp_path / "x" / "bee", 4)
    np.savez(
        tmp_path / "x.npz", x_train=np.zeros((9, 8, 8, 3), np.uint8), y_train=np.arange(9) // 2
    )
    for data in (tmp_path / "x", tmp_path / "x.npz"):
        config = Config(data=str(data), load_size=8, holdout=0.0)
        train, test = open_split(config, "train"), open_split(config, "test")
        assert (len(train), len(test)) == (9, 0)
        assert sum(len(images) for _, images in test.batches(test.chunks(4))) == 0
        labels = train.labels()
        assert labels is not None and len(labels) == 9


@pytest.mark.parametrize("folder", ["x/images", "x/train/images"])
def test_a_single_folder_of_images_is_no_class(folder: str, tmp_path: Path) -> None:
    write_images(tmp_path / folder, 10)
    if "train" in folder:
        write_images(tmp_path / "x/test/images", 5)
    config = Config(data=str(tmp_path / "x"), load_size=8)
    assert open_split(config, "train").labels() is None


def test_files_that_vanish_are_named_by_their_labels(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write_images(tmp_path / name, 6)
    split = open_split(Config(data=str(tmp_path), load_size=8, holdout=0.0), "train")
    (tmp_path / "bee" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"has 11 labels in its train part .* restore the files"):
        split.labels()
