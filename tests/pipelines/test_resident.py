"""The guarantees of a pipeline, on the resident engine."""

import gc
import io
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterable, Sized
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from PIL import Image, ImageOps

import fastssl_pipelines
from fastssl_pipelines import Batch, View, memory, open_pipeline, policies
from fastssl_pipelines.augment import as_images, render
from fastssl_pipelines.sources.decoding import decode

stats = pytest.importorskip("scipy.stats")

VIEWS = (*policies.emp_ssl(2), View(size=8, blur=0.5))
IMAGES = default_rng(0).integers(0, 256, (41, 18, 20, 3), dtype=np.uint8)


def resident(source=IMAGES, *, views=VIEWS, batch_size=4, seed=7, device="cpu", **more):
    return open_pipeline(
        "resident", source, views=views, batch_size=batch_size, seed=seed, device=device, **more
    )


def assert_same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.index, other.index)
    for a, b in zip(one.views, other.views, strict=True):
        assert torch.equal(a, b)


def by_index(batches) -> dict[int, list[torch.Tensor]]:
    return {
        int(i): [view[n] for view in batch.views]
        for batch in batches
        for n, i in enumerate(batch.index)
    }


def test_batches_have_the_views_asked_for():
    batch = next(resident().epoch(0))
    assert [tuple(v.shape) for v in batch.views] == [(4, 3, 32, 32)] * 2 + [(4, 3, 8, 8)]
    assert batch.index.shape == (4,) and batch.index.dtype == torch.int64
    assert batch.params is None
    assert not torch.equal(batch.views[0], batch.views[1])


def test_params_replay_the_batch():
    batch = next(resident(keep_params=True).epoch(3))
    images = as_images(IMAGES).select(batch.index)
    for view, params, shown in zip(VIEWS, batch.params, batch.views, strict=True):
        assert torch.equal(render(images, params, view), shown)


def test_an_epoch_visits_each_index_once_in_an_order_of_its_own():
    pipeline = resident()
    orders = [torch.cat([b.index for b in pipeline.epoch(e)]) for e in range(3)]
    for order in orders:
        assert len(order) == 40 == order.unique().numel()
    assert not torch.equal(orders[0], orders[1])
    assert len(pipeline) == 10


