"""Images per second from JPEGs to views: the engines that decode, beside common loaders.

A call is one pass over the 202 ImageNet JPEGs of the test data (FASTSSL_DATA), or over as many
synthetic ones of the median size where that folder is missing. Same policy for all, bilinear,
float32 on a CPU, bfloat16 on a GPU, shuffled, last batch dropped. A peer that is not installed is
left out.
"""

import atexit
import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import Call, Case
from bench.suites.views import SETTLE_S
from fastssl_pipelines import View, open_pipeline, policies, spec
from fastssl_pipelines.augment import as_images, views_of
from fastssl_pipelines.prefetch import prefetch
from fastssl_pipelines.sources.decoding import decode

BATCH = 32
SYNTHETIC = (375, 500)  # height, width: the median of ImageNet
_CROP = View(size=224)  # only crop and flip: all that FFCV's decoder offers, and a flip


def cases(device: str) -> Iterator[Case]:
    """Every case this device can run, the most informative first."""
    if torch.device(device).type == "cuda":
        like = {"dtype": torch.bfloat16, "channels_last": True}
        for name, views in (("2x224", policies.simclr()), ("DINO 2x224 + 8x96", policies.dino())):
            yield _case(f"JPEG {name}", [replace(v, **like) for v in views], device, ["DALI bare"])
        yield _step_case(device)
        return
    simclr = [replace(view, interpolation="bilinear") for view in policies.simclr()]
    yield _case("JPEG SimCLR 2x224", simclr, device, ["torchvision"])
    yield _case("JPEG crop 2x32", [replace(_CROP, size=32)] * 2, device, ["DALI bare"])
    yield _case("JPEG crop 2x224", [_CROP] * 2, device, ["FFCV alone", "DALI bare"])
    yield _case("JPEG crop 8x224", [_CROP] * 8, device, ["FFCV alone", "DALI bare"])


