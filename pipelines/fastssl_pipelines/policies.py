"""The published augmentation policies: each function returns a tuple of `View`, one per view.

Each docstring names its source; where code and paper differ, the code that produced the published
numbers is followed. `dataclasses.replace(view, dtype=torch.bfloat16, channels_last=True)` adapts a
view to a trainer.
"""

from collections.abc import Callable
from dataclasses import replace

from fastssl_pipelines.spec import View

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HALF = (0.5, 0.5, 0.5)

Views = tuple[View, ...]


def simclr(views: int = 2, size: int = 224, strength: float = 1.0) -> Views:
    """SimCLR on ImageNet: arXiv:2002.05709, appendix A; google-research/simclr `data_util.py`
    (bicubic)."""
    b, h = 0.8 * strength, 0.2 * strength
    view = View(
        size=size,
        interpolation="bicubic",
        jitter=(b, b, b, h),
        jitter_p=0.8,
        gray=0.2,
        blur=0.5,
    )
    return (view,) * views


def simclr_cifar(views: int = 2, size: int = 32) -> Views:
    """SimCLR on CIFAR: arXiv:2002.05709, appendix B.9 (strength 0.5, no blur)."""
    view = View(
        size=size,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        gray=0.2,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )
    return (view,) * views


def mocov2(views: int = 2, size: int = 224) -> Views:
    """MoCo v2 (arXiv:2003.04297) and SimSiam (arXiv:2011.10566, appendix A)."""
    view = View(
        size=size,
        scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        gray=0.2,
        blur=0.5,
    )
    return (view,) * views


def byol(size: int = 224) -> Views:
    """BYOL (arXiv:2006.07733, appendix B): views that differ, blurred with p = 1 and 0.1, the
    second solarized.

    Also Barlow Twins (arXiv:2103.03230), VICReg (`augmentations.py` of its repository) and MoCo v3.
    Their Pillow blur approximates the Gaussian that is used here by three box filters.
    """
    view = View(
        size=size,
        interpolation="bicubic",
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray=0.2,
    )
    return (replace(view, blur=1.0), replace(view, blur=0.1, solarize=0.2))


def barlow_twins(size: int = 224) -> Views:
    """Barlow Twins (arXiv:2103.03230, section 2.2): the views of BYOL."""
    return byol(size)


def vicreg(size: int = 224) -> Views:
    """VICReg (arXiv:2105.04906, appendix C.1; `augmentations.py` of its repository): the views of
    BYOL."""
    return byol(size)


def swav(local: int = 6, size: int = 224) -> Views:
    """SwAV (arXiv:2006.09882, appendix A): 2 x 224 of .14-1 and `local` x 96 of .05-.14.

    size: of the two global views; the local ones keep the published ratio of sides.
    """
    big = View(
        size=size,
        scale=(0.14, 1.0),
        jitter=(0.8, 0.8, 0.8, 0.2),
        jitter_p=0.8,
        gray=0.2,
        blur=0.5,
    )
    small = replace(big, size=_local_side(96, size), scale=(0.05, 0.14))
    return (big,) * 2 + (small,) * local


def dino(local: int = 8, size: int = 224) -> Views:
    """DINO (arXiv:2104.14294; `main_dino.py`): 2 x 224 of .4-1 and `local` x 96 of .05-.4, bicubic.

    size: of the two global views; the local ones keep the published ratio of sides.
    """
    base = View(
        size=size,
        scale=(0.4, 1.0),
        interpolation="bicubic",
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray=0.2,
    )
    return (
        replace(base, blur=1.0),
        replace(base, blur=0.1, solarize=0.2),
        *(replace(base, size=_local_side(96, size), scale=(0.05, 0.4), blur=0.5),) * local,
    )


def dinov2(local: int = 8, local_size: int | None = None, size: int = 224) -> Views:
    """DINOv2 (arXiv:2304.07193; `data/augmentations.py`) as its models were trained: 2 x 224 of
    .32-1 and `local` x 98 of .05-.32.

    size: of the two global views. local_size: None keeps the published ratio of 98 to 224.

    Its blur class passes 1 - p to RandomApply (facebookresearch/dinov2 PR 411), so that the
    configured probabilities 1, 0.1 and 0.5 became 0, 0.9 and 0.5, which are used here.
    """
    side = _local_side(98, size) if local_size is None else local_size
    base = View(
        size=size,
        scale=(0.32, 1.0),
        interpolation="bicubic",
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray=0.2,
    )
    return (
        replace(base, blur=0.0),
        replace(base, blur=0.9, solarize=0.2),
        *(replace(base, size=side, scale=(0.05, 0.32), blur=0.5),) * local,
    )


