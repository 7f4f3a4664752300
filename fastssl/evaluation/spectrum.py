"""Label-free quality of features and embeddings, from their spectrum: RankMe, effective rank,
alpha-ReQ, LiDAR.

Each compares runs of ONE method on one data set. None compares methods, and a high
rank is necessary for good features, not sufficient (arXiv:2210.02885). On VICReg after 100 epochs
RankMe's rank correlation with the probe was 0.32, LiDAR's 0.92 (arXiv:2312.04000).

Shapes: M samples, D dimensions, Q views of one image.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional

CONSTANT = 1e-6  # relative variation that counts as constant: rounding in float32
NULL = 1e-12  # eigenvalues below this fraction of the largest are rounding
FIT_RANKS = (4, 100)  # alpha-ReQ: first and last eigenvalue of the fit


class SpectrumWarning(UserWarning):
    """A criterion was computed, but is less informative than its value suggests."""


def rankme(z: Tensor, eps: float = 1e-7) -> float:
    """RankMe of features or embeddings (M, D): a real number from 1 to min(M, D), computed in fp64;
    0 where z is zero.

    exp(-sum_k p_k log p_k) with p_k = sigma_k / ||sigma||_1 + eps, of the singular values sigma
    (arXiv:2210.02885, eq. 1; 25,600 samples are enough, appendix G). Warns (SpectrumWarning) on
    fewer samples than dimensions; ValueError where z is not (M, D), M >= 2, or not finite.
    """
    _check(z, "rankme")
    if len(z) < z.shape[1]:
        warnings.warn(
            f"RankMe of {len(z)} samples in {z.shape[1]} dimensions: the samples bound it by "
            f"{len(z)}; measure on {10 * z.shape[1]} samples or more, and compare only runs with "
            "as many",
            SpectrumWarning,
            stacklevel=2,
        )
    return entropy_rank(singular_values(z), eps)


def effective_rank(z: Tensor) -> float:
    """Effective rank of the deviations of z (M, D) from their mean, from 1 to min(M - 1, D), in
    fp64; 0 where z is constant.

    exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007). RankMe
    without eps, and blind to the mean, which fills the first direction of features after a ReLU.
    Errors and caveat as for `rankme`.
    """
    _check(z, "effective_rank")
    return entropy_rank(_deviations(z), 0.0)


def alpha_req(z: Tensor) -> float:
    """Decay alpha of the eigenvalues of z's covariance, lambda_j ~ j^-alpha; z (M, D), in fp64;
    inf where fewer than 3 eigenvalues of the fit's range are above rounding.

    alpha-ReQ (Agrawal et al., NeurIPS 2022): well-generalising features have alpha near 1; above, a
    few directions carry everything (collapse), far below, the tail is noise. Least squares of
    log lambda_j on log j with weights 1 / j over j = 4 to 100, as the authors' code fits it; the
    paper does not fix the range. Errors and caveat as for `rankme`.
    """
    _check(z, "alpha_req")
    eigenvalues = _deviations(z).square()
    first, last = FIT_RANKS
    ranks = torch.arange(first, min(last, len(eigenvalues)) + 1, device=z.device)
    ranks = ranks[eigenvalues[ranks - 1] > NULL * eigenvalues[0]].double()
    if len(ranks) < 3:
        return float("inf")
    x, y, weight = ranks.log(), eigenvalues[ranks.long() - 1].log(), 1 / ranks
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return -float((weight * x * y).sum() / (weight * x * x).sum())


def lidar(z: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> float:
    """LiDAR of Q views of M images, z (M, Q, D): a real number from 1 to min(M - 1, D), in fp64;
    0 where the images do not differ.

    exp of the entropy of the eigenvalues of S_w^-1/2 S_b S_w^-1/2, with S_b the covariance of the
    images' means, S_w that of the views around them plus delta I (arXiv:2312.04000, eqs. 1 to 4;
    there M = 1,000 or more and Q = 10 to 50). delta is absolute, so scale matters where the views
    differ by less than it. ValueError where z is not (M >= 2, Q >= 2, D) or not finite; caveat as
    for `rankme`.
    """
    if z.ndim != 3 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(
            f"lidar: z has shape {tuple(z.shape)}; wanted (M, Q, D): M >= 2 images, Q >= 2 views"
        )
    _require_finite(z, "lidar")
    z = z.detach().double()
    m, q, _ = z.shape
    means = z.mean(1)  # (M, D)
    between = means - means.mean(0)
    if _is_constant(between, means):
        return 0.0
    within = (z - means[:, None]).flatten(0, 1)  # (M Q, D)
    scatter = within.T @ within / (m * (q - 1))
    scatter.diagonal().add_(delta)
    # the eigenvalues of S_w^-1/2 S_b S_w^-1/2 are the squares of the singular values of S_b's root
    # times L^-T, where S_w = L L^T
    root = torch.linalg.solve_triangular(torch.linalg.cholesky(scatter), between.T, upper=False)
    return entropy_rank(singular_values(root.T).square(), eps)


def feature_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the deviation of z's unit rows (M, D), times sqrt(D): () float32.

    1 for isotropic rows, 0 where all rows are one (arXiv:2011.10566, section 4.1). A mean direction
    common to all rows, as after a ReLU, lowers it.
    """
    unit = functional.normalize(z.float(), dim=1)
    return unit.std(0, correction=0).mean() * z.shape[1] ** 0.5


def singular_values(z: Tensor) -> Tensor:
    """The min(M, D) singular values of z (M, D), largest first, fp64, from the smaller Gram matrix.

    Below 1e-8 of the largest they are rounding.
    """
    z = z.detach().double()
    gram = z.T @ z if z.shape[1] <= len(z) else z @ z.T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def _deviations(z: Tensor) -> Tensor:
    """Singular values of z without its mean; zeros where that is rounding."""
    z = z.detach().double()
    centred = z - z.mean(0)
    return singular_values(torch.zeros_like(z) if _is_constant(centred, z) else centred)


def _is_constant(centred: Tensor, z: Tensor) -> bool:
    return bool(centred.norm() <= CONSTANT * z.norm())


def entropy_rank(weights: Tensor, eps: float) -> float:
    """exp of the entropy of weights / sum + eps; 0 where all are zero."""
    if not weights.sum() > 0:
        return 0.0
    p = weights / weights.sum() + eps
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def _check(z: Tensor, name: str) -> None:
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"{name}: z has shape {tuple(z.shape)}; wanted (M, D) with M >= 2")
    _require_finite(z, name)


def _require_finite(z: Tensor, name: str) -> None:
    if not torch.isfinite(z).all():
        raise ValueError(f"{name}: z has NaN or infinite values, so its spectrum is undefined")
