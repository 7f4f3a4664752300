"""Pixels: the reference against torchvision and Pillow, the fast back ends against the
reference."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from fastssl_pipelines.augment import Images, Params, as_images, cuda, reference, sample_params
from fastssl_pipelines.augment.color_matrix import _constants, color_maps
from fastssl_pipelines.spec import View
from tests.helpers.offline_compile import Kernel, assert_ships, compile_offline

LEVEL = 1 / 255
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
EVERYTHING = View(
    size=32,
    jitter=(0.4, 0.4, 0.4, 0.2),
    jitter_p=0.8,
    gray=0.2,
    blur=0.5,
    solarize=0.3,
    erase=0.3,
    **PLAIN,
)
TURNED = replace(EVERYTHING, vertical_flip=0.5, rotate=0.7, rotate_degrees=(-180.0, 90.0))
EQUALIZED = replace(TURNED, equalize=0.5)
BACK_ENDS = {"reference": reference, "cuda": cuda}
if find_spec("numba"):
    BACK_ENDS["cpu"] = import_module("fastssl_pipelines.augment.cpu")
FAST = [name for name in BACK_ENDS if name != "reference"]


@pytest.fixture(scope="module")
def photos(data: Path) -> list[Tensor]:
    """Real photographs of odd sizes, (H, W, 3) uint8, at most 200 px a side."""
    files = sorted((data / "imagenet-samples").glob("*.JPEG"))[::25]
    images = [Image.open(f).convert("RGB") for f in files]
    for image in images:
        image.thumbnail((200, 200))
    return [torch.from_numpy(np.array(image)) for image in images]


@pytest.fixture(scope="module")
def small(photos: list[Tensor]) -> Images:
    """24 real 32 x 32 images."""
    crops = [p[i : i + 32, j : j + 32] for p in photos for i in (10, 40, 70) for j in (5, 60)]
    return as_images(torch.stack([c for c in crops if c.shape == (32, 32, 3)][:24]))


def table_of(images: Images, view: View, seed: int = 0, number: int = 0) -> Tensor:
    index = torch.arange(images.count, device=images.layout.device)
    return reference.draw((view,), seed, 2, index, images.layout, number)


def where_it_runs(back_end: str) -> str:
    return "cuda" if back_end == "cuda" and torch.cuda.is_available() else "cpu"


def show(
    images: Images, table: Tensor, view: View, back_end: str = "reference", quality: str = "exact"
) -> Tensor:
    """(N, 3, S, S) on the CPU in fp32, by one back end."""
    device = where_it_runs(back_end)
    engine = BACK_ENDS[back_end]
    return engine.render(images.to(device), table.to(device), view, quality)[0].float().cpu()


def torchvision_view(image: Tensor, row: Params, view: View) -> Tensor:
    """One sample by torchvision's float functionals with the given parameters. -> (3, S, S)"""
    p = {name: float(row[name]) for name in sample_params.COLUMNS}
    box = (int(p[k]) for k in ("top", "left", "height", "width"))
    crop = tv.crop(image.permute(2, 0, 1), *box)
    x = (tv.equalize(crop) if p["equalize"] else crop).float() / 255
    mode = v2.InterpolationMode(view.interpolation)
    x = tv.resize(x, list(view.shape), mode, antialias=True).clamp(0, 1)
    x = tv.horizontal_flip(x) if p["flip"] else x
    x = tv.vertical_flip(x) if p["vertical_flip"] else x
    x = tv.rotate(x, p["angle"], v2.InterpolationMode.BILINEAR) if p["angle"] else x
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: tv.adjust_brightness(x, p["brightness"]),
        lambda x: tv.adjust_contrast(x, p["contrast"]),
        lambda x: tv.adjust_saturation(x, p["saturation"]),
        lambda x: tv.adjust_hue(x, p["hue"]),
    ]
    for slot in range(4):
        step = int(p[f"step{slot}"])
        x = steps[step](x) if step >= 0 else x
    x = tv.rgb_to_grayscale(x, 3) if p["gray"] else x
    if p["sigma"] > 0:
        wide = 2 * int(np.ceil(6 * p["sigma"])) + 1
        kernel = [min(wide, 2 * side - 1) for side in view.shape[::-1]]  # (x, y)
        x = tv.gaussian_blur(x, kernel, [p["sigma"], p["sigma"]])
    x = tv.solarize(x, p["solarize"]) if p["solarize"] <= 1 else x
    x = tv.normalize(x, list(view.mean), list(view.std))
    top, left, height, width = (int(p[f"erase_{k}"]) for k in ("top", "left", "height", "width"))
    return tv.erase(x, top, left, height, width, torch.zeros(3, 1, 1)) if height else x


