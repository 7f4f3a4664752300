"""Parameters that do not fit their images or their view are refused before memory is touched."""

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from fastssl_pipelines import View
from fastssl_pipelines.augment import (
    Images,
    Params,
    as_images,
    checks,
    cuda,
    draw,
    reference,
    render,
    views_of,
)
from fastssl_pipelines.augment.checks import LIMITS, misfits
from fastssl_pipelines.augment.image_batch import layout_of
from fastssl_pipelines.augment.sample_params import COLUMNS
from tests.helpers.requires import needs

VIEW = View(
    size=(12, 20), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0, blur=0.5, erase=1.0, rotate=0.5
)
COUNT = 6
BACK_ENDS = {"reference": reference, "cuda": cuda}
if find_spec("numba"):
    BACK_ENDS["cpu"] = import_module("fastssl_pipelines.augment.cpu")


def images_of(height: int, width: int) -> Images:
    rng = np.random.default_rng(0)
    return as_images(rng.integers(0, 256, (COUNT, height, width, 3), dtype=np.uint8))


def drawn(height: int = 40, width: int = 50, view: View = VIEW) -> Params:
    return draw(view, 0, 0, torch.arange(COUNT), 0, height, width)


@pytest.fixture(params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest):
    device = "cuda" if request.param == "cuda" and torch.cuda.is_available() else "cpu"

    def call(images: Images, params: Params, view: View = VIEW) -> Tensor:
        table = params.table[None].to(device)
        return BACK_ENDS[request.param].render(images.to(device), table, view, "exact")[0]

    return call


def test_params_of_larger_images_are_refused(back_end):
    """They would show other images' pixels, and further out end the process."""
    with pytest.raises(ValueError, match=r"row \d: a crop of .* its image of 40 x 50 px; draw"):
        back_end(images_of(40, 50), drawn(256, 256))
    sizes = torch.tensor([[40, 50]] * COUNT)
    sizes[3] = torch.tensor([39, 50])
    ragged = Images(torch.zeros(40 * 50 * 3 * COUNT, dtype=torch.uint8), layout_of(sizes), False)
    bottom = drawn().replace(top=20, height=20)  # fits all but the one that is a row shorter
    with pytest.raises(ValueError, match=r"row 3: a crop of .* its image of 39 x 50 px"):
        back_end(ragged, bottom)


def test_erasing_beyond_the_view_is_refused(back_end):
    """It would write into other views."""
    with pytest.raises(ValueError, match=r"row 0: erasing 13 x 5 px .* view of 12 x 20 px"):
        back_end(
            images_of(40, 50),
            drawn().replace(erase_top=0, erase_left=0, erase_height=13, erase_width=5),
        )
    large = drawn(view=replace(VIEW, size=200))
    with pytest.raises(ValueError, match=r"erasing .* does not fit the view of 12 x 20 px"):
        back_end(images_of(40, 50), large)


@pytest.mark.parametrize("column", COLUMNS)
def test_numbers_that_no_view_draws_are_refused(column):
    low, high = LIMITS[column]
    wrong = [float("nan"), float("inf"), -float("inf"), low - 1 - abs(low), 2 * high + 1]
    if COLUMNS.index(column) in checks.WHOLE:
        wrong.append(1.5)
    for value in wrong:
        values = drawn()[column].clone()
        values[4] = value
        params = drawn().replace(**{column: values})
        for name, engine in BACK_ENDS.items():
            if name != "cuda":  # which shares the check of the reference
                with pytest.raises(ValueError, match=rf"params row 4: {column} is"):
                    engine.render(images_of(40, 50), params.table[None], VIEW, "exact")


def test_rows_columns_and_dtype(back_end):
    images, params = images_of(40, 50), drawn()
    for wrong, words in (
        (Params(params.table[:5]), "params have 5 rows, there are 6 images"),
        (Params(params.table[:, :20]), "with 20 columns"),
        (Params(params.table.double()), "float64"),
        (Params(params.table.long()), "int64"),
    ):
        with pytest.raises(ValueError, match=words):
            back_end(images, wrong)


@pytest.mark.skipif("cpu" not in BACK_ENDS, reason="no numba")
def test_the_compiled_check_is_the_check():
    """On tables of which every other row has one number moved, also to the very limit."""
    rng = np.random.default_rng(0)
    layout = images_of(40, 50).layout.repeat(200, 1)
    table = drawn().table.repeat(200, 1)
    for row in range(0, len(table), 2):
        column = rng.integers(len(COLUMNS))
        value = rng.choice([-1, 0, 1, 12, 20, 40, 50, 0.5, np.nan, np.inf, table[row, column]])
        table[row, column] = float(value) + rng.choice([0, 0, 1e-3])
    wrong = misfits(layout, table[None], VIEW)[0]
    assert 100 < int(wrong.sum()) < 600
    first = import_module("fastssl_pipelines.augment.cpu.kernels").first_misfit
    for start in range(len(table)):
        rows, place = table[start : start + 1].numpy(), layout[start : start + 1].numpy()
        assert (first(rows, place, *BACK_ENDS["cpu"]._LIMITS, *VIEW.shape) == 0) == wrong[start]
    found = first(table.numpy(), layout.numpy(), *BACK_ENDS["cpu"]._LIMITS, *VIEW.shape)
    assert found == int(wrong.long().argmax())


