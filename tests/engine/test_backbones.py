"""Backbones: the width that they return, the sizes that they take, timm by name, the CIFAR stem,
errors; a sweep over the families of timm on meta tensors."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from fastssl.backbones import BackboneNameError, SizeCheck, build_backbone, feature_width
from fastssl.config import Config
from fastssl.data import loading
from fastssl.data.loading import size_step
from fastssl.optim import undecayed
from fastssl.pretrain import pretrain
from fastssl.recipes import recipe_config
from fastssl.schedule import ramp


@pytest.mark.parametrize(
    ("name", "stem", "size", "features"),
    [
        ("fastnet", "imagenet", 16, 128),
        ("fastnet-8", "imagenet", 33, 32),
        ("resnet18", "cifar", 32, 512),
        ("test_vit", "imagenet", 64, 64),
        ("mobilenetv3_small_050", "imagenet", 32, 1024),  # num_features 288
        ("efficientvit_b0", "imagenet", 64, 1280),  # num_features 128
        ("levit_128s", "imagenet", 224, 384),
    ],
)
def test_the_width_is_what_the_network_returns(
    name: str, stem: str, size: int, features: int
) -> None:
    net = build_backbone(name, stem=stem, image_size=size)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    assert feature_width(net, size) == features
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, state[k]) for k, tensor in net.state_dict().items())
    assert net(torch.randn(2, 3, size, size)).shape == (2, features)


def test_a_network_without_one_vector_per_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"returns torch.Size\(\[2, 4, 5, 5\]\) for 2 images"):
        feature_width(nn.Conv2d(3, 4, 4), 8)


def family_member(module: str) -> str:
    """A small model of a family of timm."""
    names = timm.list_models(module=module)
    for size in ("test_", "nano", "atto", "xx", "_xs", "050", "tiny", "_t", "small", "_s", "b0"):
        for name in names:
            if size in name:
                return name
    return names[0]


@pytest.mark.slow
def test_one_model_of_each_family_of_timm() -> None:
    """On meta tensors, 40 s of one core: each is built, has a width, and decays nothing but
    matrices and kernels. Sequencers, whose LSTMs take 20 s on meta tensors, are only built."""
    other_width = set()
    for module in timm.list_modules():
        name = family_member(module)
        with torch.device("meta"):
            net = timm.create_model(name, num_classes=0)
        exempt = undecayed(net)
        for k, parameter in net.named_parameters():
            matrix = parameter.ndim > 1 and k.rpartition(".")[2].startswith("weight")
            assert matrix or k in exempt, f"{name}: {k} {tuple(parameter.shape)}"
        if module == "sequencer":
            continue
        if feature_width(net, net.pretrained_cfg["input_size"][-1]) != net.num_features:
            other_width.add(module)
    assert {"mobilenetv3", "ghostnet", "hgnet", "fasternet", "efficientvit_mit"} <= other_width


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("test_vit", 8, "sizes that work: 16 px; .*patch size"),
        ("test_vit", 90, "sizes that work: 80 and 96 px"),
        ("convnext_atto", 16, "sizes that work: 32 px; .*Kernel size"),
        ("test_maxvit", 100, "sizes that work: .* px; .*window"),
    ],
)
def test_a_size_that_a_network_cannot_take_is_refused(name: str, size: int, message: str) -> None:
    """And the refusal is true: on real tensors it fails there, and works where it is said to."""
    with pytest.raises(ValueError, match=message) as error:
        size_step(Config(backbone=name, image_size=size))
    with pytest.raises((RuntimeError, AssertionError)):
        build_backbone(name, image_size=size)(torch.zeros(2, 3, size, size))
    (sizes,) = re.findall(r"sizes that work: ([\d and]+) px", str(error.value))
    for works in map(int, sizes.split(" and ")):
        net = build_backbone(name, image_size=works).eval()
        assert net(torch.zeros(2, 3, works, works)).isfinite().all()


def test_a_view_that_a_network_cannot_take_is_refused() -> None:
    config = Config(backbone="test_vit", policy="dino", views=8, image_size=64)
    with pytest.raises(ValueError, match=r"of 27 px \(a view of --image-size 64\).* 16 and 32 px"):
        size_step(config)
    assert size_step(replace(config, image_size=224)) == 4  # its local views are of 96 px


@pytest.mark.parametrize(
    ("name", "start", "size", "step"),
    [("fastnet-4", 8, 20, 4), ("test_vit", 32, 96, 16), ("vit_small_patch14_dinov2", 56, 112, 14)],
)
def test_a_ramp_grows_by_what_the_network_takes(
    name: str, start: int, size: int, step: int
) -> None:
    config = Config(backbone=name, image_size=size, ramp_epochs=5, start_size=start)
    assert size_step(config) == step
    sizes = [ramp(config, epoch, step).image_size for epoch in range(6)]
    assert sizes[0] == start and sizes[-1] == size and sizes == sorted(sizes)
    assert all((s - start) % step == 0 for s in sizes) and len(set(sizes)) > 2


def test_a_vit_takes_other_sizes_and_is_the_same_at_its_own() -> None:
    net = build_backbone("test_vit", image_size=64).eval()
    theirs = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    theirs.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(net(x), theirs(x))
    assert net(torch.randn(2, 3, 32, 32)).shape == net(torch.randn(2, 3, 96, 96)).shape == (2, 64)


@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet18.a1_in1k"])
def test_sizes_and_names_are_checked_before_data_is_read(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("the data is read")

    monkeypatch.setattr(loading, "open_split", read)
    config = recipe_config("digits-barlow", backbone=backbone)
    with pytest.raises(ValueError, match="--backbone"):
        pretrain(config, tmp_path / "run", print)
    assert not (tmp_path / "run").exists()


def test_the_check_costs_no_memory_and_no_random_numbers() -> None:
    random = torch.get_rng_state()
    check = SizeCheck(Config(backbone="test_vit"))
    assert check.problem(224) is None and check.problem(96) is None
    assert "divisible" in str(check.problem(100))
    assert torch.equal(random, torch.get_rng_state())
    assert {p.device.type for net in check._built.values() for p in net.parameters()} == {"meta"}


def test_cifar_stem_keeps_the_resolution() -> None:
    net = build_backbone("resnet18", stem="cifar")
    assert net.conv1.stride == (1, 1) and net.conv1.kernel_size == (3, 3)  # type: ignore[union-attr]
    assert isinstance(net.maxpool, nn.Identity)
    maps = net.forward_features(torch.randn(1, 3, 32, 32))  # type: ignore[operator]
    assert maps.shape == (1, 512, 4, 4)


def test_a_timm_backbone_is_timms() -> None:
    net, theirs = build_backbone("resnet18"), timm.create_model("resnet18", num_classes=0)
    theirs.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("name", "stem", "message"),
    [
        ("resnet8000", "imagenet", "unknown backbone 'resnet8000'"),
        ("test_vit", "cifar", "stem 'cifar' is for ResNets"),
        (
            "resnet18.a1_in1k",
            "imagenet",
            r"pretrained weights.* pass --backbone resnet18, with --init resnet18\.a1_in1k",
        ),
        (
            "vit_base_patch16_224_in21k",
            "imagenet",
            "old name.* pass --backbone vit_base_patch16_224, with --init .*augreg_in21k",
        ),
    ],
)
def test_errors(name: str, stem: str, message: str) -> None:
    with pytest.raises(BackboneNameError, match=message):
        build_backbone(name, stem=stem)