def by_torchvision(images: Images, table: Tensor, view: View) -> Tensor:
    rows = [Params(row[None]) for row in table[0]]
    pairs = zip((images.pixels(i) for i in range(images.count)), rows, strict=True)
    return torch.stack([torchvision_view(image, row, view) for image, row in pairs])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 75])
def test_reference_is_torchvision_without_hue(photos, interpolation, size):
    view = replace(
        EVERYTHING, size=size, interpolation=interpolation, jitter=(0.4, 0.4, 0.4, 0.0), blur=0.0
    )
    images = as_images(photos)
    table = table_of(images, view)
    off = (show(images, table, view) - by_torchvision(images, table, view)).abs()
    assert off.mean() <= 0.25 * LEVEL and off.max() <= LEVEL


@pytest.mark.parametrize("size", [32, (40, 17), (9, 70)])
def test_reference_is_torchvision_turned_equalized_and_not_square(photos, size):
    view = replace(EQUALIZED, size=size, jitter=(0.4, 0.4, 0.4, 0.0), solarize=0.0, blur=0.3)
    images = as_images(photos)
    table = table_of(images, view)
    used = table[0, :, [sample_params.VERTICAL_FLIP, sample_params.ANGLE, sample_params.EQUALIZE]]
    assert (used != 0).any(0).all() and not (used != 0).all(0).any()
    off = (show(images, table, view) - by_torchvision(images, table, view)).abs()
    assert off.mean() <= 0.25 * LEVEL and off.max() <= LEVEL


@pytest.mark.parametrize("angle", [90.0, -90.0, 180.0, 33.3])
def test_rotation_alone_is_torchvisions(small, angle):
    """Counter-clockwise; a quarter turn moves every pixel to another."""
    view = View(size=32, scale=(1.0, 1.0), flip=0.0, **PLAIN)
    table = table_of(small, view)
    table[..., sample_params.ANGLE] = angle
    for back_end in ("reference", *(["cpu"] if "cpu" in BACK_ENDS else [])):
        shown = show(small, table, view, back_end)
        off = (shown - by_torchvision(small, table, view)).abs()
        assert off.max() <= 0.1 * LEVEL
    if angle == 90:
        table[..., sample_params.ANGLE] = 0.0
        assert (shown - show(small, table, view).rot90(1, (2, 3))).abs().max() <= 0.1 * LEVEL


def test_reference_is_torchvision_with_hue(small):
    view = replace(EVERYTHING, jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=1.0, blur=0.0, solarize=0.0)
    offs = []
    for seed in range(4):
        table = table_of(small, view, seed)
        offs.append((show(small, table, view) - by_torchvision(small, table, view)).abs())
    off = torch.stack(offs).flatten()
    assert off.mean() <= 0.25 * LEVEL
    assert (off > LEVEL).float().mean() <= 0.001  # next to a discontinuity of the hue


def resized_by_pillow(crop: Tensor, size: int, view: View, mode: str) -> Tensor:
    """(H, W, 3) -> (3, S, S), levels. Mode "F" resizes each channel in floats, "L" in bytes."""
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    dtype = np.float32 if mode == "F" else np.uint8
    planes = [Image.fromarray(plane.numpy().astype(dtype)) for plane in crop.unbind(2)]
    resized = [plane.resize((size, size), how[view.interpolation]) for plane in planes]
    return torch.stack([torch.from_numpy(np.array(p, np.float32)) for p in resized]).clamp(0, 255)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [20, 64, 130])
