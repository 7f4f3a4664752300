"""Views rendered by DALI's operators, with fastssl's parameters.

Parameters are sampled as for the other engines (`augment.draw`) and passed to DALI per sample, so a
view is still a function of (seed, epoch, index, view). The pixels differ from fastssl's render,
which follows torchvision, as follows:

- jitter is always brightness, contrast, saturation, hue, in this order, also in `Params`;
- brightness and contrast are one map, saturation, hue and grayscale another: values are clamped
  after these two instead of after each step, and contrast keeps the mean luma of the view before
  it;
- hue is a rotation in YIQ, not in HSV;
- equalize takes OpenCV's formula, some levels from that of torchvision and Pillow;
- values are rounded to bytes after each operator, and resize antialiases with DALI's filters.

Crop, resize, flips, rotate, blur, solarize, normalise and erase are the same up to this rounding.

Shapes: N batch, C channels, H and W pixels of a view, V views.
"""
# mypy: disable-error-code="attr-defined,arg-type"
# ^ DALI creates its operators and constants at import

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastssl_pipelines.augment import Images, Params, Quality, draw
from fastssl_pipelines.augment.checks import require_fit
from fastssl_pipelines.augment.reference import BLUR_REACH
from fastssl_pipelines.spec import View

APPROXIMATIONS = (
    "render='dali' approximates: hue is a rotation in YIQ, jitter is always brightness, contrast,"
    " saturation, hue, values are clamped after contrast and after hue only, and rounded to bytes"
    " after each operator, equalize is OpenCV's; render='fastssl' (the default) is torchvision's"
    " semantics"
)
SUPPORTED_FIELDS = frozenset(
    "size scale ratio patch interpolation flip vertical_flip rotate rotate_degrees jitter jitter_p"
    " gray blur blur_sigma equalize solarize solarize_threshold erase erase_scale erase_ratio mean"
    " std dtype channels_last".split()
)
JITTER_STEPS = ("step0", "step1", "step2", "step3")


def require_supported(views: Sequence[View], quality: Quality) -> None:
    """ValueError naming the first setting that DALI's operators do not support."""
    if quality != "exact":
        raise ValueError(
            f"quality is {quality!r}: render='dali' has colour operators of its own;"
            " choose quality='exact' or render='fastssl'"
        )
    for view in views:
        for field in fields(view):
            value = getattr(view, field.name)
            if field.name not in SUPPORTED_FIELDS and value != field.default:
                raise ValueError(
                    f"View.{field.name} is {value!r}: render='dali' has no operator for it;"
                    " choose render='fastssl'"
                )


def empty_pipeline(batch_size: int, threads: int, device: torch.device) -> Any:
    """A DALI pipeline, run by explicit calls, to which operators can be added. ValueError where
    DALI is not installed."""
    try:
        from nvidia.dali import Pipeline
    except ImportError as error:
        raise ValueError(
            f"DALI cannot be imported ({error}): pip install 'fastssl-torch[dali]'"
        ) from error
    return Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )


