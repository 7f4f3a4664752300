"""Fused losses for self-supervised learning. Needs torch and triton only."""

from fastssl_kernels.diet import DIETHead
from fastssl_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["DIETHead", "linear_cross_entropy"]