def test_resize_is_pillows(photos, interpolation, size):
    """Resize alone, within one level of Pillow.

    In bytes, Pillow also clips to 0..255 between the two axes; where bicubic overshoots a sharp
    edge that is worth up to 6 levels on 0.02 % of these pixels. Its float mode, which does not, is
    met.
    """
    view = View(size=size, interpolation=interpolation, flip=0.0, **PLAIN)
    images = as_images(photos)
    table = table_of(images, view)
    off = []
    for i, (top, left, height, width) in enumerate(table[0, :, :4].int().tolist()):
        crop = images.pixels(i)[top : top + height, left : left + width]
        ours = show(as_images([images.pixels(i)]), table[:, i : i + 1], view)[0] * 255
        assert (ours - resized_by_pillow(crop, size, view, "F")).abs().max() <= 0.01
        off.append((ours.round() - resized_by_pillow(crop, size, view, "L")).abs().flatten())
    beyond = (torch.cat(off) > 1).float().mean()
    assert beyond == 0 if interpolation == "bilinear" else beyond <= 0.0005


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions(small, sigma):
    view = replace(EVERYTHING, jitter_p=0.0, gray=0.0, solarize=0.0, erase=0.0)
    table = table_of(small, view)
    table[..., sample_params.SIGMA] = sigma
    error = (show(small, table, view) - by_torchvision(small, table, view)).square().mean()
    assert -10 * torch.log10(error) >= 45  # dB


def test_blur_wider_than_the_view_is_a_blur():
    """A radius beyond the border is cut there: the reflection has no more pixels to give."""
    images = as_images(torch.randint(0, 256, (4, 9, 9, 3), dtype=torch.uint8))
    view = replace(EVERYTHING, size=4, jitter_p=0.0, gray=0.0, solarize=0.0, erase=0.0)
    table = table_of(images, view)
    table[..., sample_params.SIGMA] = 50.0
    flat = show(images, table, view)
    table[..., sample_params.SIGMA] = 0.0
    assert flat.std((2, 3)).max() < 0.25 * show(images, table, view).std((2, 3)).max()
    for back_end in BACK_ENDS:
        table[..., sample_params.SIGMA] = 50.0
        assert (show(images, table, view, back_end) - flat).abs().max() <= LEVEL


CONFIGS = {
    "32": {},
    "bicubic 28, channels last": {"size": 28, "interpolation": "bicubic", "channels_last": True},
    "16": {"size": 16},
    "64": {"size": 64},
    "1": {"size": 1},
    "bicubic 71": {"size": 71, "interpolation": "bicubic"},  # tiles, the last ones partly outside
    "20 x 31": {"size": (20, 31)},
    "34 x 9, channels last": {"size": (34, 9), "channels_last": True},
    "half 130": {"size": 130, "dtype": torch.float16, "channels_last": True},
}


@pytest.mark.parametrize("quality", ["exact", "affine"])
@pytest.mark.parametrize("back_end", FAST)
@pytest.mark.parametrize("config", CONFIGS)
def test_back_ends_are_the_reference(photos, small, config, back_end, quality):
    assert_is_the_reference(
        photos, small, replace(EVERYTHING, **CONFIGS[config]), back_end, quality
    )


@pytest.mark.parametrize("back_end", FAST)
@pytest.mark.parametrize(
    "config", ["bicubic 28, channels last", "20 x 31", "34 x 9, channels last"]
)
@pytest.mark.parametrize("view", [TURNED, EQUALIZED], ids=["turned", "equalized"])
def test_turned_and_equalized_views_are_the_reference(photos, small, config, back_end, view):
    view = replace(view, **CONFIGS[config], solarize=0.0)
    quality = "affine" if config == "20 x 31" else "exact"
    small = small.select(torch.arange(4))
    steps = [sample_params.VERTICAL_FLIP, sample_params.ANGLE]
    steps += [sample_params.EQUALIZE] if view.equalize else []
    assert table_of(small, view, seed=3)[0][:, steps].any(0).all()
    assert_is_the_reference(photos, small, view, back_end, quality)


def assert_is_the_reference(photos, small, view: View, back_end: str, quality: str) -> None:
    if max(view.shape) > 64 or view.shape == (16, 16):
        images = as_images(photos[2:3] if back_end == "cuda" else photos)
    else:
        images = small.select(torch.arange(min(8, small.count))) if back_end == "cuda" else small
    table = table_of(images, view, seed=3)
    truth, got = (show(images, table, view, b, quality) for b in ("reference", back_end))
    assert got.isfinite().all()
    assert (got - truth).abs().max() <= LEVEL + torch.finfo(view.dtype).eps
    assert (got - truth).abs().mean() <= 0.25 * LEVEL


