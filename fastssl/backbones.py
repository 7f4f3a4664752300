"""Backbones: images (N, 3, S, S) -> features (N, F); built, seeded, and what sizes they take.

Shapes: N batch, F features, S pixels per side.
"""

import re
import warnings
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

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


class BackboneNameError(ValueError):
    """There is no such backbone, or not with this stem."""


def build_backbone(name: str, *, stem: str = "imagenet", image_size: int = 224) -> nn.Module:
    """'fastnet', 'fastnet-WIDTH' or a timm model without its classifier, with random weights.

    Where timm can, the network is built for `image_size` and takes other sizes too. Raises
    BackboneNameError for an unknown name, for one with a tag of pretrained weights, and for
    stem='cifar' on a network without a ResNet's stem.
    """
    if match := re.fullmatch(r"fastnet(?:-(\d+))?", name):
        return FastNet(int(match[1] or 32))
    _require_model_name(name)
    model = _timm_model(name, image_size)
    if stem == "cifar":
        _use_cifar_stem(model, name)
    return model


def _require_model_name(name: str) -> None:
    """BackboneNameError unless `name` is that of a timm model, without pretrained weights."""
    import timm

    architecture, _, tag = name.partition(".")
    if tag and timm.is_model(architecture):
        raise BackboneNameError(
            f"--backbone {name} names pretrained weights, and a backbone starts from random ones: "
            f"pass --backbone {architecture}, with --init {name} to start from those weights"
        )
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:5] or timm.list_models("resnet*")[:5]
        raise BackboneNameError(
            f"unknown backbone {name!r}; 'fastnet', or a timm model such as {', '.join(close)}"
        )


def _timm_model(name: str, image_size: int) -> nn.Module:
    """The model built for `image_size`, with as much freedom in the size as its class offers."""
    import timm

    sized: dict[str, Any] = {"img_size": image_size}
    with warnings.catch_warnings():
        # timm's deprecated names stand for weights: "... to current vit_base_patch16_224.sam_in1k"
        warnings.filterwarnings("error", "Mapping deprecated model name")
        try:
            for options in ({**sized, "dynamic_img_size": True}, sized):
                try:
                    return timm.create_model(name, num_classes=0, **options)
                except TypeError:  # the class has no such option
                    continue
            return timm.create_model(name, num_classes=0)
        except UserWarning as warning:
            current = str(warning).rstrip(".").rpartition(" ")[2]
            architecture, _, tag = current.partition(".")
            init = f", with --init {current} to start from those weights" if tag else ""
            raise BackboneNameError(
                f"--backbone {name} is timm's old name of {current}: pass --backbone "
                f"{architecture}{init}"
            ) from None


def _use_cifar_stem(model: nn.Module, name: str) -> None:
    """Replace the stem by a 3x3 convolution of stride 1 without pooling, as for CIFAR."""
    first = getattr(model, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise BackboneNameError(
            f"stem 'cifar' is for ResNets with conv1 and maxpool, which {name} does not have"
        )
    stem = nn.Conv2d(3, first.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()


@torch.no_grad()
def feature_width(backbone: nn.Module, image_size: int) -> int:
    """F, the width of what `backbone` returns for images (N, 3, image_size, image_size).

    Found by a forward pass in evaluation mode on meta tensors, which have shapes and no values:
    timm's `num_features` is another number for one model in six. Changes nothing, draws nothing.
    Raises ValueError where the backbone does not return one vector per image.
    """
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in chain(backbone.named_parameters(), backbone.named_buffers())
    }
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    training = {module: module.training for module in backbone.modules()}
    try:
        features = functional_call(backbone.eval(), tensors, (images,))
    finally:
        for module, mode in training.items():
            module.training = mode
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"the backbone returns {getattr(features, 'shape', type(features).__name__)} for 2 "
            "images: it must return one vector per image, (2, F)"
        )
    return features.shape[1]


class SizeCheck:
    """Which image sizes the backbone of a run takes, found by trying them on meta tensors."""

    def __init__(self, config: Config):
        self._config = config
        self._built: dict[int, nn.Module] = {}
        self._problems: dict[tuple[int, int], str | None] = {}

    def problem(self, size: int, built_for: int | None = None) -> str | None:
        """Why the backbone, built for `config.image_size`, cannot take `size` px; None where it
        can. BackboneNameError where there is no such backbone."""
        built_for = built_for or self._config.image_size
        if (built_for, size) not in self._problems:
            self._problems[built_for, size] = self._try(size, built_for)
        return self._problems[built_for, size]

    def require(self, size: int) -> None:
        """ValueError with the nearest sizes that work where the backbone cannot take `size`."""
        problem = self.problem(size)
        if problem is None:
            return
        image_size = self._config.image_size
        nearest = self._nearest(size)
        view = "" if size == image_size else f" (a view of --image-size {image_size})"
        sizes = f"{' and '.join(map(str, nearest))} px" if nearest else "none near it"
        raise ValueError(
            f"--backbone {self._config.backbone} cannot take images of {size} px{view}; sizes that "
            f"work: {sizes}; change --image-size or the backbone ({problem})"
        )

    def _try(self, size: int, built_for: int) -> str | None:
        config = self._config
        try:
            if built_for not in self._built:
                with torch.device("meta"):
                    self._built[built_for] = build_backbone(
                        config.backbone, stem=config.stem, image_size=built_for
                    )
            feature_width(self._built[built_for], size)
        except BackboneNameError:
            raise
        except _REFUSALS as error:
            return " ".join(str(error).split())[:160] or type(error).__name__
        return None

    def _nearest(self, size: int) -> list[int]:
        """The sizes next to `size` that work, below and above, of those that are likely to."""
        steps = (4, 7, 14, 16, 28, 32, 56, 64, 128, 224, 256)
        below = sorted({(size - 1) // step * step for step in steps} - {0}, reverse=True)
        above = sorted({(size // step + 1) * step for step in steps})
        image_size = self._config.image_size
        found = []
        for candidates in (below, above):
            for candidate in candidates:
                built_for = candidate if size == image_size else image_size
                if self.problem(candidate, built_for) is None:
                    found.append(candidate)
                    break
        return found


# What networks raise for an image size they cannot take.
_REFUSALS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def seeded_backbone(config: Config, device: torch.device) -> nn.Module:
    """The backbone as `config.seed` initialises it, on `device`."""
    torch.manual_seed(config.seed)
    net = build_backbone(config.backbone, stem=config.stem, image_size=config.image_size)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return net.to(device).to(memory_format=layout)
