"""Backbones: images (N, 3, S, S) -> features (N, F); built, seeded, saved and loaded.

Shapes: N batch, F features, S pixels per side.
"""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastssl.config import Config


class FastNet(nn.Sequential):
    """A small residual net for CPUs and small images: three stages at S/1, S/2, S/4, F = 4 * width.

    At 16 px and width 32 it takes 9.7 million multiply-adds per image, 1/50 of a ResNet-18's at
    32 px.
    """

    def __init__(self, width: int = 32):
        self.num_features = 4 * width
        super().__init__(
            _convolution(3, width, stride=1),
            _Residual(width),
            _convolution(width, 2 * width, stride=2),
            _Residual(2 * width),
            _convolution(2 * width, 4 * width, stride=2),
            _Residual(4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.convolution = _convolution(width, width, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(x)


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def build_backbone(name: str, *, stem: str = "imagenet", image_size: int = 224) -> nn.Module:
    """'fastnet', 'fastnet-WIDTH' or a timm model without its classifier, with random weights.

    Raises ValueError for an unknown name, and for stem='cifar' on a network without a ResNet's
    stem.
    """
    if match := re.fullmatch(r"fastnet(?:-(\d+))?", name):
        return FastNet(int(match[1] or 32))
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5] or timm.list_models("resnet*")[:5]
        raise ValueError(
            f"unknown backbone {name!r}; 'fastnet', or a timm model such as {', '.join(close)}"
        )
    try:
        model = timm.create_model(name, num_classes=0, img_size=image_size)
    except TypeError:  # convolutional networks take any size and have no img_size
        model = timm.create_model(name, num_classes=0)
    if stem == "cifar":
        _use_cifar_stem(model, name)
    return model


def _use_cifar_stem(model: nn.Module, name: str) -> None:
    """Replace the stem by a 3x3 convolution of stride 1 without pooling, as for CIFAR."""
    first = getattr(model, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise ValueError(
            f"stem 'cifar' is for ResNets with conv1 and maxpool, which {name} does not have"
        )
    stem = nn.Conv2d(3, first.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()


def feature_width(backbone: nn.Module) -> int:
    """F, the width of a backbone's features."""
    return backbone.num_features  # type: ignore[return-value]


def seeded_backbone(config: Config, device: torch.device) -> nn.Module:
    """The backbone as `config.seed` initialises it, on `device`."""
    torch.manual_seed(config.seed)
    net = build_backbone(config.backbone, stem=config.stem, image_size=config.image_size)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return net.to(device).to(memory_format=layout)


def save_backbone(path: Path, backbone: nn.Module) -> None:
    """Write parameters and buffers as safetensors, with timm's names for a timm model."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary)
        os.replace(temporary, path)
    except SafetensorError as error:  # of the file, such as a full disk
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_backbone(path: Path, backbone: nn.Module, *, partial: bool = False) -> str:
    """Load a file of `save_backbone` into `backbone`; returns the coverage, "loaded 62 of 62
    tensors".

    ValueError where the names or shapes of any tensors differ; with `partial`, where all do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run has not finished pretraining")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no .safetensors file: {error}") from None
    expected = backbone.state_dict()
    matching = {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected and expected[name].shape == tensor.shape
    }
    coverage = f"loaded {len(matching)} of {len(expected)} tensors"
    mismatched = sorted((set(tensors) | set(expected)) - set(matching))
    if mismatched and not (partial and matching):
        raise ValueError(
            f"{path} is of another backbone: {len(matching)} of {len(expected)} tensors match, "
            f"the first mismatch is {mismatched[0]}"
        )
    backbone.load_state_dict(matching, strict=not mismatched)
    return coverage
