"""Named Configs. Above each: wall clock and accuracy on what hardware, or "not measured yet".

Each is run by `fastssl train NAME`; accuracies are those of the README's table.
"""

from dataclasses import replace

from fastssl.config import Config

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
    projector_width=256,
    projector_layers=2,
)

_CIFAR10 = Config(
    data="cifar10",
    policy="simclr_cifar",
    image_size=32,
    backbone="resnet18",
    stem="cifar",
    batch_size=256,
    epochs=200,
    projector_width=2048,
    projector_layers=3,
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


_MANY_VIEWS = replace(
    _CIFAR10,
    method="barlow",
    policy="multiview_cifar",
    batch_size=128,
    epochs=100,
    lr=1e-3,
    weight_decay=1e-6,
    projector_width=256,
    projector_layers=2,
    precision="bfloat16",
)

# One net and one set of 5,000 images for every method, about a minute of training on one core that
# multiplies bfloat16 (AVX512-BF16, AMX); elsewhere --precision float32 is quicker.
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
    projector_width=256,
    projector_layers=2,
    precision="bfloat16",
)

_CPU_PHOTOS = Config(
    policy="mocov2",
    image_size=48,
    load_size=64,
    backbone="fastnet",
    batch_size=128,
    epochs=40,
    warmup_epochs=4,
    lr=3e-3,
    projector_width=512,
    projector_layers=2,
)

RECIPES: dict[str, Config] = {
    # 2 CPU cores, 37 s; 10 labels per class: linear .970 (n 3, std .002), kNN .963 (.002)
    "digits-diet": replace(_DIGITS, method="diet", views=2),
    # 2 CPU cores, 33 s; 10 labels per class: linear .964 (n 3, std .001), kNN .878 (.005)
    "digits-barlow": replace(_DIGITS, method="barlow", lambd=0.02),
    # a GPU, CIFAR-10: not measured yet
    "cifar10-diet": replace(
        _CIFAR10, method="diet", policy="diet_cifar", views=1, epochs=1000, batch_size=2048, lr=8e-3
    ),
    "cifar10-barlow": replace(_CIFAR10, method="barlow", lambd=0.001),
    "cifar10-vicreg": replace(_CIFAR10, method="vicreg", cov_coeff=1.0),
    "cifar10-simclr": replace(_CIFAR10, method="simclr", projector_layers=2),
    # a GPU, CIFAR-10, the small projector and many views of arXiv:2312.10725: not measured yet
    "cifar10-barlow-2-views": _MANY_VIEWS,
    "cifar10-barlow-4-views": replace(_MANY_VIEWS, views=4),
    "cifar10-barlow-8-views": replace(_MANY_VIEWS, views=8),
    # a GPU, CIFAR-10, one epoch as arXiv:2304.03977: not measured yet
    "cifar10-emp_ssl": replace(_emp_ssl(_CIFAR10), projector_width=4096),
    # a CPU core, 38 s; kNN .392 (n 3, std .013), linear .463 (.010)
    "cifar-small-barlow": replace(_CIFAR_SMALL, method="barlow"),
    # a CPU core, 40 s; kNN .384 (n 3, std .004), linear .456 (.012)
    "cifar-small-barlow-4-views": replace(_CIFAR_SMALL, method="barlow", views=4, epochs=6),
    # a CPU core, 38 s; kNN .389 (n 3, std .005), linear .463 (.010)
    "cifar-small-vicreg": replace(_CIFAR_SMALL, method="vicreg"),
    # a CPU core, 40 s; kNN .386 (n 3, std .004), linear .459 (.005)
    "cifar-small-vicreg_exp": replace(_CIFAR_SMALL, method="vicreg_exp", cov_coeff=10.0),
    # a CPU core, 43 s; kNN .393 (n 3, std .003), linear .471 (.002)
    "cifar-small-vicreg_ctr": replace(_CIFAR_SMALL, method="vicreg_ctr", cov_coeff=10.0),
    # a CPU core, 47 s; kNN .445 (n 3, std .003), linear .480 (.003)
    "cifar-small-simclr": replace(_CIFAR_SMALL, method="simclr"),
    # a CPU core, 42 s; kNN .439 (n 3, std .005), linear .481 (.009)
    "cifar-small-simclr_abs": replace(_CIFAR_SMALL, method="simclr_abs"),
    # a CPU core, 46 s; kNN .448 (n 3, std .007), linear .482 (.006)
    "cifar-small-simclr_sq": replace(_CIFAR_SMALL, method="simclr_sq"),
    # a CPU core, 41 s; kNN .414 (n 3, std .004), linear .459 (.005)
    "cifar-small-spectral": replace(_CIFAR_SMALL, method="spectral"),
    # a CPU core, 35 s; kNN .404 (n 3, std .010), linear .422 (.012)
    "cifar-small-emp_ssl": replace(_emp_ssl(_CIFAR_SMALL), projector_width=512, projector_layers=3),
    # a CPU core, 94 s; kNN .369 (n 3, std .007), linear .429 (.007)
    "cifar-small-diet": replace(_CIFAR_SMALL, method="diet", epochs=24, lr=2e-3),
    # a CPU core, 85 s; kNN .399 (n 3, std .008), linear .454 (.003)
    "cifar-small-sdiet": replace(_CIFAR_SMALL, method="sdiet", epochs=24, lr=2e-3),
    # a CPU core, 38 s; kNN .448 (n 3, std .003), linear .486 (.003)
    "cifar-small-pal": replace(_CIFAR_SMALL, method="simclr", oracle="labels", oracle_share=0.1),
    # a CPU core, 41 s; kNN .447 (n 3, std .001), linear .484 (.003)
    "cifar-small-pal-queries": replace(
        _CIFAR_SMALL, method="simclr", oracle="queries", oracle_queries=2000
    ),
    # a folder of images, a small net for CPUs: not measured yet
    "barlow-cpu": replace(_CPU_PHOTOS, method="barlow", lambd=0.01),
    "diet-cpu": replace(_CPU_PHOTOS, method="diet", views=1),
    # a folder of images, a GPU: not measured yet
    "barlow": Config(method="barlow", lambd=0.0051),
    "diet": Config(method="diet", views=1),
    "vicreg": Config(method="vicreg", cov_coeff=1.0),
    "simclr": Config(method="simclr", projector_width=2048, projector_layers=2),
}


def find_recipe(name: str) -> Config:
    """The recipe's Config; ValueError lists the recipes there are."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
