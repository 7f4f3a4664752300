"""The guarantees of `spec.py`, on every engine with the same images and views."""

import gc
import json
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastssl.config import Config
from fastssl.objectives import configured
from fastssl.runtime.run_dir import config_from_json, config_to_json
from fastssl_pipelines import Pipeline, View, choose_engine, open_pipeline, policies
from fastssl_pipelines.augment import as_images, draw, views_of
from fastssl_pipelines.sources.convert import convert
from fastssl_pipelines.sources.decoding import decode
from fastssl_pipelines.sources.image_files import open_encoded
from tests.helpers.expected_decode import planned
from tests.helpers.requires import needs

ENGINES = (
    pytest.param(("resident", {}), id="resident"),
    pytest.param(("dali", {}), id="dali", marks=needs("nvidia.dali")),
    pytest.param(("dali", {"scaled": False}), id="dali-full", marks=needs("nvidia.dali")),
    pytest.param(("ffcv", {}), id="ffcv", marks=needs("ffcv")),
    pytest.param(("ffcv", {"scaled": False}), id="ffcv-full", marks=needs("ffcv")),
)
COUNT, BATCH = 30, 7
VIEWS = (*policies.simclr(2, 24), View(size=17, interpolation="bicubic", erase=0.5))
Open = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def files(data: Path) -> list[Path]:
    """Real JPEGs, RGB and gray, the smaller ones."""
    found = sorted((data / "imagenet-samples").iterdir(), key=lambda f: f.stat().st_size)
    return found[:COUNT]


