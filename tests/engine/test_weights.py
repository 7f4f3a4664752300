"""Files of weights: what a backbone's file says, where it loads, and what --init starts from."""

import argparse
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastssl
from fastssl import weights
from fastssl.backbones import build_backbone
from fastssl.config import Config
from fastssl.data.datasets import class_names
from fastssl.evaluation.trained_run import load_trained_run
from fastssl.pretrain import pretrain
from fastssl.recipes import recipe_config
from fastssl.weights import FILE, Metadata, fill, initialise, load_weights, save_backbone

TINY = Metadata(architecture="fastnet-4", image_size=16)
QUICK: dict[str, Any] = {
    "backbone": "fastnet-4",
    "epochs": 1,
    "warmup_epochs": 0.0,
    "train_images": 200,
    "batch_size": 50,
    "label_draws": 1,
}


def same(net: nn.Module, tensors: dict[str, Tensor]) -> bool:
    state = net.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[k], tensors[k]) for k in state)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pretrain(recipe_config("digits-barlow", **QUICK), folder, print)
    return folder


def test_a_file_loads_and_names_what_does_not_fit(tmp_path: Path) -> None:
    net, other = build_backbone("fastnet-4"), build_backbone("fastnet-4")
    path = tmp_path / FILE
    with pytest.raises(FileNotFoundError, match="has not finished"):
        load_weights(path, net)
    save_backbone(path, net.to(memory_format=torch.channels_last), TINY)
    assert load_weights(path, other) == f"loaded 36 of 36 tensors from {path}"
    assert same(other, net.state_dict())
    with pytest.raises(ValueError, match=r"6 of 36 tensors match, .* 0\.0\.weight.*--init-partial"):
        load_weights(path, build_backbone("fastnet-8"))
    wider = build_backbone("fastnet-8")
    assert load_weights(path, wider, partial=True).startswith("loaded 6 of 36 tensors")
    with pytest.raises(ValueError, match="0 of 2 tensors match"):
        load_weights(path, nn.Linear(2, 2), partial=True)


def test_a_file_says_what_it_is(run: Path) -> None:
    with safe_open(run / FILE, framework="pt") as file:
        strings = file.metadata()
    assert strings["format"] == "pt" and strings["architecture"] == "fastnet-4"
    metadata = Metadata.from_strings(strings)
    assert metadata is not None
    assert (metadata.image_size, metadata.features, metadata.stem) == (16, 16, "imagenet")
    assert metadata.mean == metadata.std == (0.5, 0.5, 0.5)  # of the policy "digits"
    assert metadata.classes == tuple("0123456789")
    assert metadata.recipe is not None and metadata.recipe["data"] == "digits"
    assert {k: metadata.recipe[k] for k in ("method", "epochs", "lambd")} == {
        "method": "barlow",
        "epochs": 1,
        "lambd": 0.02,
    }


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_has_the_permissions_of_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_backbone(tmp_path / FILE, build_backbone("fastnet-4"), TINY)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == mode


def test_a_save_that_fails_leaves_the_file_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise weights.SafetensorError("No space left on device")

    net = build_backbone("fastnet-4")
    save_backbone(tmp_path / FILE, net, TINY)
    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        save_backbone(tmp_path / FILE, build_backbone("fastnet-4"), TINY)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert same(net, load_file(tmp_path / FILE))


def test_load_backbone_is_the_trained_network(run: Path) -> None:
    net, random = fastssl.load_backbone(run), torch.get_rng_state()
    again = fastssl.load_backbone(str(run / FILE))
    assert torch.equal(random, torch.get_rng_state())
    assert not net.training and net.metadata == again.metadata and net.metadata.features == 16
    x = torch.randn(2, 3, 16, 16)
    trained = load_trained_run(run, print).backbone
    torch.testing.assert_close(net(x), trained.to("cpu")(x))  # channels last there
    assert torch.equal(net(x), again(x))


def test_a_file_without_metadata_is_described_by_its_run(run: Path, tmp_path: Path) -> None:
    new = fastssl.load_backbone(run)
    save_file(load_file(run / FILE), tmp_path / FILE)
    with pytest.raises(ValueError, match=r"put the config\.json of its run beside it"):
        fastssl.load_backbone(tmp_path)
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    old = fastssl.load_backbone(tmp_path)
    for name in ("architecture", "stem", "image_size", "features", "mean", "std"):
        assert getattr(old.metadata, name) == getattr(new.metadata, name)
    assert same(old, new.state_dict())


