"""Peer libraries of the pipelines, each rendering a `View` policy in its idiomatic way.

Every function returns a call that passes once over `images` (M, H, W, 3) uint8 in batches and
discards them: whole loaders, with persistent workers. ImportError where not installed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl_pipelines import View
from fastssl_pipelines.prefetch import prefetch

Call = Callable[[], Any]
WORKERS = 2


class _Views(Dataset[list[Tensor]]):
    """Image i through each transform, one per view."""

    def __init__(self, images: Any, transforms: Sequence[Callable[[Any], Tensor]]) -> None:
        self.images, self.transforms = images, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return [transform(self.images[i]) for transform in self.transforms]


def _one_thread(_: int) -> None:
    """Limit a worker process to one thread, so that workers do not compete for cores."""
    torch.set_num_threads(1)
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(0)


def _loader(dataset: Dataset[list[Tensor]], batch_size: int) -> Call:
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        worker_init_fn=_one_thread,
    )

    def one_pass() -> None:
        for _ in loader:
            pass

    return one_pass


def torchvision_steps(view: View) -> list[Callable[..., Any]]:
    """All but the conversion to floats and the normalisation."""
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(view.interpolation)
    kernel = max(3, view.size // 10 // 2 * 2 + 1)  # SimCLR's: a tenth of the view, odd
    steps: list[Callable[..., Any]] = [
        v2.RandomResizedCrop(view.size, view.scale, view.ratio, mode, antialias=True),
        v2.RandomHorizontalFlip(view.flip),
        v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_p),
        v2.RandomGrayscale(view.gray),
    ]
    if view.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, view.blur_sigma)], view.blur))
    if view.solarize:
        steps.append(v2.RandomSolarize(255 * view.solarize_threshold, view.solarize))
    return steps


def torchvision_pil(images: np.ndarray, views: Sequence[View], batch_size: int) -> Call:
    from PIL import Image
    from torchvision.transforms import v2

    def transform(view: View) -> Callable[[Any], Tensor]:
        end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(view.mean, view.std)]
        return v2.Compose([*torchvision_steps(view), v2.ToImage(), *end])

    photos = [Image.fromarray(image) for image in images]
    return _loader(_Views(photos, [transform(view) for view in views]), batch_size)


def torchvision_tensor(images: np.ndarray, views: Sequence[View], batch_size: int) -> Call:
    from torchvision.transforms import v2

    def transform(view: View) -> Callable[[Any], Tensor]:
        end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(view.mean, view.std)]
        return v2.Compose([*torchvision_steps(view), *end])

    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return _loader(_Views(tensors, [transform(view) for view in views]), batch_size)


def albumentationsx(images: np.ndarray, views: Sequence[View], batch_size: int) -> Call:
    import albumentations as A
    from albumentations.pytorch import ToTensorV2

    def transform(view: View) -> Callable[[Any], Tensor]:
        *strengths, h = view.jitter
        ranges = [(max(0.0, 1 - x), 1 + x) for x in strengths]
        steps = [
            A.RandomResizedCrop((view.size, view.size), view.scale, view.ratio),
            A.HorizontalFlip(p=view.flip),
            A.ColorJitter(*ranges, (-h, h), p=view.jitter_p),
            A.ToGray(p=view.gray),
        ]
        if view.blur:
            steps.append(A.GaussianBlur((0, 0), view.blur_sigma, p=view.blur))
        compose = A.Compose([*steps, A.Normalize(view.mean, view.std), ToTensorV2()])
        return lambda image: compose(image=image)["image"]

    return _loader(_Views(images, [transform(view) for view in views]), batch_size)


def kornia(images: np.ndarray, views: Sequence[View], batch_size: int, device: str = "cpu") -> Call:
    """Batched on the device; one order of the colour steps per batch, no antialias."""
    import kornia.augmentation as K

    def transform(view: View) -> torch.nn.Module:
        b, c, s, h = view.jitter
        kernel = max(3, view.size // 10 // 2 * 2 + 1)
        return K.AugmentationSequential(
            K.RandomResizedCrop((view.size, view.size), view.scale, view.ratio),
            K.RandomHorizontalFlip(p=view.flip),
            K.ColorJiggle(b, c, s, h, p=view.jitter_p),
            K.RandomGrayscale(p=view.gray),
            K.RandomGaussianBlur((kernel, kernel), view.blur_sigma, p=view.blur),
            K.RandomSolarize(view.solarize_threshold, p=view.solarize),
            K.Normalize(torch.tensor(view.mean), torch.tensor(view.std)),
        ).to(device)

    transforms = [transform(view) for view in views]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)

    def one_pass() -> None:
        for batch in pixels.split(batch_size):
            for view, augment in zip(views, transforms, strict=True):
                augment(batch.float() / 255).to(view.dtype)

    return one_pass


def dali(images: np.ndarray, views: Sequence[View], batch_size: int, device: str = "cpu") -> Call:
    """DALI's operators, on a CPU without a driver; its hue is linear, its contrast centre constant.

    On a GPU the bytes are uploaded batch by batch; nothing is decoded. It has no bfloat16: float16.
    """
    from nvidia.dali import fn, pipeline_def, types

    gpu = torch.device(device).type == "cuda"
    layout = "HWC" if views[0].channels_last else "CHW"
    dtypes = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}

    def samples() -> Iterator[list[np.ndarray]]:
        while True:
            order = np.random.default_rng().permutation(len(images))
            for start in range(0, len(images) - batch_size + 1, batch_size):
                yield [images[i] for i in order[start : start + batch_size]]

    def happens(p: float) -> Any:
        return fn.random.coin_flip(probability=p, dtype=types.BOOL)

    def factor(strength: float) -> Any:
        return fn.random.uniform(range=(max(0.0, 1 - strength), 1 + strength))

    def render(image: Any, view: View) -> Any:
        *_, h = view.jitter
        b, c, s = (factor(strength) for strength in view.jitter[:3])
        hue = fn.random.uniform(range=(-360 * h, 360 * h))
        x = fn.random_resized_crop(
            image, size=view.size, random_area=view.scale, random_aspect_ratio=view.ratio
        )
        if happens(view.jitter_p):
            x = fn.color_twist(x, brightness=b, contrast=c, saturation=s, hue=hue)
        if happens(view.gray):
            x = fn.saturation(x, saturation=0.0)
        if happens(view.blur):
            x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=view.blur_sigma))
        return fn.crop_mirror_normalize(
            x,
            mirror=fn.random.coin_flip(probability=view.flip),
            mean=[255 * m for m in view.mean],
            std=[255 * d for d in view.std],
            dtype=dtypes.get(view.dtype, types.FLOAT16),
            output_layout=layout,
        )

    @pipeline_def(
        batch_size=batch_size,
        num_threads=WORKERS,
        device_id=torch.cuda.current_device() if gpu else None,
        enable_conditionals=True,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    def pipeline() -> Any:
        image = fn.external_source(source=samples(), layout="HWC")
        image = image.gpu() if gpu else image
        return tuple(render(image, view) for view in views)

    built = pipeline()
    built.build()

    def collect(_: Any) -> None:
        for output in built.share_outputs():
            torch.from_dlpack(output.as_tensor())
        built.release_outputs()

    def one_pass() -> None:  # all views are rendered before it returns
        batches = range(len(images) // batch_size)
        for _ in prefetch(batches, lambda _: built.schedule_run(), collect, 2):
            pass

    return one_pass


CPU_PEERS = {
    "torchvision v2, PIL": torchvision_pil,
    "torchvision v2, tensor": torchvision_tensor,
    "albumentationsx": albumentationsx,
    "DALI": dali,
    "kornia": kornia,
}
GPU_PEERS = {"kornia": kornia, "DALI": dali}
