"""The parts (train, val, test) and classes that the paths of a data set's images state.

One rule for `train`, `convert` and `doctor`, for folders and tars. A path is relative to the
source: PART/CLASS/.../FILE, CLASS/.../FILE, PART/FILE or FILE, below folders that hold all images.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
ROLES = {name: part for part, names in PARTS.items() for name in names}  # in any case
KNOWN = ", ".join(ROLES)
MAX_LOOSE = 0.01  # share of a part's images in no class folder, above which it has no classes


@dataclass
class Layout:
    """parts: the positions of each part's images, of all under "" where there are no parts.

    classes: the class of each image, "" where it has none. left_out: images of no part or no class,
    counted by reason.
    """

    parts: dict[str, list[int]]
    classes: list[str]
    left_out: Counter[str] = field(default_factory=Counter)


def read_layout(paths: Sequence[str], source: str) -> Layout:
    """The layout that relative paths state; ValueError where folders may or may not be parts."""
    folders = _below_common([_folders(path) for path in paths])
    roles = _roles(folders, source)
    layout = Layout({}, [""] * len(paths))
    members: dict[str, list[int]] = {}
    for i, parts in enumerate(folders):
        if roles and not parts:
            layout.left_out[f"image outside the parts {', '.join(sorted(roles))}"] += 1
        else:
            members.setdefault(roles[parts[0]] if roles else "", []).append(i)
    for part, chosen in members.items():
        classes = [parts[0] if (parts := folders[i][bool(roles) :]) else "" for i in chosen]
        layout.parts[part] = _with_classes(layout, chosen, classes)
    _drop_lone_class(layout)
    return layout


def _folders(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/")[:-1] if part != ".")


def _below_common(folders: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without the folders that contain all images, unless these are one part of several."""
    depth = 0
    while folders and all(len(f) > depth for f in folders):
        if len({f[depth] for f in folders}) > 1:
            break
        depth += 1
    return [f[depth:] for f in folders]


def _roles(folders: Sequence[tuple[str, ...]], source: str) -> dict[str, str]:
    """The part that each first folder is, {} where the first folders are classes."""
    heads = {f[0] for f in folders if f}
    nested = {f[0] for f in folders if len(f) > 1}
    roles = {head: ROLES[head.lower()] for head in heads if head.lower() in ROLES}
    others = sorted(heads - set(roles))
    if not roles or (others and not nested & set(roles)):
        return {}  # "train" may be a class beside "boat"
    if others or "train" not in roles.values() or len(set(roles.values())) < len(roles):
        raise ValueError(
            f"{source} has the folders {', '.join(sorted(roles))}"
            + (f" beside {', '.join(others[:5])}" if others else "")
            + f": pass the folder to train on, or one folder for each part, named train and one of "
            f"{KNOWN}"
        )
    return roles


def _with_classes(layout: Layout, chosen: list[int], classes: list[str]) -> list[int]:
    """Enter the classes of one part; -> its images, without a few that lie in no class folder."""
    loose = classes.count("")
    if loose > MAX_LOOSE * len(classes):
        return chosen
    for i, name in zip(chosen, classes, strict=True):
        layout.classes[i] = name
    if loose:
        layout.left_out["image in no class folder"] += loose
    return [i for i, name in zip(chosen, classes, strict=True) if name]


def _drop_lone_class(layout: Layout) -> None:
    """One class folder is no label."""
    first = layout.parts.get("train", layout.parts.get("", []))
    if len({layout.classes[i] for i in first}) < 2:
        layout.classes = [""] * len(layout.classes)