@pytest.mark.skipif("cpu" not in BACK_ENDS, reason="no numba")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 3, 17, 33, 97])
def test_views_of_images_of_any_size_at_the_end_of_the_memory(size, interpolation):
    """Crops of 1, 2, 3, ... px, the last of them where the memory ends, enlarged and reduced."""
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (3, 2), (17, 5), (2, 97), (33, 33), (5, 2), (2, 2)]
    images = as_images([rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes])
    view = replace(EVERYTHING, size=size, interpolation=interpolation, blur=0.2)
    table = torch.cat([table_of(images, view, seed) for seed in range(20)])
    truth, got = (BACK_ENDS[b].render(images, table, view, "exact") for b in ("reference", "cpu"))
    near_a_jump = 0.001 if size > 3 else 0.01  # of the hue, and of solarizing
    assert ((got - truth).abs() > LEVEL).float().mean() <= near_a_jump


@pytest.mark.skipif("cpu" not in BACK_ENDS, reason="no numba")
def test_a_view_does_not_depend_on_threads_or_on_who_else_renders(small):
    """300 views of 96 px: many turns of few views; alone, two calls at once, one thread."""
    view = replace(EVERYTHING, size=96)
    table = torch.cat([table_of(small, view, seed) for seed in range(12)])
    threads = torch.get_num_threads()

    def render() -> Tensor:
        return BACK_ENDS["cpu"].render(small, table, view, "exact")

    try:
        torch.set_num_threads(1)
        alone = render().clone()
        torch.set_num_threads(3)
        with ThreadPoolExecutor(2) as pool:
            at_once = [call.result() for call in [pool.submit(render) for _ in range(2)]]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(alone, other) for other in (*at_once, render()))


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_dtype_and_layout_of_the_output(small, back_end):
    device = where_it_runs(back_end)
    few = small.select(torch.arange(2)).to(device)
    layouts = {torch.float32: torch.contiguous_format, torch.float16: torch.channels_last}
    for dtype, layout in layouts.items():
        last = layout == torch.channels_last
        view = replace(EVERYTHING, size=8, dtype=dtype, channels_last=last)
        table = table_of(few, view).to(device)
        out = BACK_ENDS[back_end].render(few, torch.cat([table, table]), view, "exact")
        assert out.shape == (2, 2, 3, 8, 8) and out.dtype == dtype
        assert out[1].is_contiguous(memory_format=layout)
        assert torch.equal(out[0], out[1])


# One change per field that must show, and what to look at beside it.
CHANGES = {
    "size": 24,
    "scale": (0.5, 0.6),
    "ratio": (2.0, 3.0),
    "patch": 6,
    "interpolation": "bicubic",
    "flip": 1.0,
    "vertical_flip": 1.0,
    "rotate": 1.0,
    "rotate_degrees": (40.0, 50.0),
    "equalize": 1.0,
    "jitter": (0.1, 0.1, 0.1, 0.5),
    "jitter_p": 1.0,
    "gray": 1.0,
    "blur": 1.0,
    "blur_sigma": (3.0, 4.0),
    "solarize": 0.0,
    "solarize_threshold": 0.2,
    "erase": 1.0,
    "erase_scale": (0.5, 0.6),
    "erase_ratio": (3.0, 4.0),
    "mean": (0.1, 0.2, 0.3),
    "std": (0.3, 0.4, 0.5),
    "dtype": torch.float16,
    "channels_last": True,
}


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("field", [field.name for field in fields(View)])
def test_every_back_end_supports_every_field(small, field, back_end):
    """A new field without a line in CHANGES fails here, as does a back end that ignores a field."""
    index = torch.arange(2, device=where_it_runs(back_end))
    few = small.to(where_it_runs(back_end)).select(index)
    rotate = 1.0 if field == "rotate_degrees" else 0.0
    view = replace(EVERYTHING, size=20, solarize=1.0, rotate=rotate)
    changed = replace(view, **{field: CHANGES[field]})
    engine = BACK_ENDS[back_end]
    before, after = (
        engine.render(few, engine.draw((v,), 0, 2, index, few.layout, 0), v, "exact")[0]
        for v in (view, changed)
    )
    traits = [(x.shape, x.dtype, x.stride()) for x in (before, after)]
    if traits[0] == traits[1]:
        assert (before - after).abs().max() > LEVEL
    else:
        assert field in ("size", "dtype", "channels_last")


