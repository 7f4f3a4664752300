"""InfoNCE and NT-Xent: a softmax with the batch as its classes, no similarity matrix.

    NT-Xent   mean_i [ log sum_{j != i} exp(f(c_ij) / t) - mean_{p in P(i)} f(c_ip) / t ]
    InfoNCE   mean_i [ log sum_j exp(c_ij / t) - c_ii / t ],   averaged with the same over columns

c is the cosine similarity, of all views of all images (arXiv:2002.05709, eq. 1; P(i) are the other
views of i's image, arXiv:2004.11362, eq. 2) or of queries and keys (arXiv:1807.03748, eq. 4;
symmetric as in arXiv:2103.00020, Fig. 3). f is the identity, or the square or the absolute value,
for which the criterion is sample-contrastive (arXiv:2206.02574, section 3).

Shapes: V views, N batch, M keys, D embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl_kernels._autograd import refuse_forward_mode
from fastssl_kernels._precision import accumulation_dtype
from fastssl_kernels._similarity import KINDS, self_similarity_lse, similarity_lse
from fastssl_kernels._validation import checked, stack_views
from fastssl_kernels.distributed import (
    Shard,
    all_gather_inputs,
    all_gather_rows,
    all_reduce_lse,
    all_reduce_with_grad,
    group_name,
    require_equal_rows,
    scale_grad_by_world_size,
)


def nt_xent_loss_reference(
    views: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.5,
    similarity: str = "cosine",
) -> Tensor:
    """NT-Xent in eager PyTorch: any device, any dtype. (V, N, D) -> ()"""
    z = F.normalize(torch.stack(tuple(views)), dim=2)
    count, n = z.shape[:2]
    s = _shape(z.flatten(0, 1) @ z.flatten(0, 1).T, similarity) / temperature  # (V N, V N)
    is_self = torch.eye(count * n, dtype=torch.bool, device=z.device)
    image = torch.arange(n, device=z.device).repeat(count)
    positive = (image == image[:, None]) & ~is_self
    lse = s.masked_fill(is_self, -torch.inf).logsumexp(1)
    return (lse - s.where(positive, 0).sum(1) / (count - 1)).mean()


def info_nce_loss_reference(
    queries: Tensor, keys: Tensor, *, temperature: float | Tensor, symmetric: bool = True
) -> Tensor:
    """InfoNCE in eager PyTorch: any device, any dtype. (N, D), (M, D) -> ()"""
    s = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    label = torch.arange(len(queries), device=queries.device)
    rows = F.cross_entropy(s, label)
    return (rows + F.cross_entropy(s.T, label)) / 2 if symmetric else rows


def nt_xent_loss(
    views: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.5,
    similarity: str = "cosine",
    group: Any = None,
) -> Tensor:
    """NT-Xent (SimCLR's loss) of V >= 2 views, (V, N, D) or V tensors (N, D) -> (), float32.

    Every other row is a negative or a positive; with V > 2 the positives' terms are averaged
    outside the logarithm. Rows are normalised here. float64 for float64 views. One image has the
    loss that the formula gives, 0 for V = 2; none have NaN, the mean of no rows.

    temperature: a positive number, or a tensor (), which gets its gradient. A tensor that is not
        positive is a ValueError on a CPU, a device assert on CUDA.
    similarity: "cosine", or its "squared" or "absolute" value (arXiv:2206.02574).
    group: ranks whose batches are contrasted together, each of N rows; else every rank raises. The
        loss is that of the global batch on every rank; gradients carry the factor of the world size
        that data-parallel averaging removes.

    ValueError on other shapes, dtypes, temperatures or similarities, a group without this rank.
    """
    z = stack_views(views, "nt_xent_loss")
    temperature = check_options(temperature, similarity, "nt_xent_loss")
    return signed_nt_xent(z, temperature, similarity, group, "nt_xent_loss")


def signed_nt_xent(
    z: Tensor, temperature: float | Tensor, similarity: str, group: Any, name: str
) -> Tensor:
    """`nt_xent_loss` of views (V, N, D), for any temperature that is a number but 0."""
    group_name(group, name)
    refuse_forward_mode(name, "nt_xent_loss_reference", z, temperature)
    require_equal_rows(z, group, name)
    views, n, _ = z.shape
    shard = Shard.of_batch(views * n, group)
    repels = not isinstance(temperature, Tensor) and temperature < 0
    factor = _factor(-temperature if repels else temperature, similarity)
    rows = (_normalised(z) * factor).flatten(0, 1)
    queries = scale_grad_by_world_size(rows, shard.world) if shard.world > 1 else rows
    queries, keys = (_product_operand(x, z) for x in (queries, rows))
    kind = KINDS[similarity]
    if shard.world == 1 and not repels:
        lse, lse_lo, positive = self_similarity_lse(queries, n, kind)
    else:
        all_keys = all_gather_inputs(-keys if repels else keys, shard)
        first = shard.first
        lse, lse_lo, _, _, positive = similarity_lse(queries, all_keys, first, n, True, kind, False)
    losses = (lse - positive / (views - 1)) + lse_lo  # (V N,)
    return all_reduce_with_grad(losses.sum(), shard) / shard.classes


def info_nce_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = True,
    group: Any = None,
) -> Tensor:
    """InfoNCE of queries (N, D), each with the key of the same row as positive -> (), float32.

    Keys (M, D): M = N, or with symmetric=False M >= N, the rows from N on being further negatives
    (a queue). Rows are normalised here. float64 for float64 inputs. temperature and group are those
    of nt_xent_loss; in a group every rank has the same number of queries and keys, M = N, else
    every rank raises. NaN of no queries, as the mean of no rows.

    ValueError on other shapes, dtypes or temperatures, a group without this rank.
    """
    _check_pair(queries, keys, symmetric, group)
    temperature = check_options(temperature, "cosine", "info_nce_loss")
    group_name(group, "info_nce_loss")
    refuse_forward_mode("info_nce_loss", "info_nce_loss_reference", queries, keys, temperature)
    require_equal_rows(queries, group, "info_nce_loss")
    shard = Shard.of_batch(len(queries), group)
    factor = _factor(temperature, "cosine")
    q, k = _normalised(queries) * factor, _normalised(keys) * factor
    if shard.world > 1:
        q = scale_grad_by_world_size(q, shard.world)
    q, k = _product_operand(q, queries), _product_operand(k, keys)
    all_keys = all_gather_inputs(k, shard)
    row, row_lo, col, col_lo, positive = similarity_lse(
        q, all_keys, shard.first, len(q), False, KINDS["cosine"], symmetric
    )
    rows = all_reduce_with_grad(((row - positive) + row_lo).sum(), shard)
    if not symmetric:
        return rows / shard.classes
    col, col_lo = all_reduce_lse(col, col_lo, [], shard)  # of all ranks' keys
    fixed = positive.detach()  # in value, each column's; in gradient, this rank's
    columns = ((col - all_gather_rows(fixed, shard)) + col_lo).sum()
    columns = columns - all_reduce_with_grad((positive - fixed).sum(), shard)
    return (rows + columns) / (2 * shard.classes)


def bank_loss(queries: Tensor, keys: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """MoCo's loss (arXiv:1911.05722, eq. 1) -> (): each query (N, D) with its key (N, D) against
    the rows of `bank` (M, D), which have length 1 and get no gradient.

    temperature: any number but 0.
    """
    name = "NTXentLoss with a memory bank"
    refuse_forward_mode(name, "info_nce_loss_reference", queries, keys)
    factor = abs(temperature) ** -0.5
    q, k = _normalised(queries) * factor, _normalised(keys) * factor
    if temperature < 0:
        k, bank = -k, -bank
    positive = (q * k).sum(1)  # (N,)
    operand, rows = _product_operand(q, queries), _product_operand(bank.to(q) * factor, queries)
    no_positive = len(bank)  # where positives among the keys would begin
    lse, lse_lo, _, _, _ = similarity_lse(
        operand, rows, no_positive, max(len(q), 1), False, KINDS["cosine"], False
    )
    return F.softplus((lse - positive) + lse_lo, threshold=50).mean()


def _normalised(z: Tensor) -> Tensor:
    """Rows of norm 1, in float32 or float64."""
    return F.normalize(z.to(accumulation_dtype(z)), dim=-1)


def _product_operand(x: Tensor, z: Tensor) -> Tensor:
    """Normalised rows x as the product reads them: on a GPU in the dtype of the embeddings z, which
    are rounded to it already, so that autocast changes nothing."""
    return x.to(z.dtype if z.is_cuda else x.dtype).contiguous()


def _factor(temperature: float | Tensor, similarity: str) -> float | Tensor:
    """What both sides are multiplied by so that f of their product is f(cosine) / temperature."""
    return temperature ** (-0.25 if similarity == "squared" else -0.5)


def _shape(s: Tensor, similarity: str) -> Tensor:
    return {"cosine": s, "squared": s.square(), "absolute": s.abs()}[similarity]


def check_options(temperature: float | Tensor, similarity: str, name: str) -> float | Tensor:
    """The temperature; ValueError where it is not positive or the similarity unknown."""
    if similarity not in KINDS:
        raise ValueError(f"{name}: similarity={similarity!r}; choose one of {list(KINDS)}")
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"{name}: temperature is {temperature}; it must be positive")
        return temperature
    if temperature.ndim or not temperature.is_floating_point():
        shape = f"{tuple(temperature.shape)} {temperature.dtype}"
        raise ValueError(f"{name}: temperature is {shape}; wanted a number or a tensor ()")
    value = temperature.detach()
    valid = checked(value, value > 0, f"{name}: temperature is a tensor that is not positive") > 0
    return temperature.where(valid, torch.nan)  # which keeps the check in a compiled graph


def _check_pair(queries: Tensor, keys: Tensor, symmetric: bool, group: Any) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"info_nce_loss: {what}")

    shapes = f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)}"
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        refuse(f"got {shapes}; wanted (N, D) and (M, D)")
    if queries.shape[1] == 0:
        refuse(f"got {shapes}; wanted D >= 1")
    if len(keys) < len(queries) or (len(keys) > len(queries) and (symmetric or group is not None)):
        refuse(
            f"got {shapes}; wanted as many keys as queries, or with symmetric=False and no group "
            "more keys, the further ones being negatives"
        )
    if queries.dtype != keys.dtype or not queries.is_floating_point():
        refuse(f"got dtypes {queries.dtype} and {keys.dtype}; wanted one floating-point dtype")
    if queries.device != keys.device:
        refuse(f"queries are on {queries.device}, keys on {keys.device}; move them to one device")
