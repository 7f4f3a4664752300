"""Views per second beside the named loaders, and on a GPU beside batched torchvision and kornia.

A call is one pass over a small data set of random bytes: whole loaders, shuffled, float32 out on a
CPU and bfloat16 on a GPU, same policy, bilinear. A pass includes all of its rendering, and begins
when the threads of the previous one no longer spin. Peers with worker processes have two. A peer
that is not installed is left out.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from bench import peers
from bench.measure import Call, Case
from fastssl_pipelines import View, open_pipeline, policies
from fastssl_pipelines.augment import as_images, reference, views_of

SETTLE_S = 0.1  # OpenMP's threads spin for some milliseconds after their last loop

# name: (policy, images, batch, height, width)
Setting = tuple[tuple[View, ...], int, int, int, int]
_SIMCLR = tuple(replace(view, interpolation="bilinear") for view in policies.simclr())
_EMP_SSL = tuple(  # its patches of 16 px, in terms that the peers support
    replace(view, patch=None, scale=(0.25, 0.25), ratio=(1.0, 1.0)) for view in policies.emp_ssl(20)
)
CPU_SETTINGS: dict[str, Setting] = {
    "SimCLR-CIFAR 2x32": (policies.simclr_cifar(), 2048, 256, 32, 32),
    "SimCLR 2x224 with blur": (_SIMCLR, 128, 32, 256, 341),
}
GPU_SETTINGS: dict[str, Setting] = {
    "SimCLR-CIFAR 2x32": (policies.simclr_cifar(), 1024, 1024, 32, 32),
    "SimCLR 2x224 with blur": (_SIMCLR, 256, 256, 256, 341),
    "DINO 2x224 + 8x96": (policies.dino(), 64, 64, 375, 500),
    "EMP-SSL 20x32": (_EMP_SSL, 256, 256, 32, 32),
}


def cases(device: str) -> Iterator[Case]:
    """Every case this device can run, the most informative first."""
    if torch.device(device).type == "cuda":
        for name, setting in GPU_SETTINGS.items():
            yield _gpu_case(name, *setting, device)
        yield _step_case(device)
    else:
        for name, setting in CPU_SETTINGS.items():
            yield _cpu_case(name, *setting)


def random_images(count: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def _cpu_case(
    name: str, views: tuple[View, ...], count: int, batch: int, height: int, width: int
) -> Case:
    def build() -> dict[str, Call]:
        images = random_images(count, height, width)
        variants = {}
        for peer, loader in peers.CPU_PEERS.items():
            with contextlib.suppress(ImportError):
                variants[peer] = loader(images, views, batch)
        return variants | {"fastssl": _fastssl_pass(images, views, batch)}

    return Case(
        name=f"pipeline {name}",
        parameters={"images": count, "batch": batch, "height": height, "width": width},
        build=build,
        check=partial(_check, views, height, width, "cpu"),
        work={"views": count * len(views)},
        settle_s=SETTLE_S,
    )


def _fastssl_pass(images: np.ndarray, views: Sequence[View], batch: int) -> Call:
    pipeline = open_pipeline(
        "resident", images, views=views, batch_size=batch, seed=0, device="cpu"
    )

    def one_pass() -> None:
        for _ in pipeline.epoch(0):
            pass

    return one_pass


def _check(
    views: Sequence[View], height: int, width: int, device: str, variants: dict[str, Call]
) -> None:
    """The timed engine renders what the reference renders, within 1/255."""
    images = as_images(random_images(4, height, width)).to(device)
    index = torch.arange(4, device=device)
    fast, params = views_of(images, views, 0, 0, index)
    for got, sampled, view in zip(fast, params, views, strict=True):
        truth = reference.render(images, sampled.table[None], view, "exact")[0]
        scale = torch.tensor(view.std, device=device).view(3, 1, 1)
        off = ((got.float() - truth.float()) * scale).abs()
        rounding = 8 * torch.finfo(view.dtype).eps if view.dtype != torch.float32 else 0
        share = (off > 1 / 255 + rounding).float().mean()
        assert share <= 0.001, f"{share:.2%} of values are more than 1/255 off"


def _gpu_case(
    name: str,
    policy: tuple[View, ...],
    count: int,
    batch: int,
    height: int,
    width: int,
    device: str,
) -> Case:
    views = tuple(replace(v, dtype=torch.bfloat16, channels_last=True) for v in policy)

    def build() -> dict[str, Call]:
        raw = random_images(count, height, width)
        images = as_images(raw).to(device)
        index = torch.arange(count, device=device)
        epoch = torch.zeros((), dtype=torch.int64, device=device)
        variants: dict[str, Call] = {
            "torchvision v2, one draw per batch": shared_torchvision(raw, views, device),
            "fastssl": lambda: views_of(images, views, 0, epoch, index),
            "fastssl, affine": lambda: views_of(images, views, 0, epoch, index, "affine"),
        }
        for peer, make in peers.GPU_PEERS.items():
            with contextlib.suppress(ImportError):
                variants[peer] = make(raw, views, batch, device)
        return variants

    return Case(
        name=f"pipeline {name}",
        parameters={"batch": batch, "views": len(views), "height": height, "width": width},
        build=build,
        check=partial(_check, views, height, width, device),
        work={"views": count * len(views), "images": count},
    )


def shared_torchvision(raw: np.ndarray, views: Sequence[View], device: str) -> Call:
    """Batched torchvision on the device: all samples of a batch get the same parameters."""
    from torchvision.transforms import v2

    pixels = torch.from_numpy(raw).permute(0, 3, 1, 2).contiguous().to(device)

    def transform(view: View) -> Call:
        end = [v2.ToDtype(view.dtype, scale=True), v2.Normalize(view.mean, view.std)]
        return v2.Compose([*peers.torchvision_steps(view), *end])

    transforms = [transform(view) for view in views]
    return lambda: [transform(pixels) for transform in transforms]


def _step_case(device: str) -> Case:
    """The cost of a step's views beside the step: ResNet-18 with a CIFAR stem, 2 x 1024, bf16."""

    def build() -> dict[str, Call]:
        from torchvision.models import resnet18

        net = resnet18(num_classes=128)
        net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
        net = net.to(device, memory_format=torch.channels_last)
        like = {"dtype": torch.bfloat16, "channels_last": True}
        views = tuple(replace(view, **like) for view in policies.simclr_cifar())
        images = as_images(random_images(1024, 32, 32)).to(device)
        index = torch.arange(1024, device=device)
        shown = torch.cat(views_of(images, views, 0, 0, index)[0])

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                net(shown).float().square().mean().backward()
            net.zero_grad(set_to_none=True)

        return {
            "forward and backward": step,
            "fastssl views": lambda: views_of(images, views, 0, 0, index),
        }

    return Case(
        name="pipeline share of a ResNet-18 CIFAR step",
        parameters={"batch": 1024, "views": 2},
        build=build,
        check=lambda variants: None,  # the views are checked by the cases above
        work={"views": 2048},
    )