@pytest.mark.parametrize("content", [b"", b"abc", bytes([255] * 9)])
@pytest.mark.parametrize("name", [FILE, "weights.pth"])
def test_a_damaged_file_is_named(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_weights(tmp_path / name, build_backbone("fastnet-4"))
    if name == FILE:
        with pytest.raises(ValueError, match="is damaged"):
            fastssl.load_backbone(tmp_path)


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("content", [Hostile(), Path("settings")])
def test_code_in_a_file_is_refused(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": content}, "weights.pth")
    with pytest.raises(ValueError, match=r"objects other than tensors.*state_dict"):
        load_weights(Path("weights.pth"), build_backbone("fastnet-4"))
    assert not Path("hacked").exists()


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "densenet121"])
def test_torchvision_and_timm_exchange_weights(name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
        net = build_backbone(name)
    tensors = {k: torch.empty(t.shape, dtype=t.dtype) for k, t in theirs.items()}
    net.to_empty(device="cpu")
    line = fill(net, tensors, "file")
    count = len(net.state_dict())
    assert line.startswith(f"loaded {count} of {count} tensors") and "2 left out" in line


def wrapped(kind: str, state: dict[str, Tensor]) -> Any:
    """`state` as scripts save it."""

    def prefixed(prefix: str, scale: float = 1.0) -> dict[str, Tensor]:
        return {prefix + k: t * scale if t.is_floating_point() else t for k, t in state.items()}

    return {
        "plain": lambda: state,
        "timm": lambda: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "timm_ema": lambda: {"state_dict": prefixed("", 2.0), "state_dict_ema": state},
        "mae": lambda: {"model": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        "ddp": lambda: {"state_dict": prefixed("module.")},
        "compiled": lambda: prefixed("_orig_mod."),
        "moco": lambda: {
            "state_dict": {
                **prefixed("module.encoder_k.", 2.0),
                **prefixed("module.encoder_q."),
                "module.encoder_q.fc.0.weight": torch.ones(9, 9),
                "module.queue": torch.ones(4, 4),
            }
        },
        "dino": lambda: {
            "student": prefixed("module.backbone.", 2.0),
            "teacher": prefixed("backbone."),
        },
        "solo": lambda: {
            "state_dict": {
                **prefixed("momentum_backbone.", 2.0),
                **prefixed("backbone."),
                "projector.0.weight": torch.ones(3, 3),
            }
        },
        "lightning": lambda: {"state_dict": prefixed("model.backbone._orig_mod.")},
    }[kind]()


KINDS = "plain timm timm_ema mae ddp compiled moco dino solo lightning".split()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return build_backbone("test_resnet", image_size=32)


@pytest.mark.parametrize("kind", KINDS)
def test_init_takes_what_scripts_save(kind: str, resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrapped(kind, resnet.state_dict()), path)
    net = build_backbone("test_resnet")
    line = initialise(config(path), net)
    count = len(net.state_dict())
    assert line.startswith(f"loaded {count} of {count} tensors from {path}") and "\n" not in line
    assert same(net, resnet.state_dict())
    expected = {"moco": "'state_dict.module.encoder_q.'", "dino": "'teacher.backbone.'"}
    assert expected.get(kind, "") in line


def config(path: Path | str, **others: Any) -> Config:
    return Config(backbone="test_resnet", image_size=32, init=str(path), **others)


def test_init_takes_lightlys_sequential_of_a_resnet(resnet: nn.Module, tmp_path: Path) -> None:
    """backbone = nn.Sequential(*list(resnet.children())[:-1]) numbers the children."""
    theirs = torchvision.models.resnet18()
    state = nn.Sequential(*list(theirs.children())[:-1]).state_dict()
    torch.save({"state_dict": {f"backbone.{k}": t for k, t in state.items()}}, tmp_path / "a.ckpt")
    net = build_backbone("resnet18").eval()
    line = load_weights(tmp_path / "a.ckpt", net)
    assert line.startswith("loaded 120 of 120")
    theirs.fc = nn.Identity()  # type: ignore[assignment]
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(net(x), theirs.eval()(x))


def test_init_takes_a_classifier_and_resizes_positions(tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit", num_classes=7, img_size=64)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    net = build_backbone("test_vit", image_size=32)
    line = load_weights(tmp_path / "vit.pth", net)
    count = len(net.state_dict())
    assert f"loaded {count} of {count}" in line and "2 left out (head)" in line
    assert torch.equal(net.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)  # type: ignore[index, union-attr]
    assert net.pos_embed.shape == (1, 5, 64)


def test_init_refuses_a_larger_network_of_the_same_kind() -> None:
    """All of a ResNet-18's tensors are in a ResNet-34 by name and shape."""
    with torch.device("meta"):
        net, larger = build_backbone("resnet18"), build_backbone("resnet34")
    with pytest.raises(ValueError, match=r"is of another backbone: .* layer1\.2\.bn1"):
        fill(net, larger.state_dict(), "resnet34.pth")


def test_init_takes_a_run_folder(run: Path) -> None:
    net = build_backbone("fastnet-4")
    line = initialise(Config(backbone="fastnet-4", image_size=16, init=str(run)), net)
    assert line == f"loaded 36 of 36 tensors from {run}" and same(net, load_file(run / FILE))


def test_init_of_a_run_starts_from_it(run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    changed = recipe_config("digits-barlow", **QUICK, init=str(run), lr=1e-12)
    pretrain(changed, tmp_path / "run", lines.append)
    assert any(line.startswith("loaded 36 of 36 tensors") for line in lines)
    before, after = load_file(run / FILE), load_file(tmp_path / "run" / FILE)
    torch.testing.assert_close(after["0.0.weight"], before["0.0.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "backbone", "asked"),
    [
        ("imagenet", "resnet18", "resnet18"),
        ("resnet18.a1_in1k", "resnet18", "resnet18.a1_in1k"),
        ("timm/resnet18.a1_in1k", "resnet18", "hf-hub:timm/resnet18.a1_in1k"),
        ("hf-hub:me/mine", "resnet18", "hf-hub:me/mine"),
    ],
)
def test_init_downloads(
    source: str, backbone: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, names = timm.create_model, []

    def created(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        names.append(name)
        assert pretrained
        return create(backbone, **options)

    net = build_backbone(backbone)
    monkeypatch.setattr(timm, "create_model", created)
    monkeypatch.setattr(weights, "_has_address", lambda host: False)
    assert initialise(Config(backbone=backbone, init=source), net).startswith("loaded 120 of 120")
    assert names == [asked]


@pytest.mark.parametrize("source", ["imagenet", "hf-hub:timm/resnet18.a1_in1k"])
def test_init_without_a_network_connection_is_one_line(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(weights, "_has_address", lambda host: False)
    monkeypatch.setattr(weights, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"--init {source}: the weights could not be") as error:
        initialise(Config(backbone="resnet18", init=source), nn.Identity())
    assert "\n" not in str(error.value) and "downloaded elsewhere" in str(error.value)
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.pth", "--init nothing.pth does not exist; pass a .safetensors or .pth file"),
        ("imagenet", "timm has no pretrained weights of fastnet-4"),
    ],
)
def test_init_names_what_it_takes(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialise(Config(backbone="fastnet-4", init=source), build_backbone("fastnet-4"))


def test_a_saved_resnet_loads_in_timm_and_torchvision(tmp_path: Path) -> None:
    net, path = build_backbone("resnet18").eval(), tmp_path / FILE
    save_backbone(path, net, Metadata(architecture="resnet18"))
    in_timm = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(path)).eval()
    in_torchvision = torchvision.models.resnet18()
    in_torchvision.fc = nn.Identity()  # type: ignore[assignment]
    in_torchvision.load_state_dict(load_file(path))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x), in_timm(x))
    torch.testing.assert_close(net(x), in_torchvision.eval()(x))


def test_class_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    assert class_names(str(tmp_path)) == ("a", "b")
    assert class_names("digits") == tuple("0123456789")
    assert class_names(str(tmp_path / "a")) is None and class_names("nowhere") is None


def test_strings_hold_all_metadata() -> None:
    full = Metadata(
        architecture="7",
        stem="cifar",
        image_size=32,
        features=4,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2.0, 3.0),
        classes=("ä", '"'),
        recipe={"lr": 0.1},
    )
    assert Metadata.from_strings(json.loads(json.dumps(full.strings()))) == full
    assert Metadata.from_strings({"format": "pt"}) is None