def emp_ssl(views: int = 20, size: int = 32) -> Views:
    """EMP-SSL on CIFAR (arXiv:2304.03977): 20 to 200 patches of 16 x 16 px, resized to 32 px.

    The repository crops a fixed 25 % of the area at ratio 1, which on 32 x 32 images is that patch.
    """
    view = View(
        size=size,
        patch=16,
        jitter=(0.4, 0.4, 0.4, 0.2),
        jitter_p=0.8,
        gray=0.2,
        blur=0.1,
        solarize=0.1,
        mean=HALF,
        std=HALF,
    )
    return (view,) * views


def diet_cifar(views: int = 1, size: int = 32) -> Views:
    """DIET on CIFAR (arXiv:2302.10260): jitter with p = .3, blur with p = .2, and random
    erasing."""
    view = View(
        size=size,
        jitter=(0.4, 0.4, 0.4, 0.2),
        jitter_p=0.3,
        gray=0.2,
        blur=0.2,
        erase=0.25,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )
    return (view,) * views


def multiview_cifar(views: int = 8, size: int = 32) -> Views:
    """The CIFAR policy of "Harnessing small projectors and multiple views" (arXiv:2312.10725), as
    its code ran it.

    SimCLR's for CIFAR, but with hue 0: the loader behind its published numbers drops the hue.
    """
    return tuple(replace(view, jitter=(0.4, 0.4, 0.4, 0.0)) for view in simclr_cifar(views, size))


def multiview_stl(views: int = 8, size: int = 64) -> Views:
    """The STL-10 policy of arXiv:2312.10725: crops of .2-1 at 64 px, grayscale with p = .1."""
    return tuple(replace(view, scale=(0.2, 1.0), gray=0.1) for view in multiview_cifar(views, size))


def mae(size: int = 224) -> Views:
    """MAE (arXiv:2111.06377, appendix A.1): one crop of .2-1, bicubic, and a flip."""
    return (View(size=size, scale=(0.2, 1.0), interpolation="bicubic"),)


def digits(views: int = 2, size: int = 16) -> Views:
    """Ours, unpublished, for small grayscale digits (scikit-learn's 8 x 8 in three equal channels):
    no flip, no hue."""
    view = View(
        size=size,
        scale=(0.4, 1.0),
        flip=0.0,
        jitter=(0.4, 0.4, 0.0, 0.0),
        jitter_p=0.8,
        mean=HALF,
        std=HALF,
    )
    return (view,) * views


_PUBLISHED = (
    simclr, simclr_cifar, mocov2, byol, barlow_twins, vicreg, swav, dino, dinov2, emp_ssl,
    diet_cifar, multiview_cifar, multiview_stl, mae, digits,
)  # fmt: skip
POLICIES: dict[str, Callable[..., Views]] = {policy.__name__: policy for policy in _PUBLISHED}
MULTI_CROP = frozenset({"swav", "dino", "dinov2"})  # two global views, the others local
FIXED = frozenset({"byol", "barlow_twins", "vicreg", "mae"})  # the number of views is published


def policy_views(name: str, views: int, size: int) -> Views:
    """The policy called `name` with `views` views in all, whose full-size ones have side `size`.

    Multi-crop policies have two full-size views; the sides of the others scale with `size`.
    ValueError where there is no such policy, or where it cannot have `views` views.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown --policy {name!r}; there are {', '.join(POLICIES)}")
    policy = POLICIES[name]
    if name in MULTI_CROP:
        if views < 2:
            raise ValueError(f"--policy {name} has 2 global views, --views is {views}: at least 2")
        return policy(local=views - 2, size=size)
    chosen = policy(size=size) if name in FIXED else policy(views=views, size=size)
    if len(chosen) != views:
        raise ValueError(
            f"--policy {name} has {len(chosen)} views, --views is {views}; make them equal"
        )
    return chosen


def _local_side(published: int, size: int) -> int:
    """The side of a local view where the global side is `size` in place of the published 224."""
    return max(1, round(published * size / 224))