class DaliRender:
    """A DALI pipeline that renders `views` of decoded images with given parameters.

    One batch at a time; it keeps no state between calls.
    """

    def __init__(
        self,
        views: Sequence[View],
        quality: Quality,
        *,
        batch_size: int,
        threads: int,
        device: torch.device,
    ) -> None:
        require_supported(views, quality)
        self.views, self._device = tuple(views), device
        self._inputs: list[list[str]] = []  # per view: the arguments of its operators
        cuda = device.type == "cuda"
        self._pipe = empty_pipeline(batch_size, threads, device)
        from nvidia.dali import fn, types

        with self._pipe:
            images = fn.external_source(
                name="images",
                device="gpu" if cuda else "cpu",
                dtype=types.DALIDataType.UINT8,
                layout="HWC",
                ndim=3,
                no_copy=not cuda,  # a call returns after they have been read
            )
            self._pipe.set_outputs(*(self._view(images, view) for view in self.views))
        self._pipe.build()

    def views_of(
        self, images: Images, seed: int, epoch: int, index: Tensor
    ) -> tuple[list[Tensor], tuple[Params, ...]]:
        """All views of `images` (N), whose positions in the data set are `index` (N,). -> V tensors
        (N, C, H, W), V `Params`"""
        index, sizes = index.cpu(), images.layout[:, 1:].cpu().unbind(1)
        params = tuple(
            _fixed_order(draw(view, seed, epoch, index, v, *sizes))
            for v, view in enumerate(self.views)
        )
        return self._run(images, params), params

    def render(self, images: Images, params: Sequence[Params]) -> list[Tensor]:
        """Render `images` (N) with `params` (V, on the CPU). -> V (N, C, H, W)

        ValueError where they do not fit the images or the views.
        """
        layout = images.layout.cpu()
        for view, drawn in zip(self.views, params, strict=True):
            require_fit(layout, drawn.table[None], view)
        return self._run(images, params)

    def _run(self, images: Images, params: Sequence[Params]) -> list[Tensor]:
        cuda = self._device.type == "cuda"
        flat = images.flat if cuda else images.flat.numpy()  # DALI syncs with a GPU tensor's stream
        layout = images.layout.tolist()
        self._pipe.feed_input(
            "images", [flat[at : at + h * w * 3].reshape(h, w, 3) for at, h, w in layout]
        )
        for v, (view, sampled) in enumerate(zip(self.views, params, strict=True)):
            arguments = _arguments(view, sampled)
            for name in self._inputs[v]:
                self._pipe.feed_input(f"{name}{v}", arguments[name].contiguous().numpy())
        self._pipe.schedule_run()
        stream = torch.cuda.current_stream(self._device) if cuda else None
        outputs = self._pipe.share_outputs(cuda_stream=stream)
        views = [self._tensor(x, view) for x, view in zip(outputs, self.views, strict=True)]
        self._pipe.release_outputs()
        return views

    def _tensor(self, output: Any, view: View) -> Tensor:
        """(N, C, H, W) in the view's dtype and memory format; on a GPU a copy in torch's memory."""
        x = torch.from_dlpack(output.as_tensor())
        x = x.permute(0, 3, 1, 2) if view.channels_last else x
        return x.to(view.dtype, copy=self._device.type == "cuda")

    def _view(self, images: Any, view: View) -> Any:
        """The operators of one view, without those that never apply."""
        from nvidia.dali import fn, types

        inputs: list[str] = []
        number = len(self._inputs)
        self._inputs.append(inputs)

        def argument(name: str) -> Any:
            inputs.append(name)
            return fn.external_source(name=f"{name}{number}")

        brightness, contrast, saturation, hue = (
            view.jitter_p > 0 and strength > 0 for strength in view.jitter
        )
        cubic = view.interpolation == "bicubic"
        x = fn.slice(images, start=argument("start"), shape=argument("shape"), axes=[0, 1])
        if view.equalize > 0:
            x = x ^ ((x ^ fn.experimental.equalize(x)) * self._on_device(argument("equalize")))
        x = fn.resize(
            x,
            size=list(view.shape),
            interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
            antialias=True,
        )
        if view.vertical_flip > 0:
            x = fn.flip(x, horizontal=0, vertical=argument("vertical_flip"))
        if view.rotate > 0:
            x = fn.rotate(x, angle=argument("angle"), keep_size=True, fill_value=0)
        if contrast:
            gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
            x = fn.brightness_contrast(
                x,
                brightness=argument("brightness"),
                contrast=argument("contrast"),
                contrast_center=fn.reductions.mean(gray).cpu(),
            )
        elif brightness:
            x = fn.brightness_contrast(x, brightness=argument("brightness"))
        if saturation or hue or view.gray > 0:
            x = fn.hsv(x, hue=argument("hue"), saturation=argument("saturation"))
        if view.blur > 0:
            x = fn.gaussian_blur(x, sigma=argument("sigma"), window_size=argument("window"))
        if view.solarize > 0:
            threshold = self._on_device(argument("threshold"))
            x = x ^ ((x >= threshold) * types.Constant(255).uint8())  # 255 - x
        x = fn.crop_mirror_normalize(
            x,
            mirror=argument("flip"),
            mean=[255 * mean for mean in view.mean],
            std=[255 * std for std in view.std],
            output_layout="HWC" if view.channels_last else "CHW",
        )
        if view.erase > 0:
            x = fn.erase(x, anchor=argument("erase_start"), shape=argument("erase_shape"))
        return x

    def _on_device(self, argument: Any) -> Any:
        """An argument as an operand of the pixels."""
        return argument.gpu() if self._device.type == "cuda" else argument


def _fixed_order(params: Params) -> Params:
    """`params` with the jitter steps in the order of the DALI operators."""
    jittered = params["step0"] >= 0
    order = {step: torch.where(jittered, i, -1) for i, step in enumerate(JITTER_STEPS)}
    return params.replace(**order)


def _arguments(view: View, params: Params) -> dict[str, Tensor]:
    """The arguments of the operators of `view`, each (N,) or (N, 2)."""
    jittered = params["step0"] >= 0

    def jitter(name: str, neutral: float) -> Tensor:
        return torch.where(jittered, params[name], neutral)

    def pair(first: str, second: str) -> Tensor:
        return torch.stack([params[first], params[second]], dim=1)

    sigma = params["sigma"]
    reach = torch.ceil(BLUR_REACH * sigma)[:, None]
    radius = torch.minimum(reach, torch.tensor(view.shape) - 1)  # (N, 2)
    return {
        "start": pair("top", "left").int(),
        "shape": pair("height", "width").int(),
        "equalize": params["equalize"].to(torch.uint8),
        "vertical_flip": params["vertical_flip"].int(),
        # the horizontal flip comes after the rotation here, and turns it round
        "angle": torch.where(params["flip"] > 0, -params["angle"], params["angle"]),
        "flip": params["flip"].int(),
        "brightness": jitter("brightness", 1.0),
        "contrast": jitter("contrast", 1.0),
        "hue": 360 * jitter("hue", 0.0),  # degrees
        "saturation": torch.where(params["gray"] > 0, 0.0, jitter("saturation", 1.0)),
        "sigma": torch.where(sigma > 0, sigma, 1.0),
        "window": (2 * radius + 1).int(),  # (N, 2), 1 where there is no blur: the pixel itself
        "threshold": 255 * params["solarize"],  # above every byte where there is no solarizing
        "erase_start": pair("erase_top", "erase_left"),
        "erase_shape": pair("erase_height", "erase_width"),
    }