def test_a_constant_image_stays_constant():
    """Weights sum to one whatever the crop: no dark borders, no drift."""
    images = as_images(
        [torch.full((h, w, 3), 200, dtype=torch.uint8) for h, w in [(37, 90), (90, 37)]]
    )
    for size in (16, 70):
        view = replace(EVERYTHING, size=size, jitter_p=0.0, blur=1.0, solarize=0.0, erase=0.0)
        table = table_of(images, view)
        for back_end in BACK_ENDS:
            off = show(images, table, view, back_end) - 200 / 255
            gray_loss = 1e-4  # luma weights sum to 0.9999
            assert off.abs().max() <= gray_loss + 0.1 * LEVEL


def test_affine_is_close_to_exact_for_gentle_jitter(small):
    view = replace(EVERYTHING, jitter=(0.1, 0.0, 0.1, 0.03), jitter_p=1.0, blur=0.0, solarize=0.0)
    table = table_of(small, view)
    still = table.clone()
    still[..., sample_params.STEP0 : sample_params.STEP3 + 1] = -1
    exact, affine, none = (
        show(small, table, view),
        show(small, table, view, quality="affine"),
        show(small, still, view),
    )
    assert (exact - affine).abs().mean() < 0.35 * (exact - none).abs().mean()


def test_affine_map_turns_hue_the_right_way():
    table = torch.zeros(1, len(sample_params.COLUMNS))
    table[:, sample_params.STEP0 : sample_params.STEP3 + 1] = torch.tensor([3.0, -1, -1, -1])
    table[:, sample_params.HUE] = 1 / 3
    red = color_maps(table).view(3, 4)[:, 0]
    assert red.argmax() == 1  # a third of a turn takes red to green


def test_contrast_uses_this_views_own_mean(small):
    """A fault that takes the batch's mean, or the image's, would pass for one image only."""
    view = replace(EVERYTHING, jitter_p=0.0, gray=0.0, blur=0.0, solarize=0.0, erase=0.0)
    table = table_of(small, view)
    table[..., sample_params.STEP0] = 1
    table[..., sample_params.CONTRAST] = 0.0
    for back_end in BACK_ENDS:
        flat = show(small, table, view, back_end)
        assert flat.std((1, 2, 3)).max() < LEVEL
        assert flat.mean((1, 2, 3)).std() > 10 * LEVEL


MODULE = "fastssl_pipelines.augment.cuda.kernels"


@pytest.mark.parametrize("quality", ["exact", "affine"])
def test_reference_stays_on_the_device_of_its_images(quality):
    """Without a GPU: tensors that have a device and no numbers refuse to meet another's."""
    _constants.cache_clear()
    with FakeTensorMode():
        images = torch.zeros(2, 20, 24, 3, dtype=torch.uint8, device="cuda")
        rows = torch.zeros(2, len(sample_params.COLUMNS), device="cuda")
        out = reference._render(images, rows, EVERYTHING, quality, True, True)
    _constants.cache_clear()
    assert out.device.type == "cuda" and out.shape == (2, 3, 32, 32)


def test_one_source_for_all_compilers():
    """Every back end compiles the formulas of one source, so a fault shows in all of them."""
    shared = reference.pixel_ops.shift_hue.__code__
    assert import_module(MODULE)._f.shift_hue.fn.__code__ is shared
    if "cpu" in BACK_ENDS:
        assert (
            import_module(
                "fastssl_pipelines.augment.cpu.numba_ops"
            ).of_pixels.shift_hue.py_func.__code__
            is shared
        )


@pytest.mark.parametrize("back_end", FAST)
def test_three_compilers_sample_the_same_bits(back_end):
    rng = np.random.default_rng(0)
    index = torch.tensor(rng.integers(0, 2**40, 300))
    sizes = torch.tensor(rng.integers(2, 3000, (300, 2)))
    layout = torch.cat([torch.zeros(300, 1, dtype=torch.int64), sizes], 1)
    stretched = replace(EVERYTHING, scale=(0.5, 1.0), ratio=(1.0, 3.0), size=96)
    oblong = replace(EQUALIZED, size=(30, 90), erase=1.0)
    key = ((EVERYTHING, stretched, replace(EVERYTHING, patch=2), oblong), 2**32 - 1, 12345)
    device = where_it_runs(back_end)
    got = BACK_ENDS[back_end].draw(*key, index.to(device), layout.to(device), 4)
    assert torch.equal(got.cpu(), reference.draw(*key, index, layout, 4))


