"""The images of a data set that cannot be read, or only with damage: each logged once with its
reason, up to a quota."""

import logging
from collections.abc import Mapping
from typing import Literal

log = logging.getLogger("fastssl_pipelines")

OnCorrupt = Literal["skip", "stop"]
OnDamage = Literal["keep", "skip"]
QUOTA = 0.01  # share of the data set


class UnreadableError(ValueError):
    """One image that cannot be read, and why; the text is never empty."""


def describe(error: BaseException) -> str:
    """What an exception says, or its name: a MemoryError has no text."""
    return str(error) or type(error).__name__


class UnreadableDataError(ValueError):
    """More images are unreadable than the caller accepts."""


class UnreadableImages:
    """The unreadable images of a data set: `reasons[name]` is the reason; `damaged[name]` says what
    is wrong with an image that was read nevertheless.

    on_corrupt: "skip" leaves an image out of its batch, until more than the share `quota` of the
    data is unreadable; "stop" raises UnreadableDataError at the first one. on_damage: "keep" uses
    the pixels that a decoder makes of a damaged image, "skip" counts it as unreadable. lost:
    images known to be unreadable from the start, which `total` includes.
    """

    def __init__(
        self,
        total: int,
        on_corrupt: OnCorrupt = "skip",
        quota: float = QUOTA,
        on_damage: OnDamage = "keep",
        lost: Mapping[str, str] | None = None,
    ) -> None:
        if on_corrupt not in ("skip", "stop"):
            raise ValueError(f"on_corrupt is {on_corrupt!r}: choose 'skip' or 'stop'")
        if not 0 <= quota <= 1:
            raise ValueError(f"quota is {quota}: give the share of the data that may be unreadable")
        if on_damage not in ("keep", "skip"):
            raise ValueError(f"on_damage is {on_damage!r}: choose 'keep' or 'skip'")
        self.total, self.on_corrupt, self.quota = total, on_corrupt, quota
        self.on_damage = on_damage
        self.reasons: dict[str, str] = {}
        self.damaged: dict[str, str] = {}
        for name, reason in (lost or {}).items():
            self.add(name, reason)

    def keeps(self, name: str, damage: str) -> bool:
        """Whether an image is to be used, of which a decoder says `damage`, "" for a clean one; the
        others are recorded."""
        if not damage:
            return True
        if self.on_damage == "skip":
            self.add(name, f"damaged: {damage}")
            return False
        if name not in self.damaged:
            self.damaged[name] = damage
            log.warning("damaged, used as decoded: %s (%s)", name, damage)
        return True

    def add(self, name: str, reason: str) -> None:
        """Record one unreadable image. UnreadableDataError as `on_corrupt` and `quota` require."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        what = f"{name} cannot be read as an image ({reason})"
        if self.on_corrupt == "stop":
            raise UnreadableDataError(f"{what}; repair or remove it, or leave such images out")
        if len(self.reasons) > self.quota * self.total:
            count = f"{len(self.reasons)} of {self.total} images are unreadable"
            quota = f"more than the quota of {self.quota:.2%}"
            remedy = "repair or remove it, and what else `fastssl doctor` lists"
            raise UnreadableDataError(f"{what}; {count}, {quota}; {remedy}")
        log.warning("left out: %s", what)
