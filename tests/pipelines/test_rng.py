"""Philox against the authors' vectors, and the order of an epoch."""

import pytest
import torch

from fastssl_pipelines import rng

stats = pytest.importorskip("scipy.stats")


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([v]) for v in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known-answer tests for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    low, high, view, draw = counter
    signed = high - (1 << 32) if high >> 31 else high
    got = rng.philox(*words(low | (signed << 32), view, draw), *key)
    assert tuple(int(word) for word in got) == expected


def test_every_argument_matters():
    base = {"index": 7, "view": 1, "draw": 2, "seed": 3, "epoch": 4}
    seen = {tuple(int(w) for w in rng.philox(*words(*base.values())))}
    for name in base:
        changed = base | {name: base[name] + 1}
        seen.add(tuple(int(w) for w in rng.philox(*words(*changed.values()))))
    seen.add(tuple(int(w) for w in rng.philox(*words(7 + 2**32, 1, 2, 3, 4))))
    assert len(seen) == len(base) + 2


def test_permutation_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = [rng.permutation(1000, s, e) for s, e in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0], rng.permutation(1000, 0, 0))


def test_permutations_are_uniform():
    orders = torch.stack([rng.permutation(4, 5, epoch) for epoch in range(6000)])
    code = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = code.unique(return_counts=True)[1].numpy()
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4
