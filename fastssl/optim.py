"""Optimizers and their parameter groups."""

import re
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fastssl.config import Config

# Names of positions, tokens, tables of biases, and gains, in timm's models and elsewhere.
_UNDECAYED = re.compile(
    r"(^|_)(pos|position|token|rel|relative|bias|biases|gain|gamma|alpha|beta|scale|temperature"
    r"|latent)s?\d*(_|$)"
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    modules: list[nn.Module], weight_decay: float, bias_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Weights with decay; the parameters that `undecayed` finds without, at `bias_lr` times the
    rate. Each group's factor on the rate is its "lr_scale".

    Parameters that do not require gradients (a fused head's) are in neither.
    """
    exempt = {id(p) for module in modules for p in undecayed(module).values()}
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in parameters if id(p) not in exempt],
            "weight_decay": weight_decay,
            "lr_scale": 1.0,
        },
        {
            "params": [p for p in parameters if id(p) in exempt],
            "weight_decay": 0.0,
            "lr_scale": bias_lr,
        },
    ]


def undecayed(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters, by name, that weight decay must not pull towards zero:

    - vectors and scalars, and whatever a normalisation layer has: biases, gains;
    - gains of any shape: one axis longer than 1, such as a layer scale (C, 1, 1), except the
      weight of a linear or convolutional layer;
    - position embeddings, tokens, tables of relative positions or attention biases, temperatures
      and gains, known by their names;
    - what the module or any part of it names in a method `no_weight_decay()`, as timm's models do:
      names relative to that part, `*` for any characters.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in part.named_parameters(recurse=False):
            if _is_exempt(part, name, parameter):
                found[dot + name] = parameter
        patterns = part.no_weight_decay() if hasattr(part, "no_weight_decay") else ()
        for name, parameter in part.named_parameters() if patterns else ():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                found[dot + name] = parameter
    return found


def _is_exempt(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of `owner` is undecayed by its shape, its name or its owner."""
    if parameter.ndim <= 1 or isinstance(owner, _NORMS):
        return True
    if name == "weight" and isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):
        return False
    return parameter.numel() == max(parameter.shape) or bool(_UNDECAYED.search(name))


def build_optimizer(config: Config, modules: list[nn.Module]) -> Optimizer:
    """AdamW, SGD or LARS over the modules' parameters.

    LARS (arXiv:1708.03888) adapts weights and leaves what is undecayed to plain momentum, as the
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