POINTERS = {
    "flat_ptr": "*u8",
    "layout_ptr": "*i64",
    "table_ptr": "*fp32",
    "color_ptr": "*fp32",
    "numbers_ptr": "*fp64",
    "lut_ptr": "*u8",
    "planes_ptr": "*fp32",
    "turn_ptr": "*fp32",
    "out_ptr": "*bf16",
}
COLUMNS = len(sample_params.COLUMNS)


def render_kernels(cc: int) -> list[Kernel]:
    """Every tile configuration that `augment.cuda` launches, and the steps that views may have."""
    counts, no_steps = {"N": "i32", "G": "i32"}, {"EQUALIZED": False, "ROTATED": False}
    large = {"COLUMNS": COLUMNS, "B": cuda.TILE, "W": cuda.WINDOW, "HEIGHT": 224, "WIDTH": 224}
    sides = [
        (
            large | {"B": side, "W": window, "HEIGHT": side, "WIDTH": side},
            warps,
            "_whole_kernel",
            {},
        )
        for side, (window, warps) in cuda.WHOLE_TILES.items()
    ]
    sides.append((large, cuda.WARPS, "_tiled_kernel", {"bytes_ptr": "*u8"}))
    blurred = {name: POINTERS[name] for name in ("table_ptr", "numbers_ptr", "out_ptr")}
    blurred |= {"bytes_ptr": "*u8"}
    kernels = []

    def add(name: str, types: dict[str, str], constants: dict[str, object], warps: int) -> None:
        kernels.append(Kernel(f"{MODULE}:{name}", types, constants, cc, warps, 1))

    for cubic in (False, True):
        for tile, warps, name, more in sides:
            how = tile | {"CUBIC": cubic}
            for affine in (False, True):
                add(name, POINTERS | more | counts, how | no_steps | _ways(affine), warps)
            for steps in (
                {"EQUALIZED": True, "ROTATED": False},
                {"EQUALIZED": True, "ROTATED": True},
            ):
                add(name, POINTERS | more | counts, how | steps | _ways(False), warps)
            unused = ("color_ptr", "numbers_ptr", "turn_ptr", "out_ptr")
            types = {name: kind for name, kind in POINTERS.items() if name not in unused} | counts
            more_warps = max(warps, cuda.PLANES_WARPS)
            add("_resample_kernel", types, how | {"EQUALIZED": True}, more_warps)
    add("_blur_kernel", blurred, large | {"LAST": True}, cuda.WARPS)
    return kernels


def _ways(affine: bool) -> dict[str, bool]:
    return {"AFFINE": affine, "LAST": affine}


def equalize_kernel(cc: int) -> Kernel:
    names = ("flat_ptr", "layout_ptr", "table_ptr", "lut_ptr")
    signature = {name: POINTERS[name] for name in names} | {"N": "i32"}
    constants = {"COLUMNS": COLUMNS, "BLOCK": cuda.HISTOGRAM_BLOCK}
    return Kernel(f"{MODULE}:_equalize_kernel", signature, constants, cc)


def sample_kernel(cc: int) -> Kernel:
    signature = {"table_ptr": "*fp32", "index_ptr": "*i64", "layout_ptr": "*i64"}
    signature |= {"numbers_ptr": "*fp64", "key_ptr": "*i64", "first": "i32", "N": "i32"}
    numbers = len(sample_params.view_numbers(EVERYTHING))
    sizes = {"COLUMNS": COLUMNS, "NUMBERS": numbers, "BLOCK": cuda.SAMPLE_BLOCK}
    return Kernel(f"{MODULE}:_sample_kernel", signature, sizes, cc)


def test_three_kernels_compile_for_hopper():
    """Of those that render the one with all steps."""
    kernels = [sample_kernel(90), equalize_kernel(90), render_kernels(90)[3]]
    drawing, equalizing, rendering = compile_offline(kernels)
    for resources in (drawing, equalizing):
        assert_ships(resources, dot=False)
    assert_ships(rendering, dot=True)


@pytest.mark.slow
@pytest.mark.parametrize("cc", [80, 90, 100])
def test_every_tile_configuration_compiles_without_spills(cc):
    for resources in compile_offline(render_kernels(cc)):
        print(resources)
        only_reads = "_tiled" in resources.kernel.name and resources.kernel.constexprs["ROTATED"]
        assert_ships(resources, dot=not only_reads)
    for resources in compile_offline([sample_kernel(cc), equalize_kernel(cc)]):
        assert_ships(resources, dot=False)
