"""The images of a data set that cannot be read: each logged once with its reason, up to a quota."""

import logging
from typing import Literal

log = logging.getLogger("fastssl_pipelines")

OnCorrupt = Literal["skip", "stop"]
QUOTA = 0.01  # share of the data set


class UnreadableDataError(ValueError):
    """More images are unreadable than the caller accepts."""


class UnreadableImages:
    """The unreadable images of a data set: `reasons[name]` is the reason.

    on_corrupt: "skip" leaves an image out of its batch, until more than the share `quota` of the
    data is unreadable; "stop" raises UnreadableDataError at the first one.
    """

    def __init__(self, total: int, on_corrupt: OnCorrupt = "skip", quota: float = QUOTA) -> None:
        if on_corrupt not in ("skip", "stop"):
            raise ValueError(f"on_corrupt is {on_corrupt!r}: choose 'skip' or 'stop'")
        if not 0 <= quota <= 1:
            raise ValueError(f"quota is {quota}: give the share of the data that may be unreadable")
        self.total, self.on_corrupt, self.quota = total, on_corrupt, quota
        self.reasons: dict[str, str] = {}

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
