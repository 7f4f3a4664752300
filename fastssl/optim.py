"""Optimizers and their parameter groups."""

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fastssl.config import Config


def parameter_groups(
    modules: list[nn.Module], weight_decay: float, bias_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Weights with decay; vectors (biases, normalisation layers) without, at `bias_lr` times the
    rate. Each group's factor on the rate is its "lr_scale".

    Parameters that do not require gradients (a fused head's) are in neither.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": weight_decay,
            "lr_scale": 1.0,
        },
        {
            "params": [p for p in parameters if p.ndim <= 1],
            "weight_decay": 0.0,
            "lr_scale": bias_lr,
        },
    ]


def build_optimizer(config: Config, modules: list[nn.Module]) -> Optimizer:
    """AdamW, SGD or LARS over the modules' parameters.

    LARS (arXiv:1708.03888) adapts weights and leaves vectors to plain momentum, undecayed, as the
    code of Barlow Twins, VICReg and EMP-SSL. For a weight w with gradient g the step is that of SGD
    on q (g + decay w), q = eta |w| / (|g| + decay |w|), or 1 where |w| or |g| is 0; lars_clip
    takes min(q / lr, 1). Barlow Twins' code divides by |g + decay w| instead, which differs by no
    more than decay |w| / |g| of the step.
    """
    c = config
    groups = parameter_groups(modules, c.weight_decay, c.bias_lr)
    if c.optimizer == "adamw":
        return AdamW(groups, lr=c.lr, fused=True)
    if c.optimizer == "sgd":
        return _with_zero_momentum(
            SGD(groups, lr=c.lr, momentum=c.momentum, nesterov=c.nesterov, fused=True)
        )
    from timm.optim import Lars

    for group, adapt in zip(groups, (True, False), strict=True):
        group["always_adapt"] = adapt  # else a decay of 0 would disable adaptation
    return Lars(
        groups,
        lr=c.lr,
        momentum=c.momentum,
        nesterov=c.nesterov,
        trust_coeff=c.lars_eta,
        trust_clip=c.lars_clip,
    )


def _with_zero_momentum(optimizer: SGD) -> SGD:
    """`optimizer` with momentum buffers of zero, which are equivalent to none: torch leaves them
    uninitialised where the first step is skipped for a non-finite gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
