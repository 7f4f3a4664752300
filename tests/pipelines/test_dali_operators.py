"""The views that DALI's operators render, compared with fastssl's: the same parameters, nearly the
same pixels."""

import io
import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastssl_pipelines import Pipeline, View, open_pipeline, policies
from fastssl_pipelines.augment import Images, Params, as_images, draw, render
from fastssl_pipelines.engines.dali_operators import SUPPORTED_FIELDS, DaliRender, require_supported
from fastssl_pipelines.sources.decoding import decode
from tests.helpers.requires import needs

pytestmark = needs("nvidia.dali")

COUNT, BATCH = 24, 7
VIEWS = (*policies.simclr(2, 24), View(size=17, erase=0.5, solarize=0.5))
PLAIN = View(size=64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def files(data: Path) -> list[Path]:
    """Real JPEGs, RGB and gray, the smaller ones."""
    found = sorted((data / "imagenet-samples").iterdir(), key=lambda f: f.stat().st_size)
    return found[:COUNT]


@pytest.fixture(scope="module")
def images(files: list[Path]) -> Images:
    return as_images([decode(np.fromfile(file, np.uint8)) for file in files])


def opened(source: Any, **changes: Any) -> Pipeline:
    given = {"views": VIEWS, "batch_size": BATCH, "seed": 3, "device": "cpu", **changes}
    return open_pipeline("dali", source, render="dali", **given)


def both(images: Images, views: list[View]) -> list[tuple[Tensor, Tensor]]:
    """(DALI's, fastssl's) renders of each view in levels of 255, all drawn as view 0, in DALI's
    order of jitter."""
    index, (_, height, width) = torch.arange(images.count), images.layout.unbind(1)
    engine = DaliRender(
        views, "exact", batch_size=images.count, threads=1, device=torch.device("cpu")
    )
    params = [in_order(draw(view, 0, 1, index, 0, height, width)) for view in views]
    ours = [render(images, drawn, view) for view, drawn in zip(views, params, strict=True)]
    return [(255 * a, 255 * b) for a, b in zip(engine.render(images, params), ours, strict=True)]


def in_order(params: Params) -> Params:
    jittered = params["step0"] >= 0
    return params.replace(**{f"step{i}": torch.where(jittered, i, -1) for i in range(4)})


def test_the_stream_depends_on_seed_epoch_and_index_alone(files: list[Path]) -> None:
    whole = list(opened(files).epoch(1))
    assert [tuple(view.shape) for view in whole[0].views] == [
        (BATCH, 3, s, s) for s in (24, 24, 17)
    ]
    for skip in (0, 2):
        rest = list(opened(files).epoch(1, skip=skip))
        assert len(rest) == len(whole) - skip
        for a, b in zip(whole[skip:], rest, strict=True):
            assert torch.equal(a.index, b.index)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    known = {
        i: view
        for batch in whole
        for i, view in zip(batch.index.tolist(), batch.views[0], strict=True)
    }
    for batch in opened(files, batch_size=5).epoch(1):  # other batches, the same views
        for i, view in zip(batch.index.tolist(), batch.views[0], strict=True):
            assert i not in known or torch.equal(view, known[i])
    other = next(opened(files, seed=4, batch_size=COUNT).epoch(1))
    seen = zip(other.index.tolist(), other.views[0], strict=True)
    shared = {i: view for i, view in seen if i in known}
    assert shared
    assert not any(torch.equal(view, known[i]) for i, view in shared.items())


def test_params_describe_the_views(files: list[Path]) -> None:
    """Each engine's own draws, but for the order of jitter, which is DALI's."""
    ours = next(opened(files, keep_params=True).epoch(1))
    theirs = next(
        open_pipeline(
            "dali", files, views=VIEWS, batch_size=BATCH, seed=3, device="cpu", keep_params=True
        ).epoch(1)
    )
    for a, b in zip(ours.params, theirs.params, strict=True):
        assert torch.equal(a.table, in_order(b).table)


def test_without_colour_the_pixels_are_fastssl_s(images: Images) -> None:
    """Within the rounding to bytes after each operator, and DALI's own antialiasing where a crop
    shrinks: measured on 96 photos at 32 px, mean 0.29 levels, 0.1 % of values 6 levels or more."""
    views = [
        PLAIN,
        replace(PLAIN, interpolation="bicubic"),
        replace(PLAIN, size=17, patch=32),
        replace(PLAIN, size=96, scale=(0.05, 0.1), interpolation="bicubic"),
        replace(PLAIN, erase=1.0),
    ]
    for ours, theirs in both(images, views):
        apart = (ours - theirs).abs()
        assert apart.mean() < 0.6
        assert (apart > 8).float().mean() < 0.005 and (ours - theirs).mean().abs() < 0.1


def test_turned_and_oblong_views_are_fastssl_s(images: Images) -> None:
    oblong = replace(PLAIN, size=(40, 70), vertical_flip=0.5)
    turned = replace(oblong, rotate=0.7, rotate_degrees=(-90.0, 60.0))
    for view, mean, far in ((oblong, 0.6, 0.005), (turned, 1.0, 0.02)):
        ((ours, theirs),) = both(images, [view])
        apart = (ours - theirs).abs()
        assert ours.shape[2:] == view.shape
        assert apart.mean() < mean and (apart > 8).float().mean() < far


def by_opencv(pixels: Tensor) -> Tensor:
    """(H, W, 3) with each channel equalized as cv2.equalizeHist does."""
    equalized = torch.empty_like(pixels)
    for c in range(3):
        channel = pixels[..., c].long()
        total = channel.flatten().bincount(minlength=256).cumsum(0)
        lowest = total[channel.min()]
        levels = (total - lowest).double() / (total[-1] - lowest).clamp(min=1) * 255
        equalized[..., c] = levels.round().clamp(0, 255).to(torch.uint8)[channel]
    return equalized


def test_equalize_is_opencv_s(images: Images) -> None:
    view = replace(PLAIN, equalize=0.5)
    _, height, width = images.layout.unbind(1)
    index = torch.arange(images.count)
    drawn = draw(view, 0, 1, index, 0, height, width)
    drawn = drawn.replace(top=0, left=0, height=height, width=width)
    applies = (drawn["equalize"] > 0).tolist()
    assert 0 < sum(applies) < len(applies)
    pixels = [images.pixels(i) for i in index]
    pixels = [by_opencv(p) if yes else p for p, yes in zip(pixels, applies, strict=True)]
    expected = 255 * render(as_images(pixels), drawn.replace(equalize=0.0), PLAIN)
    engine = DaliRender([view], "exact", batch_size=24, threads=1, device=torch.device("cpu"))
    apart = (255 * engine.render(images, [drawn])[0] - expected).abs()
    assert apart.mean() < 0.6 and (apart > 8).float().mean() < 0.005


def test_blur_and_solarize_are_fastssl_s(images: Images) -> None:
    blurred, strongly, solarized = both(
        images,
        [
            replace(PLAIN, blur=0.5),
            replace(PLAIN, size=17, blur=1.0, blur_sigma=(3.0, 8.0)),
            replace(PLAIN, solarize=0.5, solarize_threshold=0.3),
        ],
    )
    for ours, theirs in (blurred, strongly):
        assert (ours - theirs).abs().mean() < 0.5
        assert ((ours - theirs).abs() > 8).float().mean() < 0.005
    apart = (solarized[0] - solarized[1]).abs()
    assert apart.mean() < 0.5
    assert (apart > 1.5).float().mean() < 0.005  # values that rounding puts across the threshold


@pytest.mark.parametrize(
    ("strengths", "mean", "channel"),
    [
        ((0.4, 0.0, 0.0, 0.0), 0.5, 0.5),
        ((0.4, 0.4, 0.0, 0.0), 1.0, 1.0),
        ((0.4, 0.4, 0.4, 0.0), 1.0, 1.0),
        ((0.4, 0.4, 0.2, 0.1), 4.0, 2.0),
    ],
)
def test_colour_is_near(
    images: Images, strengths: tuple[float, float, float, float], mean: float, channel: float
) -> None:
    """In levels of 255: the mean difference, and that of each channel's mean and deviation."""
    view = replace(PLAIN, jitter=strengths, jitter_p=0.8, gray=0.2)
    ((ours, theirs),) = both(images, [view])
    assert (ours - theirs).abs().mean() < mean
    for statistic in (torch.mean, torch.std):
        assert (statistic(ours, (0, 2, 3)) - statistic(theirs, (0, 2, 3))).abs().max() < channel


def test_hue_turns_the_right_way() -> None:
    red = as_images(torch.tensor([200, 40, 40], dtype=torch.uint8).expand(3, 8, 8, 3).contiguous())
    view = replace(PLAIN, size=4, jitter=(0.0, 0.0, 0.0, 0.5), jitter_p=1.0)
    drawn = in_order(draw(view, 0, 0, torch.arange(3), 0, 8, 8))
    drawn = drawn.replace(hue=torch.tensor([1 / 3, -1 / 3, 0.0]))
    engine = DaliRender([view], "exact", batch_size=3, threads=1, device=torch.device("cpu"))
    (turned,) = engine.render(red, [drawn])
    assert turned.mean((2, 3)).argmax(1).tolist() == [1, 2, 0]  # green, blue, red


def test_dtype_and_layout(images: Images) -> None:
    half = replace(PLAIN, dtype=torch.bfloat16, channels_last=True)
    ((ours, theirs),) = both(images, [half])
    assert ours.dtype == torch.bfloat16 and ours.stride() == theirs.stride()
    assert (ours.float() - theirs.float()).abs().mean() < 0.5


def test_an_image_is_decoded_once(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastssl_pipelines.engines import dali

    counts: list[int] = []
    schedule = dali._Dali.schedule

    def counted(self: Any, encoded: list[Any]) -> list[Any]:
        counts.append(len(encoded))
        return schedule(self, encoded)

    monkeypatch.setattr(dali._Dali, "schedule", counted)
    for views in (policies.simclr(2, 16), policies.simclr(9, 16)):
        counts.clear()
        list(opened(files, views=views, scaled=False).epoch(0))
        assert sum(counts) == BATCH * (COUNT // BATCH)


def test_unreadable_images_and_other_formats(files: list[Path], images: Images) -> None:
    """A PNG goes by Pillow and is rendered alike; rubbish shortens its batch."""
    png = io.BytesIO()
    Image.fromarray(images.pixels(0).numpy()).save(png, "PNG")
    source = [png.getvalue(), b"rubbish", *(file.read_bytes() for file in files[:3])]
    given: dict[str, Any] = {"batch_size": 5, "quota": 1.0, "scaled": False}
    (batch,) = opened(source, **given).epoch(0)
    assert sorted(batch.index.tolist()) == [0, 2, 3, 4]
    jpeg = opened([files[0].read_bytes(), *source[1:]], **given)
    (same,) = jpeg.epoch(0)
    assert torch.equal(batch.views[0], same.views[0])


def test_an_epoch_has_the_views_it_is_given(files: list[Path]) -> None:
    pipeline, small = opened(files), (View(size=9),)
    next(pipeline.epoch(0))  # left early
    (view,) = next(pipeline.epoch(0, views=small)).views
    assert view.shape == (BATCH, 3, 9, 9)
    assert torch.equal(view, next(opened(files, views=small).epoch(0)).views[0])
    again, expected = next(pipeline.epoch(0)), next(opened(files).epoch(0))
    assert all(torch.equal(a, b) for a, b in zip(again.views, expected.views, strict=True))


@dataclass(frozen=True, kw_only=True)
class Posterized(View):
    posterize: int = 8


def test_what_dali_cannot_do_is_refused(files: list[Path]) -> None:
    with pytest.raises(ValueError, match="render is 'nvidia': choose 'fastssl' or 'dali'"):
        open_pipeline(
            "dali", files, views=VIEWS, batch_size=2, seed=0, device="cpu", render="nvidia"
        )
    with pytest.raises(ValueError, match="quality is 'affine': render='dali' has colour"):
        opened(files, quality="affine")
    with pytest.raises(ValueError, match=r"View\.posterize is 4: render='dali' has no operator"):
        opened(files, views=(Posterized(size=8, posterize=4),))
    require_supported([Posterized(size=8)], "exact")  # nothing to do, nothing to refuse


def test_every_field_is_supported_or_refused() -> None:
    """A new field is refused until `dali_operators.py` has an operator for it."""
    assert {field.name for field in fields(View)} >= SUPPORTED_FIELDS


def test_the_approximations_are_logged_once(
    files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastssl_pipelines"):
        list(opened(files).epoch(0))
    told = [record for record in caplog.records if "hue is a rotation in YIQ" in record.message]
    assert len(told) == 1 and told[0].levelno == logging.WARNING