def test_epochs_repeat_and_differ():
    first, again = (list(resident().epoch(5)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert_same(one, other)
    other = by_index(resident().epoch(6))
    for i, views in by_index(first).items():
        assert i not in other or not torch.equal(views[0], other[i][0])


def test_skip_resumes_exactly():
    whole = list(resident().epoch(2))
    for skip in (0, 3, 10):
        rest = list(resident().epoch(2, skip=skip))
        assert len(rest) == 10 - skip
        for one, other in zip(whole[skip:], rest, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("world", [2, 4])
def test_a_view_is_the_same_on_any_number_of_ranks(world):
    alone = resident(batch_size=8)
    ranks = [resident(batch_size=8 // world, shard=(rank, world)) for rank in range(world)]
    for whole, *parts in zip(alone.epoch(1), *(r.epoch(1) for r in ranks), strict=True):
        indices = torch.cat([part.index for part in parts])
        assert torch.equal(indices.sort().values, whole.index.sort().values)
        expected, got = by_index([whole]), by_index(parts)
        for i, views in got.items():
            assert all(torch.equal(a, b) for a, b in zip(views, expected[i], strict=True))


@pytest.mark.parametrize(
    ("shard", "sizes"),
    [
        ((0, 1), [16, 16, 9]),
        ((0, 2), [16, 5]),
        ((1, 2), [16, 4]),
    ],
)
def test_a_last_short_batch(shard, sizes):
    """41 images: every one is seen, the last ranks may have one less."""
    pipeline = resident(batch_size=16, shard=shard, drop_last=False)
    batches = list(pipeline.epoch(0))
    assert [len(batch.index) for batch in batches] == sizes and len(pipeline) == len(sizes)
    assert all(view.shape[0] == n for n, b in zip(sizes, batches, strict=True) for view in b.views)
    full = list(resident(batch_size=16, shard=shard).epoch(0))
    for one, other in zip(batches, full, strict=False):
        assert_same(one, other)
    (rest,) = pipeline.epoch(0, skip=len(sizes) - 1)
    assert_same(rest, batches[-1])


def test_ranks_share_out_what_is_left():
    ranks = [resident(batch_size=10, shard=(rank, 3), drop_last=False) for rank in range(3)]
    seen = [torch.cat([b.index for b in rank.epoch(1)]) for rank in ranks]
    assert torch.cat(seen).sort().values.tolist() == list(range(41))
    few = [
        resident(IMAGES[:7], batch_size=2, shard=(rank, 3), drop_last=False) for rank in range(3)
    ]
    assert [len(list(rank.epoch(0))) for rank in few] == [len(rank) for rank in few] == [2, 1, 1]
    (only,) = resident(batch_size=100, drop_last=False).epoch(0)
    assert len(only.index) == 41


def test_iterating_walks_epoch_after_epoch():
    pipeline = resident()
    epochs = [[batch.index for batch in pipeline] for _ in range(3)]
    assert pipeline.next_epoch == 3
    for epoch, indices in enumerate(epochs):
        assert len(indices) == len(pipeline)
        assert torch.equal(torch.stack(indices), pipeline.order(epoch))
    for _ in pipeline:  # left early: the next walk is another epoch
        break
    assert_same(next(iter(pipeline)), next(pipeline.epoch(4)))
    iter(pipeline)  # never asked for a batch
    assert pipeline.next_epoch == 5
    pipeline.next_epoch = 1  # as when a run is resumed
    assert_same(next(iter(pipeline)), next(pipeline.epoch(1)))
    assert isinstance(pipeline, Iterable) and isinstance(pipeline, Sized)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 images in two folders, one of them gray, one of another size, and one that is none."""
    root = tmp_path_factory.mktemp("folder")
    for i, pixels in enumerate(IMAGES[:12]):
        image = Image.fromarray(pixels)
        image = image.convert("L") if i == 3 else image.resize((30, 26)) if i == 5 else image
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        image.save(root / f"class{i % 2}" / f"{i:02}.png")
    (root / "class0" / "bad.png").write_bytes(b"no image")
    return root


@pytest.mark.parametrize("load_size", [None, 16])
def test_a_folder_is_held_in_memory(folder, load_size):
    settings = {"views": (View(size=8),), "quota": 0.2}
    pipeline = resident(folder, load_size=load_size, **settings)
    assert list(pipeline.unreadable.reasons) == [str(folder / "class0" / "bad.png")]
    files = [Path(name) for name in pipeline.names]
    assert files == sorted(f for f in folder.rglob("*.png") if f.name != "bad.png")
    pixels = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    if load_size:
        side = (load_size, load_size)
        pixels = [ImageOps.fit(Image.fromarray(p), side, Image.Resampling.BILINEAR) for p in pixels]
    for one, other in zip(
        pipeline.epoch(0), resident(pixels, views=settings["views"]).epoch(0), strict=True
    ):
        assert_same(one, other)


def test_what_resident_reads_besides_folders(folder, tmp_path):
    views = (View(size=8),)
    np.save(tmp_path / "images.npy", IMAGES)
    arrays = [resident(source, views=views) for source in (tmp_path / "images.npy", IMAGES)]
    assert_same(*(next(pipeline.epoch(0)) for pipeline in arrays))
    data = [file.read_bytes() for file in sorted(folder.glob("class1/*.png"))]
    assert next(resident(data, views=views).epoch(0)).views[0].isfinite().all()
    for source, options, words in (
        (tmp_path / "none.npy", {}, "none.npy cannot be read"),
        (tmp_path / "missing", {}, "does not exist"),
        (folder, {"quota": 0.0}, "bad.png cannot be read as an image"),
        (folder, {"on_corrupt": "stop"}, "bad.png cannot be read as an image"),
        (folder, {"load_size": 1}, "load_size is 1"),
    ):
        with pytest.raises(ValueError, match=words):
            resident(source, views=views, **options)


def test_class_sorted_data_mixes():
    labels = torch.arange(4000) // 400  # ten classes, one after the other
    pipeline = resident(np.zeros((4000, 2, 2, 3), np.uint8), views=(View(size=1),), batch_size=200)
    counts = torch.stack([labels[i].bincount(minlength=10) for i in pipeline.order(0)])
    p_values = [stats.chisquare(c).pvalue for c in counts.numpy()]
    assert min(p_values) > 1e-4 and np.mean(p_values) > 0.2


def test_a_ragged_source_and_an_array_are_one():
    array = by_index(resident().epoch(0))
    images = [torch.from_numpy(image) for image in IMAGES]
    for i, views in by_index(resident(images).epoch(0)).items():
        assert all(torch.equal(a, b) for a, b in zip(views, array[i], strict=True))
    sizes = default_rng(1).integers(16, 60, (9, 2))
    ragged = [default_rng(2).integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]
    assert next(resident(ragged).epoch(0)).views[0].isfinite().all()


@pytest.mark.parametrize(
    "turned",
    [
        lambda a: a[:, ::-1],
        lambda a: a[:, :, ::-1],
        lambda a: a[..., ::-1],
        lambda a: a[::-2],
        lambda a: a[:, 1:9, 2:10],
        lambda a: torch.from_numpy(a).flip(2),
        lambda a: torch.from_numpy(a).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    ],
)
def test_arrays_may_be_strided(turned):
    """Flipped, in BGR, a part: the same as their copies, whole and in a list."""
    source = turned(IMAGES)
    copy = np.ascontiguousarray(source)
    for images in (as_images(source), as_images(list(source))):
        for i in (0, 3):
            assert np.array_equal(images.pixels(i).numpy(), copy[i])


def test_pil_images_of_any_mode():
    """As files of them are read: gray repeated, alpha dropped, 16 bits shifted."""
    rgb = Image.fromarray(IMAGES[0])
    gray = np.asarray(rgb.convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(gray))
    small = rgb.resize((9, 7))
    pictures = [rgb, rgb.convert("L"), alpha, deep, rgb.convert("P"), rgb.convert("1"), small]
    images = as_images(pictures)
    assert not images.same_size and images.count == len(pictures)
    repeated = np.repeat(gray[..., None], 3, 2)
    for i, expected in enumerate([IMAGES[0], repeated, IMAGES[0], repeated]):
        assert np.array_equal(images.pixels(i).numpy(), expected)
    for i in (4, 5, 6):
        assert np.array_equal(images.pixels(i).numpy(), np.asarray(pictures[i].convert("RGB")))
    assert as_images([*pictures[:2], IMAGES[1]]).same_size
    files = [io.BytesIO() for _ in pictures[:4]]
    for file, picture in zip(files, pictures, strict=False):
        picture.save(file, "png")
    read = [decode(np.frombuffer(file.getvalue(), np.uint8)) for file in files]
    assert all(np.array_equal(a, images.pixels(i)) for i, a in enumerate(read))


def test_read_only_arrays_are_not_copied():
    frozen = IMAGES.copy()
    frozen.setflags(write=False)
    pipeline = resident(frozen)
    assert pipeline.images.flat.data_ptr() == frozen.ctypes.data
    next(pipeline.epoch(0))


def test_early_breaks_and_many_epochs_leave_nothing_behind():
    pipeline = resident()
    next(pipeline.epoch(0))
    gc.collect()
    threads = threading.active_count()
    for _ in zip(range(20), pipeline.epoch(0), strict=False):
        pass
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for epoch in range(100):
        for _ in islice(pipeline.epoch(epoch), 3):
            pass
        two = [pipeline.epoch(epoch), pipeline.epoch(epoch)]  # at once, then dropped
        assert_same(next(two[0]), next(two[1]))
        del two
    gc.collect()
    assert threading.active_count() <= threads
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown_kib < 20_000


def test_memory_is_reused_only_when_unreferenced():
    pytest.importorskip("numba")
    pipeline = resident()
    held = [batch.views[0] for batch in pipeline.epoch(0)]  # more than are reused
    copies = [view.clone() for view in held]
    corner = next(pipeline.epoch(1)).views[2][0, 0, :2]  # a slice alone keeps its batch alive
    copy = corner.clone()
    for epoch in range(2, 5):
        list(pipeline.epoch(epoch))
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert torch.equal(corner, copy)
    del held
    pointers = {batch.views[0].data_ptr() for epoch in range(5) for batch in pipeline.epoch(epoch)}
    assert len(pointers) < 10  # of 50 batches


def test_an_error_in_the_thread_reaches_the_consumer(monkeypatch):
    pipeline = resident()
    monkeypatch.setattr(pipeline, "batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(pipeline.epoch(0))


RGB = np.zeros((5, 8, 8, 3), np.uint8)
BAD = [
    ({"source": RGB[..., 0]}, "shape"),
    ({"source": RGB[..., :1]}, "gray"),
    ({"source": np.zeros((5, 8, 8, 4), np.uint8)}, "alpha"),
    ({"source": RGB.transpose(0, 3, 1, 2)}, "channels last"),
    ({"source": RGB.astype(np.float32)}, "float32"),
    ({"source": RGB[:0]}, "at least"),
    ({"source": np.zeros((5, 0, 8, 3), np.uint8)}, "at least 2 x 2"),
    ({"source": np.zeros((5, 1, 1, 3), np.uint8)}, "at least 2 x 2"),
    ({"source": []}, "without images"),
    ({"source": Image.fromarray(RGB[0])}, "without images"),
    ({"source": {1, 2}}, "set without images"),
    ({"source": [RGB[0], object()]}, "source holds object"),
    ({"source": ([RGB[0], None])}, "source holds NoneType"),
    ({"source": [RGB[0], RGB[0, :, :, 0]]}, r"source\[1\]"),
    ({"views": (View(size=8, patch=9),)}, "smallest image has side 8"),
    ({"views": ()}, "empty"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": 6}, "has 5 images"),
    ({"shard": (2, 2)}, "shard"),
    ({"seed": -1}, "seed"),
    ({"quality": "fast"}, "quality"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_bad_input_is_refused_before_the_first_batch(change, words):
    settings = {"source": RGB, "views": (View(size=8),), "batch_size": 2} | change
    with pytest.raises(ValueError, match=words):
        resident(**settings)


def test_patches_of_an_epoch_must_fit():
    with pytest.raises(ValueError, match=r"View.patch is 19 px: the smallest image has side 18"):
        resident().epoch(0, views=(View(size=8, patch=19),))


def test_settings_are_frozen():
    pipeline = resident()
    with pytest.raises(AttributeError):
        pipeline.views = ()


@pytest.mark.parametrize(("epoch", "skip"), [(-1, 0), (2**32, 0), (0, -1), (0, 11)])
def test_epochs_and_batches_that_there_are_not(epoch, skip):
    with pytest.raises(ValueError, match="epoch is"):
        resident().epoch(epoch, skip=skip)


def test_more_data_than_memory_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    with pytest.raises(ValueError, match=r"5 images .* needs .* GiB.*engine that reads from disk"):
        resident(list(RGB))


def test_unknown_engine_names_those_there_are():
    with pytest.raises(ValueError, match="resident"):
        open_pipeline("tape", RGB, views=VIEWS, batch_size=2, seed=0, device="cpu")


PATHS = os.environ | {"PYTHONPATH": str(Path(fastssl_pipelines.__file__).parents[1])}
FIRST_BATCH = """
import time, numpy as np, torch
from fastssl_pipelines import open_pipeline, policies
images = np.zeros((256, 32, 32, 3), np.uint8)
start = time.perf_counter()
pipeline = open_pipeline("resident", images, views=policies.simclr_cifar(2), batch_size=128,
                         seed=0, device="cpu")
next(pipeline.epoch(0))
print(time.perf_counter() - start)
"""


@pytest.mark.slow
def test_the_first_batch_of_a_second_run_comes_in_two_seconds(tmp_path):
    """Compiled code is cached on disk, wherever NUMBA_CACHE_DIR says."""
    pytest.importorskip("numba")
    environment = PATHS | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_BATCH]
    seconds = [
        float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    print("first batch of the first and the second run, seconds:", seconds)
    assert any(tmp_path.rglob("*.nbi"))
    assert seconds[1] < 2, seconds


def test_nothing_heavy_is_imported_before_it_is_named():
    code = "import sys, fastssl_pipelines as p; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = set(subprocess.check_output(command, env=PATHS, text=True).split())
    assert "fastssl_pipelines.engines.resident" in loaded
    assert not loaded & {"numba", "triton", "cv2", "nvidia.dali", "ffcv", "torchvision", "PIL"}


def pretrain_and_score(batches, labels: torch.Tensor, images: torch.Tensor, seed: int) -> float:
    """A small SimCLR run on `batches` of two views, then 5-nearest-neighbour accuracy, in
    percent."""
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d
    body = torch.nn.Sequential(
        conv(3, 32, 3, 2, 1),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        conv(32, 64, 3, 2, 1),
        torch.nn.BatchNorm2d(64),
        torch.nn.ReLU(),
        conv(64, 128, 3, 2, 1),
        torch.nn.BatchNorm2d(128),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    head = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    for one, other in batches:
        z = torch.nn.functional.normalize(head(body(torch.cat([one, other]))), dim=1)
        logits = (z @ z.T / 0.3).fill_diagonal_(-1e9)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(one)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    body.eval()
    with torch.no_grad():
        features = torch.nn.functional.normalize(body(images), dim=1)
    bank = torch.cat([torch.nonzero(labels == k)[:10, 0] for k in range(10)])
    nearest = bank[(features @ features[bank].T).argmax(1)]
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill(0, bank, False)
    return float((labels[nearest] == labels)[rest].float().mean() * 100)


@pytest.mark.slow
def test_swapping_torchvisions_loader_costs_no_accuracy():
    """Three seeds each on the digits: the means differ by less than the seeds do."""
    from sklearn.datasets import load_digits
    from torchvision.transforms import v2

    raw, labels = load_digits(return_X_y=True)
    gray = np.round(raw.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.repeat(gray[..., None], 3, axis=3)
    labels = torch.from_numpy(labels)
    shown = torch.from_numpy(images).permute(0, 3, 1, 2)
    still = torch.nn.functional.interpolate(shown / 255, size=16, mode="bilinear") * 2 - 1
    views, epochs = policies.digits(2), 8
    jitter = v2.ColorJitter(*views[0].jitter[:2])
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(16, scale=views[0].scale, ratio=views[0].ratio, antialias=True),
            v2.RandomApply([jitter], views[0].jitter_p),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(views[0].mean, views[0].std),
        ]
    )

    def by_torchvision(seed):
        torch.manual_seed(1000 + seed)
        for _ in range(epochs):
            for index in torch.randperm(len(shown))[:1792].split(256):
                yield [torch.stack([transform(shown[i]) for i in index]) for _ in range(2)]

    def by_us(seed):
        pipeline = resident(images, views=views, batch_size=256, seed=seed)
        for epoch in range(epochs):
            for batch in pipeline.epoch(epoch):
                yield batch.views

    theirs, ours = (
        np.array([pretrain_and_score(source(s), labels, still, s) for s in range(3)])
        for source in (by_torchvision, by_us)
    )
    untrained = pretrain_and_score([], labels, still, 0)
    print("accuracy, %: untrained", untrained, "torchvision", theirs, "fastssl", ours)
    noise = np.sqrt(theirs.var(ddof=1) / 3 + ours.var(ddof=1) / 3)
    assert abs(ours.mean() - theirs.mean()) <= max(2.5 * noise, 1.0)
    assert min(ours.min(), theirs.min()) > untrained + 3  # both have learnt
