"""Counter-based random numbers: Philox4x32-10.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is (seed, epoch); the
counter is (sample index, its high word, view, block). So a view is the same for any batch size,
rank, thread, device or resume point, and there is no state to save.

These functions use plain operators on int64, so that torch tensors, numba scalars and Triton blocks
run the same source (`augment/retarget.py`) and agree bit for bit.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
SHUFFLE = WORD  # the `view` of the words that order an epoch


def philox(index, view, block, seed, epoch):  # type: ignore[no-untyped-def]  # tensors, scalars or blocks
    """Four independent 32-bit words, as int64 in [0, 2^32). All arguments int64, >= 0; one
    shape."""
    a = index & 0xFFFFFFFF
    b = (index >> 32) & 0xFFFFFFFF
    c = view
    d = block
    for _ in range(10):
        first = a * 0xD2511F53  # wraps modulo 2^64, which leaves both words right
        second = c * 0xCD9E8D57
        a = ((second >> 32) & 0xFFFFFFFF) ^ b ^ seed
        b = second & 0xFFFFFFFF
        c = ((first >> 32) & 0xFFFFFFFF) ^ d ^ epoch
        d = first & 0xFFFFFFFF
        seed = (seed + 0x9E3779B9) & 0xFFFFFFFF
        epoch = (epoch + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def permutation(count: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """A uniformly random permutation of range(count), a function of (seed, epoch). -> (count,)
    int64"""
    index = torch.arange(count, device=device)
    high, low, _, _ = philox(index, torch.full_like(index, SHUFFLE), index * 0, seed, epoch)
    return torch.argsort((high << 31) | (low >> 1), stable=True)
