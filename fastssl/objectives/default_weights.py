"""Default weights of decorrelation by the projector's width and the number of views.

From the runs behind arXiv:2312.10725 (configs and sweeps in its repository, CIFAR-10, ResNet-50):
the smaller the projector, the stronger the constraint, about as 1 / width.
"""

import bisect
import math

# Barlow Twins' lambd by (minimum views, width). Its code standardises each column and sums over all
# off-diagonal entries as ours does, so the weight means the same. Two views: the sweep over widths.
LAMBD: dict[int, dict[int, float]] = {
    2: {
        64: 0.04,
        128: 0.04,
        256: 0.02,
        512: 0.01,
        1024: 0.002,
        2048: 0.001,
        4096: 0.0004,
        8192: 0.0008,
    },
    4: {256: 0.01, 8192: 0.0004},
    8: {256: 0.01, 8192: 0.0004},
}
# VICReg's weight of invariance and variance beside a covariance weight of 1, any number of views.
# Both divide the covariance term by D; its variance term counts twice ours.
VICREG: dict[int, float] = {256: 25.0, 8192: 750.0}


def default_lambd(width: int, views: int) -> float:
    """Barlow Twins' off-diagonal weight for a projector of `width` and that many views."""
    return _interpolate(LAMBD[max(least for least in LAMBD if least <= max(views, 2))], width)


def default_cov_coeff(width: int, sim_coeff: float) -> float:
    """VICReg's covariance weight for a projector of `width`, beside the invariance weight given."""
    return sim_coeff * _interpolate({d: 1 / weight for d, weight in VICREG.items()}, width)


def _interpolate(table: dict[int, float], width: int) -> float:
    """The table's value at `width`: a power law between its widths, 1 / width outside them."""
    widths = sorted(table)
    if width <= widths[0] or width >= widths[-1]:
        end = widths[0] if width <= widths[0] else widths[-1]
        return table[end] * end / width
    right = bisect.bisect_right(widths, width)
    low, high = widths[right - 1], widths[right]
    share = math.log(width / low) / math.log(high / low)
    return table[low] ** (1 - share) * table[high] ** share