@pytest.fixture(scope="module")
def sources(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same images for each engine: decoded, as files, as a .beton of the very same JPEGs."""
    beton = tmp_path_factory.mktemp("beton") / "images.beton"
    convert(files, beton)
    pixels = [decode(np.fromfile(file, np.uint8)) for file in files]
    return {"resident": pixels, "dali": files, "ffcv": beton}


@pytest.fixture(params=ENGINES)
def opened(request: pytest.FixtureRequest, sources: dict[str, Any], device: str) -> Open:
    """Opens the engine, with other arguments where they are given."""

    def call(**changes: Any) -> Pipeline:
        given = {"views": VIEWS, "batch_size": BATCH, "seed": 3, "device": device}
        return open_pipeline(engine, sources[engine], **{**given, **options, **changes})

    engine, options = request.param
    call.engine = engine  # type: ignore[attr-defined]
    return call


def indices(pipeline: Pipeline, epoch: int, skip: int = 0) -> list[list[int]]:
    return [batch.index.tolist() for batch in pipeline.epoch(epoch, skip)]


def test_an_epoch_shows_each_image_once_and_drops_the_last_batch(opened: Open) -> None:
    pipeline = opened()
    batches = indices(pipeline, 0)
    assert len(batches) == len(pipeline) == COUNT // BATCH
    seen = [i for batch in batches for i in batch]
    assert len(set(seen)) == len(seen) == BATCH * (COUNT // BATCH)
    assert set(seen) < set(range(COUNT))
    whole = [i for batch in indices(opened(batch_size=COUNT), 0) for i in batch]
    assert sorted(whole) == list(range(COUNT)) != whole


def test_the_last_batch_may_be_short(opened: Open) -> None:
    pipeline = opened(drop_last=False, keep_params=True)
    batches = list(pipeline.epoch(0))
    assert [len(batch.index) for batch in batches] == [7, 7, 7, 7, 2] and len(pipeline) == 5
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(COUNT))
    for view, look in zip(batches[-1].views, VIEWS, strict=True):
        assert view.shape == (2, 3, *look.shape) and view.isfinite().all()
    (rest,) = pipeline.epoch(0, skip=4)
    assert torch.equal(rest.views[0], batches[-1].views[0])


def test_a_pipeline_is_a_data_loader(opened: Open) -> None:
    """`iter` and `len`, as trainers ask of one: an epoch each time, and the next one after it."""
    pipeline = opened(views=(View(size=8),))
    walks = [[batch.index.tolist() for batch in pipeline] for _ in range(2)]
    assert walks == [indices(pipeline, epoch) for epoch in (0, 1)]
    assert all(len(walk) == len(pipeline) for walk in walks)


def test_every_field_reaches_every_engine(opened: Open, sources: dict[str, Any]) -> None:
    view = View(size=(9, 30), vertical_flip=1.0, rotate=1.0, rotate_degrees=(20, 40), equalize=1.0)
    batch = next(opened(views=(view,), keep_params=True, **_unscaled(opened)).epoch(1))
    (params,) = batch.params
    assert batch.views[0].shape == (BATCH, 3, 9, 30)
    assert (params["vertical_flip"] == 1).all() and (params["angle"] >= 20).all()
    pixels = [sources["resident"][i] for i in batch.index.tolist()]
    images = as_images(pixels).to(batch.index.device)
    truth = views_of(images, (view,), 3, 1, batch.index)[0][0]
    nearly = opened.engine == "ffcv" or batch.index.is_cuda  # type: ignore[attr-defined]
    assert (batch.views[0] - truth).abs().mean() <= (0.15 if nearly else 0)


def _unscaled(opened: Open) -> dict[str, bool]:
    return {} if opened.engine == "resident" else {"scaled": False}  # type: ignore[attr-defined]


def test_batches_have_the_views_asked_for(opened: Open, device: str) -> None:
    half = View(size=9, dtype=torch.float16, channels_last=True)
    batch = next(opened(views=(*VIEWS, half)).epoch(0))
    assert [tuple(view.shape) for view in batch.views] == [
        (BATCH, 3, size, size) for size in (24, 24, 17, 9)
    ]
    assert batch.views[3].dtype == torch.float16
    assert batch.views[3].is_contiguous(memory_format=torch.channels_last)
    assert batch.index.dtype == torch.int64 and batch.index.device.type == device
    assert batch.params is None


def test_ranks_share_out_the_batches_of_one(opened: Open) -> None:
    whole = indices(opened(batch_size=6), 2)
    ranks = [indices(opened(batch_size=3, shard=(rank, 2)), 2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    first, second = ({i for batch in rank for i in batch} for rank in ranks)
    assert not first & second


def test_the_stream_depends_on_seed_and_epoch_alone(opened: Open) -> None:
    pipeline = opened()
    list(pipeline.epoch(1))  # leaves no trace
    first, again = list(pipeline.epoch(0)), list(opened().epoch(0))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.index, b.index)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    orders = [indices(opened(), 0), indices(opened(), 1), indices(opened(seed=4), 0)]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_skip_continues_exactly(opened: Open) -> None:
    whole = list(opened().epoch(5))
    for wrong in ({"epoch": -1}, {"epoch": 0, "skip": 5}, {"epoch": 0, "skip": -1}):
        with pytest.raises(ValueError, match="give 0 to 2\\^32 and 0 to 4"):
            opened().epoch(**wrong)
    for skip in (1, 3, 4):
        rest = list(opened().epoch(5, skip=skip))
        assert len(rest) == max(0, len(whole) - skip)
        for a, b in zip(whole[skip:], rest, strict=True):
            assert torch.equal(a.index, b.index)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_views_are_those_of_the_fused_render(
    opened: Open, sources: dict[str, Any], device: str
) -> None:
    """Bit for bit where the pixels are: DALI's decoder equals Pillow's on the CPU, at full size and
    smaller. FFCV's takes a faster DCT and simpler chroma, so its views are near."""
    pipeline, shrunk = opened(keep_params=True), set()
    for batch in pipeline.epoch(1):
        if opened.engine == "resident":  # type: ignore[attr-defined]
            images, shrinks = as_images(sources["resident"]).select(batch.index.cpu()), [1]
        else:
            images, shrinks = planned(pipeline, open_encoded(sources["dali"]), batch.index, 1)
        shrunk |= set(shrinks)
        truth, params = views_of(images.to(device), VIEWS, 3, 1, batch.index)
        for ours, theirs in zip(batch.params, params, strict=True):
            assert torch.equal(ours.table, theirs.table)
        for view, expected, look in zip(batch.views, truth, VIEWS, strict=True):
            difference = (view - expected).abs() * torch.tensor(look.std, device=device).view(
                3, 1, 1
            )
            if opened.engine == "ffcv":  # type: ignore[attr-defined]
                assert difference.mean() < 3 / 255
            else:
                assert difference.max() <= (2 / 255 if device == "cuda" else 0)
    assert shrunk == ({1, 2, 4, 8} if getattr(pipeline, "scaled", False) else {1})


def test_an_image_is_decoded_once_for_all_views(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastssl_pipelines.engines import dali
    from fastssl_pipelines.sources.beton import Beton

    counts = {"n": 0}
    schedule, by_pillow, decode_row = dali._Dali.schedule, dali.decode, Beton.decode

    def count_schedule(self: Any, images: list[Any]) -> list[Any]:
        counts["n"] += len(images)
        return schedule(self, images)

    def count_pillow(*arguments: Any, **options: Any) -> Any:
        counts["n"] += 1
        return by_pillow(*arguments, **options)

    def count_rows(self: Any, *arguments: Any) -> str:
        counts["n"] += 1
        return decode_row(self, *arguments)

    monkeypatch.setattr(dali._Dali, "schedule", count_schedule)
    monkeypatch.setattr(dali, "decode", count_pillow)
    monkeypatch.setattr(Beton, "decode", count_rows)
    for views in (policies.simclr(2, 16), policies.simclr(9, 16)):
        counts["n"] = 0
        list(opened(views=views).epoch(0))
        expected = 0 if opened.engine == "resident" else BATCH * (COUNT // BATCH)  # type: ignore[attr-defined]
        assert counts["n"] == expected


@needs("nvidia.dali")
def test_every_crop_of_a_smaller_image_covers_its_view(sources: dict[str, Any]) -> None:
    """The rule of all engines: the smallest of 1/2, 1/4, 1/8 at which that holds, at the sampled
    crops of the views."""
    views = (View(size=24), View(size=17, scale=(0.5, 1.0)))
    given = {"views": views, "batch_size": 1, "seed": 3, "device": "cpu"}
    pipeline: Any = open_pipeline("dali", sources["dali"], **given)
    index = torch.arange(400)
    size = torch.stack([30 + 7 * (index % 61), 20 + 11 * (index % 53)], dim=1)
    found = pipeline._shrinks(index, 2, size, views)
    assert set(found.tolist()) == {1, 2, 4, 8}
    covers = torch.zeros(3, 400, dtype=torch.bool)
    for k, shrink in enumerate((2, 4, 8)):
        smaller = ((size + shrink - 1) // shrink).unbind(1)
        crops = [draw(view, 3, 2, index, v, *smaller) for v, view in enumerate(views)]
        sides = [torch.minimum(crop["height"], crop["width"]) for crop in crops]
        covers[k] = (sides[0] >= 24) & (sides[1] >= 17)
    for n, shrink in enumerate(found.tolist()):
        fine = [s for s, covered in zip((2, 4, 8), covers[:, n].tolist(), strict=True) if covered]
        assert shrink == max(fine, default=1)
    sizes = torch.tensor([[9, 9], [8, 8]])
    tiny = pipeline._shrinks(torch.arange(2), 0, sizes, (View(size=1),))
    assert tiny.tolist() == [8, 4], "an image needs 2 x 2 pixels"
    patches = pipeline._shrinks(index, 2, size, (View(size=8, patch=16),))
    assert patches.unique().tolist() == [1], "a patch is px of the image"


def test_leaving_early_harms_nothing(opened: Open) -> None:
    pipeline = opened()
    whole = indices(pipeline, 0)
    for batch in pipeline.epoch(0):
        assert batch.index.tolist() == whole[0]
        break
    for epoch in range(20):
        left = pipeline.epoch(epoch)
        next(left)
        del left
    gc.collect()
    assert indices(pipeline, 0) == whole
    for a, b in zip(pipeline.epoch(0), opened().epoch(0), strict=True):
        assert torch.equal(a.views[0], b.views[0])


def test_an_epoch_has_the_views_it_is_given(opened: Open) -> None:
    """For this epoch alone, whatever is decided by the views: sizes, how small JPEGs are decoded,
    how large a patch may be."""
    pipeline = opened()
    for views in ((View(size=120), View(size=9)), (View(size=16, patch=40),)):
        epochs = zip(pipeline.epoch(1, views=views), opened(views=views).epoch(1), strict=True)
        for given, own in epochs:
            assert torch.equal(given.index, own.index)
            assert all(torch.equal(a, b) for a, b in zip(given.views, own.views, strict=True))
    assert pipeline.views == VIEWS
    both = zip(pipeline.epoch(1), pipeline.epoch(1, views=views), opened().epoch(1), strict=True)
    for own, given, expected in both:
        assert [view.shape[-1] for view in given.views] == [16]
        assert all(torch.equal(a, b) for a, b in zip(own.views, expected.views, strict=True))
    with pytest.raises(ValueError, match="views is empty"):
        pipeline.epoch(0, views=())


def test_two_epochs_at_once(opened: Open) -> None:
    pipeline = opened()
    alone = list(pipeline.epoch(0)), list(pipeline.epoch(1))
    together = zip(pipeline.epoch(0), pipeline.epoch(1), strict=True)
    for expected, batches in zip(zip(*alone, strict=True), together, strict=True):
        for a, b in zip(expected, batches, strict=True):
            assert torch.equal(a.index, b.index) and torch.equal(a.views[0], b.views[0])


def test_a_hundred_epochs_do_not_grow(opened: Open) -> None:
    pipeline = opened(views=(View(size=8),), batch_size=3)

    def run(epochs: range) -> None:
        for epoch in epochs:
            for batch in pipeline.epoch(epoch, skip=len(pipeline) - 2):
                if epoch % 2:
                    break
                assert len(batch.views) == 1

    run(range(30))  # allocators and buffers reach their size
    gc.collect()
    threads, files, memory = threading.active_count(), open_files(), resident_mib()
    run(range(30, 130))
    gc.collect()
    assert threading.active_count() <= threads
    assert open_files() <= files
    assert resident_mib() - memory < 16


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_class_sorted_data_mixes(tmp_path: Path) -> None:
    """Chi-square of the classes in each batch of one epoch, over the order that all engines use."""
    from fastssl_pipelines import rng

    classes, per_class, batch = 20, 500, 250
    order = rng.permutation(classes * per_class, 0, 0)
    counts = (
        torch.nn.functional.one_hot(order // per_class, classes).view(-1, batch, classes).sum(1)
    )
    expected = batch / classes
    chi_square = ((counts - expected) ** 2 / expected).sum(1)  # 19 degrees of freedom per batch
    assert chi_square.max() < 60 and 15 < chi_square.double().mean() < 23
    in_windows = torch.arange(classes * per_class).view(-1, 1000)  # what a window of 1,000 would do
    shuffled = in_windows[:, torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    counts = torch.nn.functional.one_hot(shuffled.view(-1) // per_class, classes)
    counts = counts.view(-1, batch, classes).sum(1)
    assert ((counts - expected) ** 2 / expected).sum(1).min() > 500, "the test cannot fail"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": COUNT + 1}, f"batch_size is {COUNT + 1}"),
        ({"batch_size": 16, "shard": (0, 2)}, "a rank has 15 images"),
        ({"shard": (2, 2)}, "0 <= rank < world"),
        ({"views": ()}, "views is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"quality": "good"}, "quality is 'good'"),
    ],
)
def test_mistakes(opened: Open, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(**changes)


def test_auto_chooses(sources: dict[str, Any]) -> None:
    assert choose_engine(sources["resident"], "cpu")[0] == "resident"
    assert choose_engine(sources["ffcv"], "cpu") == ("ffcv", "the source is a .beton file")
    assert choose_engine("train.npy", "cpu") == ("resident", "the source is one array")
    engine, why = choose_engine(sources["dali"], "cpu")
    assert engine == "dali" and "DALI decodes on this CPU" in why


def test_auto_logs_its_choice(sources: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fastssl_pipelines"):
        pipeline = open_pipeline(
            "auto", sources["ffcv"], views=VIEWS, batch_size=3, seed=0, device="cpu"
        )
    assert type(pipeline).__name__ == "FfcvPipeline"
    assert "engine ffcv: the source is a .beton file" in caplog.text
    with pytest.raises(ValueError, match="choose 'auto' or one of"):
        open_pipeline("dari", sources["dali"], views=VIEWS, batch_size=3, seed=0, device="cpu")


def test_auto_names_what_to_install(
    sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastssl_pipelines.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fastssl-torch\[dali\]'"):
        choose_engine(sources["dali"], "cpu")


def test_encoded_sources_are_one_data_set(files: list[Path], tmp_path: Path) -> None:
    """Files, bytes in memory and tar shards give the same images, in the same order."""
    convert(files, tmp_path / "shards")
    kinds = (files, [file.read_bytes() for file in files], tmp_path / "shards")
    for source in kinds:
        encoded = open_encoded(source)
        assert len(encoded) == COUNT
        for i, file in enumerate(files):
            assert encoded.read(i).tobytes() == file.read_bytes()
    given = {"views": VIEWS, "batch_size": BATCH, "seed": 3, "device": "cpu"}
    streams = [next(open_pipeline("dali", source, **given).epoch(0)) for source in kinds]
    for batch in streams[1:]:
        assert torch.equal(batch.views[2], streams[0].views[2])


@needs("nvidia.dali", "ffcv")
def test_training_on_a_tar_and_on_a_beton(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each container trains with its own engine; a .beton is split, trained on and evaluated on as
    it is, to the accuracy that the files it was made from give."""
    from fastssl.pretrain import pretrain
    from fastssl.recipes import recipe_config

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(data / "imagenette-224-1000.tar") as tar:
        members = [m for m in tar.getmembers() if m.isfile() and m.name.startswith("val/")]
        tar.extractall(tmp_path, members=members[::3], filter="data")
    sources = {"folder": tmp_path / "val", "x.tar": tmp_path / "x.tar"}
    with tarfile.open(sources["x.tar"], "w") as tar:
        tar.add(tmp_path / "val", "val")
    sources["x.beton"] = convert(tmp_path / "val", tmp_path / "x.beton").target
    config = recipe_config(
        "barlow",
        engine="auto",
        backbone="fastnet-8",
        image_size=16,
        load_size=24,
        epochs=1,
        warmup_epochs=0.5,
        batch_size=16,
        projector_width=32,
        projector_layers=2,
        label_draws=1,
    )
    chosen = {"folder": "dali", "x.tar": "dali", "x.beton": "ffcv"}
    raw = {}
    for name, source in sources.items():
        said: list[str] = []
        summary = pretrain(
            configured(config, data=str(source)), tmp_path / f"run-{name}", said.append
        )
        assert any(line.startswith(f"engine {chosen[name]}: ") for line in said), said
        assert summary["images"] == 67 and summary["rankme"] > 1
        raw[name] = summary["accuracy"].get("raw pixels")
    assert raw["x.beton"] == raw["x.tar"] == raw["folder"]
    assert not (tmp_path / "cache" / "fastssl").exists(), "the .beton was converted again"


@pytest.mark.slow
@needs("nvidia.dali", "ffcv")
def test_engines_train_to_the_same_accuracy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imagenette's 750 training images, 2 seeds: engines differ by no more than seeds do."""
    from fastssl.pretrain import pretrain
    from fastssl.recipes import recipe_config

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(data / "imagenette-224-1000.tar") as tar:
        tar.extractall(tmp_path / "nette", filter="data")
    config = recipe_config(
        "barlow",
        data=str(tmp_path / "nette"),
        backbone="fastnet-8",
        image_size=32,
        load_size=64,
        epochs=2,
        warmup_epochs=1,
        batch_size=50,
        lr=2e-3,
        lambd=0.02,
        projector_width=128,
        projector_layers=2,
        label_draws=1,
    )
    accuracy: dict[str, list[float]] = {}
    for engine in ("resident", "dali", "ffcv"):
        for seed in (0, 1):
            run = configured(config, engine=engine, seed=seed)
            folder = tmp_path / f"{engine}-{seed}"
            summary = pretrain(run, folder, lambda line: None)
            cells = summary["accuracy"]["pretrained"]
            accuracy.setdefault(engine, []).append(cells["linear_all"]["mean"])
            assert summary["images"] == 750 and summary["unreadable"] == {}
    print(accuracy)
    chance_spread = 0.032  # of an accuracy near 0.4 over 250 test images: one standard error
    means = {engine: float(np.mean(values)) for engine, values in accuracy.items()}
    assert max(means.values()) - min(means.values()) < 2 * chance_spread, accuracy
    assert min(means.values()) > 0.25, "nothing was learnt, so nothing is compared"


@needs("nvidia.dali")
def test_the_command_line_reaches_the_engine(data: Path, tmp_path: Path) -> None:
    """--render, --scaled and --oriented, and the images of the evaluation turned like the views."""
    from fastssl.cli.parsing import parse_config
    from fastssl.data.loading import open_data

    for k in range(5):
        (tmp_path / f"{k}.jpg").symlink_to(data / "jpeg-odd" / "Landscape_6.jpg")
    flags = f"--data {tmp_path} --engine dali --batch-size 2 --image-size 16 --load-size 16".split()
    asked = parse_config(
        "barlow", [*flags, "--render", "dali", "--no-scaled", "--oriented", "--device", "cpu"]
    )
    plain = parse_config("barlow", [*flags, "--device", "cpu"])
    opened = [open_data(config, torch.device("cpu"), print) for config in (asked, plain)]
    pipelines: list[Any] = [each.pipeline for each in opened]
    assert [(p.scaled, p.decoding.oriented, p._render is None) for p in pipelines] == [
        (False, True, False),
        (True, False, True),
    ]
    first = (next(each.train.batches([torch.tensor([0])]))[1][0] for each in opened)
    turned, stored = (torch.from_numpy(pixels).float() for pixels in first)
    assert (turned - stored.rot90(-1)).abs().mean() < 4 < (turned - stored).abs().mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"render": "dali"}, "--render dali needs --engine dali, not resident"),
        ({"render": "dali", "engine": "ffcv"}, "--render dali needs --engine dali, not ffcv"),
        ({"oriented": True, "engine": "ffcv"}, "engine ffcv ignores EXIF orientation"),
        (
            {"oriented": True, "engine": "auto", "data": "x.beton"},
            "engine ffcv ignores EXIF orientation",
        ),
    ],
)
def test_options_that_an_engine_has_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_a_config_of_before_these_options_is_read() -> None:
    config = configured(Config(engine="dali", seed=5))
    values = json.loads(config_to_json(config))
    for name in ("render", "scaled", "oriented"):
        del values[name]
    assert config_from_json(json.dumps(values)) == config
