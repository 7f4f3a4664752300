"""What the fused losses cost beside eager, torch.compile and peers, most telling cases first."""

from collections.abc import Iterator

from bench.measure import Case


def cases(device: str) -> Iterator[Case]:
    """Every case this device can run. A peer that is not installed is no variant, and no error."""
    from bench import covariance, softmax

    yield from covariance.cases(device)
    yield from softmax.cases(device)
