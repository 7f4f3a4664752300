"""Backbones: features of the promised width, timm by name, the CIFAR stem, errors."""

import pytest
import timm
import torch
from torch import nn

from fastssl.backbones import build_backbone


@pytest.mark.parametrize(
    ("name", "stem", "size", "features"),
    [
        ("fastnet", "imagenet", 16, 128),
        ("fastnet-8", "imagenet", 33, 32),
        ("resnet18", "cifar", 32, 512),
        ("vit_tiny_patch16_224", "imagenet", 64, 192),
    ],
)
def test_features(name: str, stem: str, size: int, features: int) -> None:
    net = build_backbone(name, stem=stem, image_size=size)
    assert net.num_features == features
    assert net(torch.randn(2, 3, size, size)).shape == (2, features)


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
        ("vit_tiny_patch16_224", "cifar", "stem 'cifar' is for ResNets"),
    ],
)
def test_errors(name: str, stem: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(name, stem=stem)