@pytest.mark.parametrize(
    "view",
    [
        VIEW,
        View(size=(1, 3), scale=(1e-6, 1.0), ratio=(1 / 50, 50.0), erase=1.0),
        View(size=5, patch=7, erase=1.0, erase_scale=(0.9, 1.0), erase_ratio=(1 / 50, 50.0)),
        View(size=9, blur=1.0, blur_sigma=(1e-3, 1e6), jitter=(9, 9, 9, 0.5), jitter_p=1.0),
        View(size=9, rotate=1.0, rotate_degrees=(-360, 360), equalize=1.0, solarize=1.0),
    ],
)
def test_whatever_is_drawn_fits(view):
    """So parameters that a pipeline has drawn for its images need no check."""
    count = 20_000
    sizes = torch.from_numpy(np.random.default_rng(0).integers(1, 200, (count, 2)))
    layout = layout_of(sizes)
    table = reference.draw((view,), 3, 1, torch.arange(count), layout, 0)
    assert not misfits(layout, table, view).any()


def test_a_pipeline_s_own_params_are_not_checked(monkeypatch):
    """On a GPU the check would wait for the device in each step."""
    images, index = images_of(40, 50), torch.arange(COUNT)
    views, params = views_of(images, (VIEW, VIEW), 0, 0, index)
    again = render(images, params[1], VIEW)
    assert torch.equal(again, views[1])
    for module in BACK_ENDS.values():
        name = "require_table" if module is BACK_ENDS.get("cpu") else "require_fit"
        monkeypatch.setattr(module, name, lambda *_: 1 / 0)
    unchecked, _ = views_of(images, (VIEW, VIEW), 0, 0, index)
    assert torch.equal(unchecked[1], again)
    with pytest.raises(ZeroDivisionError):
        render(images, params[1], VIEW)


def test_a_strided_table_is_rendered_as_its_copy(back_end):
    images, params = images_of(40, 50), drawn(view=replace(VIEW, erase=0.0))
    doubled = params.table.repeat_interleave(2, 0)[::2]
    assert not doubled.is_contiguous()
    assert torch.equal(back_end(images, Params(doubled)), back_end(images, params))


def test_replayed_steps_need_no_view_that_draws_them(back_end):
    """A rotation and an equalization that the parameters hold and the view does not."""
    plain = View(size=12)
    images, params = images_of(40, 50), drawn(view=plain)
    shown = back_end(images, params, plain)
    for change in ({"angle": 45.0}, {"equalize": 1.0}):
        turned = back_end(images, params.replace(**change), plain)
        assert (turned - shown).abs().max() > 0.02


def test_positions_must_be_those_of_the_images():
    images = images_of(40, 50)
    for index, words in (
        (torch.arange(5), "index has 5 positions, there are 6 images"),
        (torch.arange(6).int(), "int32"),
        (torch.arange(6)[None], r"\(1, 6\)"),
    ):
        with pytest.raises(ValueError, match=words):
            views_of(images, (VIEW,), 0, 0, index)
        for engine in BACK_ENDS.values():
            with pytest.raises(ValueError, match=words):
                engine.draw((VIEW,), 0, 0, index, images.layout, 0)
    with pytest.raises(ValueError, match="epoch is -1"):
        draw(VIEW, 0, -1, torch.arange(3), 0, 8, 8)
    with pytest.raises(ValueError, match="quality is 'fast'"):
        render(images, drawn(), VIEW, "fast")  # type: ignore[arg-type]


FLAT = torch.zeros(2 * 4 * 5 * 3, dtype=torch.uint8)
LAYOUT = torch.tensor([[0, 4, 5], [60, 4, 5]])


@pytest.mark.parametrize(
    ("flat", "layout", "same_size", "words"),
    [
        (FLAT[:-1], LAYOUT, True, "to 120 of 119"),
        (FLAT, LAYOUT + torch.tensor([[-1, 0, 0], [0, 0, 0]]), True, "from byte -1"),
        (FLAT, torch.tensor([[0, 4, 5], [60, 0, 5]]), False, "smallest side is 0"),
        (FLAT, torch.tensor([[0, 4, 5], [60, 5, 4]]), True, "several sizes"),
        (FLAT.float(), LAYOUT, True, "flat is torch.float32"),
        (FLAT[::2], LAYOUT, True, "give contiguous"),
        (FLAT, LAYOUT.int(), True, "layout is torch.int32"),
        (FLAT, LAYOUT[:, :2], True, r"layout is torch.int64 \(2, 2\)"),
    ],
)
def test_images_lie_within_their_memory(flat, layout, same_size, words):
    with pytest.raises(ValueError, match=words):
        Images(flat, layout, same_size)


@needs("nvidia.dali")
def test_dali_s_operators_refuse_them_too():
    from fastssl_pipelines.engines.dali_operators import DaliRender

    engine = DaliRender([VIEW], "exact", batch_size=COUNT, threads=1, device=torch.device("cpu"))
    images = images_of(40, 50)
    assert engine.render(images, [drawn()])[0].shape == (COUNT, 3, 12, 20)
    with pytest.raises(ValueError, match="does not fit its image of 40 x 50 px"):
        engine.render(images, [drawn(256, 256)])
