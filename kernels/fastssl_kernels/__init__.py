"""Fused losses for self-supervised learning. Needs torch and triton only."""

from fastssl_kernels.barlow_twins import barlow_twins_loss, barlow_twins_loss_reference
from fastssl_kernels.diet import DIETHead
from fastssl_kernels.linear_cross_entropy import linear_cross_entropy
from fastssl_kernels.vicreg import vicreg_loss, vicreg_loss_reference

__all__ = [
    "DIETHead",
    "barlow_twins_loss",
    "barlow_twins_loss_reference",
    "linear_cross_entropy",
    "vicreg_loss",
    "vicreg_loss_reference",
]