@cache
def _folder() -> Path:
    """The folder of the converted file, deleted when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="fastssl-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _files() -> tuple[Path, ...]:
    root = Path(__file__).parents[3] / "shared" / "data"
    real = Path(os.environ.get("FASTSSL_DATA", root)) / "imagenet-samples"
    if real.is_dir():
        return tuple(sorted(real.iterdir()))
    from PIL import Image

    rng = np.random.default_rng(0)
    height, width = SYNTHETIC
    for k in range(202):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        photo = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
        noisy = photo + rng.normal(0, 6, photo.shape)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=96)
        (_folder() / f"{k:03d}.jpg").write_bytes(file.getvalue())
    return tuple(sorted(_folder().glob("*.jpg")))


@cache
def _beton() -> Path:
    """The same JPEGs, byte for byte."""
    from fastssl_pipelines.sources.convert import convert

    return convert(list(_files()), _folder() / "images.beton").target


def _case(name: str, views: Sequence[View], device: str, peers: list[str]) -> Case:
    passes = len(_files()) // BATCH * BATCH

    def build() -> dict[str, Call]:
        variants: dict[str, Call] = {}
        for peer in peers:
            with contextlib.suppress(ImportError):
                variants[peer] = _PEERS[peer](views, device)
        for engine in ("dali", "ffcv"):
            with contextlib.suppress(ValueError):  # the library is missing
                variants[f"fastssl {engine}"] = partial(_pass, _open(engine, views, device))
        return variants

    return Case(
        name=name,
        parameters={"images": passes, "batch": BATCH, "views": len(views), "files": _origin()},
        build=build,
        check=partial(_check, views, device),
        work={"images": passes, "views": passes * len(views)},
        settle_s=SETTLE_S,
        graph=False,
    )


def _origin() -> str:
    return "ImageNet" if _files()[0].suffix == ".JPEG" else "synthetic"


def _open(engine: str, views: Sequence[View], device: str, **options: Any) -> spec.Pipeline:
    source = list(_files()) if engine == "dali" else _beton()
    return open_pipeline(
        engine, source, views=views, batch_size=BATCH, seed=0, device=device, **options
    )


def _pass(pipeline: spec.Pipeline) -> None:
    for batch in pipeline.epoch(0):
        last = batch.views[-1]
    if last.is_cuda:
        torch.cuda.synchronize()


def _check(views: Sequence[View], device: str, variants: dict[str, Call]) -> None:
    """Each engine renders what Pillow decodes: exactly on a CPU with DALI, else closely."""
    pixels = [decode(np.fromfile(file, np.uint8)) for file in _files()]
    images = as_images(pixels).to(device)
    for engine, bound in (("dali", 2), ("ffcv", 4)):
        if f"fastssl {engine}" not in variants:
            continue
        batch = next(iter(_open(engine, views, device, scaled=False).epoch(0)))
        truth, _ = views_of(images.select(batch.index), views, 0, 0, batch.index)
        for got, expected, view in zip(batch.views, truth, views, strict=True):
            scale = torch.tensor(view.std, device=device).view(3, 1, 1)
            off = float(((got.float() - expected.float()) * scale).abs().mean()) * 255
            exact = engine == "dali" and device == "cpu"
            assert off <= (0 if exact else bound), f"{engine}: {off:.2f}/255 off in the mean"


def _torchvision(views: Sequence[View], device: str) -> Call:
    """A Dataset that opens a file with Pillow, a transform per view, a DataLoader with workers."""
    from PIL import Image
    from torchvision.transforms import v2

    from bench import peers

    def transform(view: View) -> Any:
        end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(view.mean, view.std)]
        return v2.Compose([*peers.torchvision_steps(view), v2.ToImage(), *end])

    class Photos:
        def __len__(self) -> int:
            return len(_files())

        def __getitem__(self, i: int) -> Image.Image:
            with Image.open(_files()[i]) as image:
                return image.convert("RGB")

    return peers._loader(peers._Views(Photos(), [transform(view) for view in views]), BATCH)


def _bare_dali(views: Sequence[View], device: str) -> Call:
    """DALI decodes bytes held in memory, one batch ahead within the pass: no views, no copy."""
    from fastssl_pipelines.engines.dali import _Dali

    try:
        decoder = _Dali(BATCH, os.cpu_count() or 1, torch.device(device), oriented=False)
    except ValueError as error:
        raise ImportError(str(error)) from error
    data = [np.fromfile(file, np.uint8) for file in _files()]
    batches = [data[k : k + BATCH] for k in range(0, len(data) // BATCH * BATCH, BATCH)]

    def one_pass() -> None:
        for _ in prefetch(batches, decoder.schedule, decoder.collect, 1):
            pass
        if device != "cpu":
            torch.cuda.synchronize()

    return one_pass


def _ffcv_alone(views: Sequence[View], device: str) -> Call:
    """FFCV's loader with its RandomResizedCrop decoder, once per view; uint8, nothing else."""
    from fastssl_pipelines.sources.beton import importing_ffcv

    try:
        with importing_ffcv():
            from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
            from ffcv.loader import Loader, OrderOption
            from ffcv.pipeline import PipelineSpec
    except ValueError as error:
        raise ImportError(str(error)) from error
    pipelines = {
        f"view{v}": PipelineSpec(
            "image",
            RandomResizedCropRGBImageDecoder((view.size, view.size), view.scale, view.ratio),
        )
        for v, view in enumerate(views)
    }
    loader = Loader(
        str(_beton()),
        batch_size=BATCH,
        num_workers=os.cpu_count() or 1,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": None, "index": None, **pipelines},
    )

    def one_pass() -> None:
        for _ in loader:
            pass

    return one_pass


_PEERS = {"torchvision": _torchvision, "DALI bare": _bare_dali, "FFCV alone": _ffcv_alone}


def _step_case(device: str) -> Case:
    """How long a two-view ResNet-50 step waits for data: from the engine, and from memory."""

    def build() -> dict[str, Call]:
        from torchvision.models import resnet50

        net = resnet50().to(device, memory_format=torch.channels_last)
        like = {"dtype": torch.bfloat16, "channels_last": True}
        views = [replace(view, **like) for view in policies.simclr()]
        pipeline = _open("dali", views, device)
        in_memory = [list(batch.views) for batch in pipeline.epoch(0)]

        def train(batches: Any) -> None:
            for shown in batches:
                with torch.autocast("cuda", torch.bfloat16):
                    net(torch.cat(shown)).float().square().mean().backward()
                net.zero_grad(set_to_none=True)
            torch.cuda.synchronize()

        return {
            "views in memory": lambda: train(in_memory),
            "fastssl dali": lambda: train(list(b.views) for b in pipeline.epoch(0)),
        }

    passes = len(_files()) // BATCH * BATCH
    return Case(
        name="JPEG wait of a ResNet-50 2x224 step",
        parameters={"batch": BATCH, "views": 2, "files": _origin()},
        build=build,
        check=lambda variants: None,  # the views are checked by the cases above
        work={"images": passes},
        graph=False,
    )
