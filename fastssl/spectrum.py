"""Label-free quality of features, from their spectrum.

Shapes: M samples, D dimensions.
"""

import torch
from torch import Tensor


def rankme(z: Tensor, eps: float = 1e-7) -> float:
    """RankMe of features or embeddings (M, D): a real number from 1 to min(M, D), computed in fp64.

    exp(-sum_k p_k log p_k) with p_k = sigma_k / ||sigma||_1 + eps, of the singular values sigma
    (arXiv:2210.02885, eq. 1). It compares runs of one method; it says nothing between methods.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"rankme: z has shape {tuple(z.shape)}; wanted (M, D) with M >= 2")
    z = z.detach().double()
    gram = z.T @ z if z.shape[1] <= len(z) else z @ z.T
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = sigma / sigma.sum() + eps
    return float(torch.exp(-(p * p.log()).sum()))
