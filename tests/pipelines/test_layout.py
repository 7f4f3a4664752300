"""Parts and classes that paths state: recognised, or refused with the names that are known."""

import pytest

from fastssl_pipelines.sources.layout import PARTS, read_layout


def paths(*folders: str, count: int = 3) -> list[str]:
    return [
        f"{folder}/{k}.jpg" if folder else f"{k}.jpg" for folder in folders for k in range(count)
    ]


@pytest.mark.parametrize("other", [*PARTS["val"], *PARTS["test"], "Valid", "TEST"])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_every_name_of_a_part(train: str, other: str) -> None:
    layout = read_layout(paths(f"{train}/cat", f"{train}/dog", f"{other}/cat", f"{other}/dog"), "x")
    part = "test" if other.lower() in PARTS["test"] else "val"
    assert layout.parts == {"train": [0, 1, 2, 3, 4, 5], part: [6, 7, 8, 9, 10, 11]}
    assert layout.classes == 2 * (["cat"] * 3 + ["dog"] * 3)


def test_folders_above_everything_are_ignored() -> None:
    layout = read_layout(paths("x/set/train/cat", "x/set/train/dog", "x/set/val/cat"), "x")
    assert sorted(layout.parts) == ["train", "val"] and layout.classes[0] == "cat"
    assert read_layout(paths("train/cat", "train/dog"), "x").parts == {"": list(range(6))}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train/cat", "train/dog", "holdout/cat"), "x has the folders train beside holdout: pass"),
        (("train/cat", "val/cat", "extra/cat"), "folders train, val beside extra"),
        (("val/cat", "test/cat"), "folders test, val: pass the folder to train on"),
        (("train/cat", "val/cat", "valid/cat"), "folders train, val, valid"),
    ],
)
def test_what_may_be_parts_is_refused(folders: tuple[str, ...], message: str) -> None:
    with pytest.raises(
        ValueError, match=message + ".*named train and one of train, training, val,"
    ):
        read_layout(paths(*folders), "x")


def test_a_class_may_be_called_train() -> None:
    layout = read_layout(paths("train", "boat", "car"), "x")
    assert layout.parts == {"": list(range(9))} and layout.classes[0] == "train"


def test_the_outer_folder_is_the_class() -> None:
    layout = read_layout(paths("cat/images", "cat/more", "dog/images"), "x")
    assert layout.classes == ["cat"] * 6 + ["dog"] * 3


@pytest.mark.parametrize("folders", [("",), ("images",), ("a/b/c",), ("train/cat", "val/cat")])
def test_one_folder_is_no_class(folders: tuple[str, ...]) -> None:
    assert set(read_layout(paths(*folders), "x").classes) == {""}


def test_a_flat_part_has_no_classes() -> None:
    layout = read_layout(paths("train/cat", "train/dog", "test"), "x")
    assert layout.classes == ["cat"] * 3 + ["dog"] * 3 + [""] * 3


def test_loose_images() -> None:
    layout = read_layout([*paths("cat", "dog", count=100), "preview.jpg"], "x")
    assert layout.parts == {"": list(range(200))} and set(layout.classes[:200]) == {"cat", "dog"}
    assert layout.left_out == {"image in no class folder": 1}
    mixed = read_layout(paths("cat", "dog", ""), "x")
    assert len(mixed.parts[""]) == 9 and set(mixed.classes) == {""}
    outside = read_layout([*paths("train/cat", "val/cat"), "preview.jpg"], "x")
    assert outside.left_out == {"image outside the parts train, val": 1}


def test_a_colon_in_a_name() -> None:
    assert read_layout(paths("a:cat", "b:dog"), "x").classes == ["a:cat"] * 3 + ["b:dog"] * 3
