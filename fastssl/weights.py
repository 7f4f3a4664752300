"""Weights of backbones: files with metadata, and what --init starts from.

Shapes: N batch, F features, S pixels per side.
"""

import argparse
import json
import os
import pickle
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastssl.backbones import build_backbone, feature_width
from fastssl.config import Config
from fastssl_pipelines import policies

FILE = "backbone.safetensors"
SOURCES = (
    "a .safetensors or .pth file, a run folder, 'imagenet', a timm model with its tag such as "
    "resnet18.a1_in1k, or hf-hub:NAME"
)
HUB_PREFIXES = ("hf-hub:", "hf_hub:", "timm/")

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a backbone's file says of it, beside its weights."""

    architecture: str
    """A name of `build_backbone`: 'fastnet-WIDTH' or timm's."""
    stem: str = "imagenet"
    image_size: int = 224
    """Side of the views that it was trained on, in px."""
    features: int = 0
    """F; 0: unknown."""
    mean: tuple[float, ...] = ()
    """Per channel, of pixels in [0, 1]: the network takes (pixels - mean) / std."""
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] | None = None
    """Names of the classes of the data, in the order of the labels, where it has any."""
    recipe: Mapping[str, Any] | None = None
    """Every setting of the run that trained it."""

    def strings(self) -> dict[str, str]:
        """As safetensors stores it; all values but strings as JSON."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        return {"format": "pt", **plain}  # "format": what Hugging Face's readers ask for

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> "Metadata | None":
        """None where the strings do not describe a backbone."""
        if "architecture" not in strings:
            return None
        known = {field.name for field in fields(cls)} & set(strings)
        words = known & {"architecture", "stem"}
        values: dict[str, Any] = {
            k: strings[k] if k in words else json.loads(strings[k]) for k in known
        }
        for name in {"mean", "std", "classes"} & known:
            values[name] = tuple(values[name])
        return cls(**values)


def save_backbone(path: Path, backbone: nn.Module, metadata: Metadata) -> None:
    """Write parameters, buffers and metadata as safetensors, with timm's names for a timm model;
    atomically, with the permissions of any new file. OSError where it cannot be written."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that their owner alone may read
        save_file(tensors, temporary, metadata.strings())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_backbone(path: str | Path) -> nn.Module:
    """The trained backbone of a run folder or of its `backbone.safetensors`, in evaluation mode on
    the CPU: (N, 3, S, S) -> (N, F), with its `metadata` (`Metadata`).

    S is `metadata.image_size`; pixels in [0, 1], normalised by `metadata.mean` and `.std`. A file
    without metadata is described by the config.json beside it. Raises FileNotFoundError, and
    ValueError where the file is damaged or nothing describes it.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    metadata = read_metadata(path)
    if metadata is None:
        raise ValueError(
            f"{path} does not say what network it is of: put the config.json of its run beside it,"
            " or build the network and load the file into it"
        )
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced
        net = build_backbone(
            metadata.architecture, stem=metadata.stem, image_size=metadata.image_size
        )
    load_weights(path, net)
    if not metadata.features:
        metadata = replace(metadata, features=feature_width(net, metadata.image_size))
    net.metadata = metadata  # type: ignore[assignment]
    return net.eval()


def read_metadata(path: Path) -> Metadata | None:
    """The metadata of a backbone's file, else of the config.json beside it; None without either."""
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = Metadata.from_strings(file.metadata() or {})
    except (SafetensorError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from None
    config = path.with_name("config.json")
    return found or (_of_config(config) if config.is_file() else None)


def _of_config(path: Path) -> Metadata:
    """Of a run whose backbone has no metadata."""
    recipe = json.loads(path.read_text())
    size = recipe["image_size"]
    view = policies.policy_views(recipe["policy"], recipe["views"], size)[0]
    return Metadata(
        architecture=recipe["backbone"],
        stem=recipe["stem"],
        image_size=size,
        mean=view.mean,
        std=view.std,
        recipe=recipe,
    )


def load_weights(path: Path, backbone: nn.Module, *, partial: bool = False) -> str:
    """Load a file of weights into `backbone`; returns the coverage in one line, which begins with
    "loaded 62 of 62 tensors".

    The file is safetensors or torch's format (tensors only; no code of the file is run), of
    fastssl, timm, torchvision, or a training script: wrappers such as {"state_dict": ...} and
    prefixes such as "module.encoder_q." are removed, classifiers and other networks left out.
    ValueError where any tensor of the backbone is not in the file or has another shape; with
    `partial`, where all are.
    """
    _require_file(path)
    return fill(backbone, _read(path), str(path), partial=partial)


def initialise(config: Config, backbone: nn.Module) -> str:
    """Start `backbone` from what `config.init` names; returns the coverage in one line.

    ValueError, in one line, where it does not fit, does not exist or cannot be downloaded.
    """
    source = config.init
    path = Path(source).expanduser()
    path = path / FILE if path.is_dir() else path
    if path.is_file():
        return fill(backbone, _read(path), source, partial=config.init_partial)
    if name := _hub_name(config):
        return fill(backbone, _download(name, source), source, partial=config.init_partial)
    raise ValueError(f"--init {source} does not exist; pass {SOURCES}")


def fill(backbone: nn.Module, tensors: Tensors, source: str, *, partial: bool = False) -> str:
    """Load tensors of any naming into `backbone` (`load_weights`); `source` names them in the
    coverage and in errors."""
    expected = backbone.state_dict()
    found, prefix = _matching(tensors, backbone)
    fitting = {k: t for k, t in found.items() if k in expected and t.shape == expected[k].shape}
    missing = [
        k for k in expected if k not in fitting and not k.endswith("num_batches_tracked")
    ]  # old files have no such counters, which have no effect either
    left_out = sorted(k for k in found if k not in expected)
    foreign = [k for k in left_out if _is_of_another_network(k, found[k], backbone)]
    if (missing or foreign) and not (partial and fitting):
        first = (missing or foreign)[0]
        here = tuple(expected[first].shape) if first in expected else "none"
        there = tuple(found[first].shape) if first in found else "none"
        raise ValueError(
            f"{source} is of another backbone: {len(fitting)} of {len(expected)} tensors match, "
            f"the first mismatch is {first} ({there} there, {here} here); pass the --backbone and "
            "--stem that it was trained with, or --init-partial to load what matches"
        )
    backbone.load_state_dict(fitting, strict=False)
    return _coverage(len(fitting), len(expected), source, prefix, left_out, len(tensors))


def _coverage(
    fitting: int, expected: int, source: str, prefix: str, left_out: list[str], total: int
) -> str:
    parts = [f"loaded {fitting} of {expected} tensors from {source}"]
    if prefix:
        parts.append(f"without the prefix {prefix!r}")
    if left_out:
        roots = ", ".join(sorted({name.split(".")[0] for name in left_out}))
        parts.append(f"{len(left_out)} left out ({roots[:60]})")
    others = total - fitting - len(left_out)
    if others > 0:
        parts.append(f"{others} of other modules or shapes ignored")
    return "; ".join(parts)


def _matching(tensors: Tensors, backbone: nn.Module) -> tuple[Tensors, str]:
    """(the tensors below the prefix under which most of the backbone's are found, by the backbone's
    names; the prefix)."""
    expected = backbone.state_dict()
    named = {k.replace("_orig_mod.", ""): t for k, t in tensors.items()}
    prefix = _best_prefix(named, expected)
    found = _below(prefix, named)
    if (count := _agreement(found, expected)) == len(expected):
        return found, prefix
    # nn.Sequential(*list(resnet.children())[:-1]), as lightly's users write: children by position
    position = {k: str(i) for i, (k, _) in enumerate(backbone.named_children())}
    child = {v: k for k, v in position.items()}
    by_position = {_with_root(k, position): t for k, t in expected.items()}
    before_numbers = _best_prefix(named, by_position)
    numbered = {_with_root(k, child): t for k, t in _below(before_numbers, named).items()}
    if _agreement(numbered, expected) > count:
        return numbered, before_numbers
    converted = _converted(found, backbone)
    return (converted if _agreement(converted, expected) > count else found), prefix


def _with_root(name: str, roots: Mapping[str, str]) -> str:
    """`name` with its first part replaced by the one in `roots`."""
    root, dot, rest = name.partition(".")
    return roots.get(root, root) + dot + rest


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _agreement(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int:
    """The number of tensors with the expected name and shape."""
    return sum(k in expected and t.shape == expected[k].shape for k, t in found.items())


def _best_prefix(tensors: Tensors, expected: Mapping[str, Tensor]) -> str:
    """The prefix whose removal gives the most of the expected names, then shapes. Of several
    networks in a file, an average of weights or a teacher comes first, a momentum encoder last."""
    names: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for key, tensor in tensors.items():
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        for start in starts:
            if (name := key[start:]) in expected:
                names[key[:start]] += 1
                shapes[key[:start]] += tensor.shape == expected[name].shape
    best = max(names, key=lambda p: (names[p], shapes[p], _preference(p), -len(p)), default="")
    return best


def _preference(prefix: str) -> int:
    words = set(re.split(r"[._]", prefix))
    if words & {"ema", "teacher"}:
        return 1
    return -1 if words & {"momentum", "target", "k", "student"} else 0


def _converted(tensors: Tensors, backbone: nn.Module) -> Tensors:
    """The tensors renamed by timm's converter for this architecture, which knows the names of the
    original authors and resizes position embeddings; as they are where there is none."""
    module = sys.modules[type(backbone).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        return dict(convert(dict(tensors), backbone))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return tensors  # not a file that it knows: the mismatch is reported


def _is_of_another_network(name: str, tensor: Tensor, backbone: nn.Module) -> bool:
    """Whether a tensor that is not the backbone's belongs to a larger network of its kind: a
    third block of a layer that has two, rather than a classifier, a projector or a constant."""
    classifier = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if name.startswith(tuple(f"{head}." for head in (*heads, "fc", "head", "heads"))):
        return False
    if not tensor.is_floating_point() or name.endswith(("attn_mask", "relative_position_index")):
        return False
    return name.split(".")[0] in {child for child, _ in backbone.named_children()}


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run has not finished pretraining")


def _damaged(path: Path, error: Exception) -> ValueError:
    message = str(error).rpartition("WeightsUnpickler error:")[2]  # torch's advice precedes it
    reason = " ".join(message.split())[:160]
    return ValueError(f"{path} is damaged or no file of weights ({reason}); restore it")


def _read(path: Path) -> Tensors:
    """All tensors of a file by their dotted names, from wrappers of any depth."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # scripts save their flags
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not re.search("(?i)unsupported (global|class)|unrecognized function", str(error)):
            raise _damaged(path, error) from None
        raise ValueError(
            f"{path} contains objects other than tensors, which are not loaded, since that could "
            "run code; save the weights alone, with torch.save(model.state_dict(), PATH)"
        ) from None
    except (SafetensorError, EOFError, LookupError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from None
    return dict(_flat(saved))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix.removesuffix("."), tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}{key}.")


def _hub_name(config: Config) -> str | None:
    """timm's name of the pretrained weights that `config.init` names, or None."""
    import timm

    source = config.init
    if source == "imagenet":
        if not timm.models.is_model_pretrained(config.backbone):
            raise ValueError(
                f"--init imagenet: timm has no pretrained weights of {config.backbone}; pass "
                "another --backbone, or a file"
            )
        return config.backbone
    if source.startswith(HUB_PREFIXES):
        return "hf-hub:" + source.removeprefix("hf-hub:").removeprefix("hf_hub:")
    return source if timm.models.is_model_pretrained(source) else None


def _download(name: str, source: str) -> Tensors:
    """The pretrained weights of a timm model, from its cache or the hub."""
    import timm

    try:
        with _offline_without_network():
            return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--init {source}: the weights could not be downloaded ({reason}); check the name and "
            "the network connection, or pass a file that was downloaded elsewhere"
        ) from None


@contextmanager
def _offline_without_network() -> Iterator[None]:
    """Have the hub's client read its cache alone where its host has no address; it would retry for
    half a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not getproxies() and not _has_address(urlsplit(constants.ENDPOINT).hostname or ""):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _has_address(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False
