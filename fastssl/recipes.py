"""Named Configs. Above each: command, hardware, wall clock, accuracy to expect (n, std)."""

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
    "digits-diet": replace(_DIGITS, method="diet", views=2),
    "digits-barlow": replace(_DIGITS, method="barlow", lambd=0.02),
    "cifar10-diet": replace(
        _CIFAR10, method="diet", policy="diet_cifar", views=1, epochs=1000, batch_size=2048, lr=8e-3
    ),
    "cifar10-barlow": replace(_CIFAR10, method="barlow", lambd=0.001),
    "cifar10-vicreg": replace(_CIFAR10, method="vicreg"),
    "barlow-cpu": replace(_CPU_PHOTOS, method="barlow", lambd=0.01),
    "diet-cpu": replace(_CPU_PHOTOS, method="diet", views=1),
    "barlow": Config(method="barlow"),
    "diet": Config(method="diet", views=1),
    "vicreg": Config(method="vicreg"),
}


def find_recipe(name: str) -> Config:
    """The recipe's Config; ValueError lists the recipes there are."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
