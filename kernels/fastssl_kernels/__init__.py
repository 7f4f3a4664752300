"""Fused losses for self-supervised learning. Needs torch and triton only."""

from fastssl_kernels.barlow_twins import barlow_twins_loss, barlow_twins_loss_reference
from fastssl_kernels.coding_rate import coding_rate, coding_rate_reference
from fastssl_kernels.contrastive import (
    info_nce_loss,
    info_nce_loss_reference,
    nt_xent_loss,
    nt_xent_loss_reference,
)
from fastssl_kernels.diet import DIETHead
from fastssl_kernels.duality import (
    dimension_contrastive_loss,
    sample_contrastive_loss,
    vicreg_ctr_loss,
    vicreg_exp_loss,
)
from fastssl_kernels.lightly import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from fastssl_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_lse,
)
from fastssl_kernels.second_moment import second_moment_energy, second_moment_energy_reference
from fastssl_kernels.vicreg import vicreg_loss, vicreg_loss_reference

__all__ = [
    "BarlowTwinsLoss",
    "DIETHead",
    "NTXentLoss",
    "VICRegLoss",
    "barlow_twins_loss",
    "barlow_twins_loss_reference",
    "coding_rate",
    "coding_rate_reference",
    "dimension_contrastive_loss",
    "info_nce_loss",
    "info_nce_loss_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_with_lse",
    "nt_xent_loss",
    "nt_xent_loss_reference",
    "sample_contrastive_loss",
    "second_moment_energy",
    "second_moment_energy_reference",
    "vicreg_ctr_loss",
    "vicreg_exp_loss",
    "vicreg_loss",
    "vicreg_loss_reference",
]
