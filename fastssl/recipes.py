"""The recipes: named Configs, each with a card of its measured results.

`fastssl train NAME` runs one. A new method's recipe: its settings, its knobs, its card.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastssl.config import Config, knob_names, suggestion


@dataclass(frozen=True, kw_only=True)
class Card:
    """Measured results of a recipe: means over `n` seeds; not measured yet without `train_s`."""

    hardware: str
    train_s: int | None = None
    """Seconds of training."""
    accuracy: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Probe and labels per class of the neutral protocol -> mean and standard deviation."""
    n: int = 0
    date: str = ""
    command: str = ""
    """The command that measured it."""
    results: str = ""
    """The file with its rows, in bench/results/."""

    def __str__(self) -> str:
        if self.train_s is None:
            return f"{self.hardware}: not measured yet"
        cells = [f"{k.replace('_', ' ')} {m:.3f} ± {s:.3f}" for k, (m, s) in self.accuracy.items()]
        return f"{self.hardware}, {self.train_s} s: {', '.join(cells)} (n {self.n}, {self.date})"


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, the knobs of its method by name, and its card.

    `knobs` may include those of other methods, for `--method`.
    """

    settings: Config
    knobs: Mapping[str, Any]
    card: Card

    def config(self, method: str | None = None) -> Config:
        """The complete Config; with `method`, that of another method with the same settings."""
        from fastssl.objectives import configured, method_class  # imports torch

        settings = replace(self.settings, method=method or self.settings.method)
        known = knob_names(method_class(settings.method).Knobs)
        return configured(settings, **{k: v for k, v in self.knobs.items() if k in known})


_GPU_CIFAR10 = Card(hardware="a GPU, CIFAR-10")
_GPU_FOLDER = Card(hardware="a GPU, a folder of images")
_CPU_FOLDER = Card(hardware="a CPU, a folder of images")

_DIGITS = Config(
    data="digits",
    policy="digits",
    image_size=16,
    backbone="fastnet",
    batch_size=128,
    epochs=40,
    warmup_epochs=5,
    lr=1.5e-3,
    weight_decay=0.05,
)

_CIFAR10 = Config(
    data="cifar10",
    policy="simclr_cifar",
    image_size=32,
    backbone="resnet18",
    stem="cifar",
    batch_size=256,
    epochs=200,
)

_MANY_VIEWS = replace(
    _CIFAR10,
    method="barlow",
    policy="multiview_cifar",
    batch_size=128,
    epochs=100,
    lr=1e-3,
    weight_decay=1e-6,
    precision="bfloat16",
)

# One network and 5,000 images for every method, about a minute of training on one core
# with bfloat16 instructions (AVX512-BF16, AMX); elsewhere --precision float32 is faster.
_CIFAR_SMALL = Config(
    data="cifar10",
    train_images=5000,
    policy="simclr_cifar",
    image_size=16,
    backbone="fastnet",
    batch_size=128,
    epochs=12,
    warmup_epochs=1,
    lr=3e-3,
    weight_decay=0.05,
    precision="bfloat16",
)

# On a GPU bfloat16 and compiled; a step takes less than the memory of a GPU with 24 GB.
_PHOTOS = Config(batch_size=128, precision="auto", compile=None)

_CPU_PHOTOS = Config(
    policy="mocov2",
    image_size=48,
    load_size=64,
    backbone="fastnet",
    batch_size=128,
    epochs=40,
    warmup_epochs=4,
    lr=3e-3,
)


def _emp_ssl(config: Config) -> Config:
    """`config` trained as arXiv:2304.03977 does: one epoch of 20 patches, LARS."""
    return replace(
        config,
        method="emp_ssl",
        policy="emp_ssl",
        views=20,
        batch_size=100,
        epochs=1,
        warmup_epochs=0,
        optimizer="lars",
        lr=0.3,
        lars_eta=0.005,
        lars_clip=True,
        nesterov=True,
        weight_decay=1e-4,
    )


def _cifar_small(method: str, **settings: Any) -> Config:
    return replace(_CIFAR_SMALL, method=method, **settings)


def _projector(width: int, layers: int, **others: Any) -> dict[str, Any]:
    return {"projector_width": width, "projector_layers": layers, **others}


def _card(
    hardware: str, experiment: str, results: str, train_s: int, **accuracy: tuple[float, float]
) -> Card:
    """Of three seeds of an experiment of `bench/suites/accuracy.py`."""
    return Card(
        hardware=hardware,
        train_s=train_s,
        accuracy=accuracy,
        n=3,
        date="2026-11-22",
        command=f"python -m bench --only accuracy --match {experiment}",
        results=f"cpu-2-cores/{results}",
    )


def _digits(
    method: str, knobs: dict[str, Any], train_s: int, **accuracy: tuple[float, float]
) -> Recipe:
    """One of the digits recipes, measured on 2 CPU cores; linear_10 is of 10 labels per class."""
    card = _card("2 CPU cores", "digits", "accuracy.jsonl", train_s, **accuracy)
    return Recipe(replace(_DIGITS, method=method), _SMALL_PROJECTOR | knobs, card)


def _small(
    train_s: int,
    knn: tuple[float, float],
    linear: tuple[float, float],
    settings: Config,
    **knobs: Any,
) -> Recipe:
    """One of the cifar-small recipes, measured on one core with all labels."""
    results = "accuracy-methods.jsonl"
    hardware = "a CPU core, the first 5,000 images of CIFAR-10"  # not a sample by the seed
    card = _card(hardware, "methods", results, train_s, knn_all=knn, linear_all=linear)
    return Recipe(settings, _SMALL_PROJECTOR | knobs, card)


_SMALL_PROJECTOR = _projector(256, 2)
_CIFAR10_PROJECTOR = _projector(2048, 3)
_PHOTOS_PROJECTOR = _projector(512, 2)

RECIPES: dict[str, Recipe] = {
    "barlow": Recipe(replace(_PHOTOS, method="barlow"), {"lambd": 0.0051}, _GPU_FOLDER),
    "diet": Recipe(replace(_PHOTOS, method="diet", views=1), {}, _GPU_FOLDER),
    "vicreg": Recipe(replace(_PHOTOS, method="vicreg"), {"cov_coeff": 1.0}, _GPU_FOLDER),
    "simclr": Recipe(replace(_PHOTOS, method="simclr"), _projector(2048, 2), _GPU_FOLDER),
    "barlow-cpu": Recipe(
        replace(_CPU_PHOTOS, method="barlow"), _PHOTOS_PROJECTOR | {"lambd": 0.01}, _CPU_FOLDER
    ),
    "diet-cpu": Recipe(
        replace(_CPU_PHOTOS, method="diet", views=1), _PHOTOS_PROJECTOR, _CPU_FOLDER
    ),
    "digits-diet": _digits("diet", {}, train_s=37, linear_10=(0.970, 0.002), knn_10=(0.963, 0.002)),
    "digits-barlow": _digits(
        "barlow", {"lambd": 0.02}, train_s=33, linear_10=(0.964, 0.001), knn_10=(0.878, 0.005)
    ),
    "cifar10-diet": Recipe(
        replace(
            _CIFAR10,
            method="diet",
            policy="diet_cifar",
            views=1,
            epochs=1000,
            batch_size=2048,
            lr=8e-3,
        ),
        _CIFAR10_PROJECTOR,
        _GPU_CIFAR10,
    ),
    "cifar10-barlow": Recipe(
        replace(_CIFAR10, method="barlow"), _CIFAR10_PROJECTOR | {"lambd": 0.001}, _GPU_CIFAR10
    ),
    "cifar10-vicreg": Recipe(
        replace(_CIFAR10, method="vicreg"), _CIFAR10_PROJECTOR | {"cov_coeff": 1.0}, _GPU_CIFAR10
    ),
    "cifar10-simclr": Recipe(replace(_CIFAR10, method="simclr"), _projector(2048, 2), _GPU_CIFAR10),
    # the small projector and many views of arXiv:2312.10725
    "cifar10-barlow-2-views": Recipe(_MANY_VIEWS, _SMALL_PROJECTOR, _GPU_CIFAR10),
    "cifar10-barlow-4-views": Recipe(replace(_MANY_VIEWS, views=4), _SMALL_PROJECTOR, _GPU_CIFAR10),
    "cifar10-barlow-8-views": Recipe(replace(_MANY_VIEWS, views=8), _SMALL_PROJECTOR, _GPU_CIFAR10),
    "cifar10-emp_ssl": Recipe(_emp_ssl(_CIFAR10), _projector(4096, 3), _GPU_CIFAR10),
    "cifar-small-barlow": _small(38, (0.392, 0.013), (0.463, 0.010), _CIFAR_SMALL),
    "cifar-small-barlow-4-views": _small(
        40, (0.384, 0.004), (0.456, 0.012), replace(_CIFAR_SMALL, views=4, epochs=6)
    ),
    "cifar-small-vicreg": _small(38, (0.389, 0.005), (0.463, 0.010), _cifar_small("vicreg")),
    "cifar-small-vicreg_exp": _small(
        40, (0.386, 0.004), (0.459, 0.005), _cifar_small("vicreg_exp"), cov_coeff=10.0
    ),
    "cifar-small-vicreg_ctr": _small(
        43, (0.393, 0.003), (0.471, 0.002), _cifar_small("vicreg_ctr"), cov_coeff=10.0
    ),
    "cifar-small-simclr": _small(47, (0.445, 0.003), (0.480, 0.003), _cifar_small("simclr")),
    "cifar-small-simclr_abs": _small(
        42, (0.439, 0.005), (0.481, 0.009), _cifar_small("simclr_abs")
    ),
    "cifar-small-simclr_sq": _small(46, (0.448, 0.007), (0.482, 0.006), _cifar_small("simclr_sq")),
    "cifar-small-spectral": _small(41, (0.414, 0.004), (0.459, 0.005), _cifar_small("spectral")),
    "cifar-small-emp_ssl": _small(
        35, (0.404, 0.010), (0.422, 0.012), _emp_ssl(_CIFAR_SMALL), **_projector(512, 3)
    ),
    "cifar-small-diet": _small(
        94, (0.369, 0.007), (0.429, 0.007), _cifar_small("diet", epochs=24, lr=2e-3)
    ),
    "cifar-small-sdiet": _small(
        85, (0.399, 0.008), (0.454, 0.003), _cifar_small("sdiet", epochs=24, lr=2e-3)
    ),
    "cifar-small-pal": _small(
        38,
        (0.448, 0.003),
        (0.486, 0.003),
        _cifar_small("simclr"),
        oracle="labels",
        oracle_share=0.1,
    ),
    "cifar-small-pal-queries": _small(
        41,
        (0.447, 0.001),
        (0.484, 0.003),
        _cifar_small("simclr"),
        oracle="queries",
        oracle_queries=2000,
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError names the closest one, or all."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {suggestion(name, RECIPES)}")
    return RECIPES[name]


def recipe_config(name: str, **changes: Any) -> Config:
    """The Config of a recipe with some settings or knobs changed, by name."""
    from fastssl.objectives import configured

    return configured(find_recipe(name).config(changes.get("method")), **changes)
