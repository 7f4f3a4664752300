"""torch's sample inputs of its cross-entropies, with its references, through ours.

The inputs are those of torch's own tests, in `torch.testing._internal`: of the modules
`LinearCrossEntropyLoss` and `CrossEntropyLoss` and of the operators of the same names. Values and
gradients are compared in float32 and float64 at the tolerances of `assert_close`, which torch's
tests use, and the operators' gradients with finite differences. Cross-entropy of logits is a linear
layer with the identity as weight. `options` choose torch's chunks; here they choose that
exponentials are stored.

Shapes: N batch, D embedding, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_nn import linear_cross_entropy_loss_reference

from fastssl_kernels import linear_cross_entropy

DTYPES = (torch.float32, torch.float64)
MODULES = {
    info.name: info
    for info in module_db
    if info.name in ("nn.LinearCrossEntropyLoss", "nn.CrossEntropyLoss")
}
OPERATORS = [
    info
    for info in op_db
    if info.name in ("nn.functional.linear_cross_entropy", "nn.functional.cross_entropy")
]
LINEAR = next(info for info in OPERATORS if "linear" in info.name)


class Case(NamedTuple):
    """One of torch's samples."""

    name: str
    x: Tensor
    weight: Tensor | None  # None: x are the logits
    target: Tensor
    options: dict[str, Any]
    chunked: bool
    reference: Callable[..., Tensor]  # torch's, of the tensors and options

    @property
    def tensors(self) -> list[Tensor]:
        """The input and the weight, as far as there is one."""
        return [self.x] if self.weight is None else [self.x, self.weight]


def ours(case: Case, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Our loss of a sample with these tensors; it does not apply where we do not offer it."""
    if weight is None:
        x = x.movedim(1, -1) if x.ndim > 1 else x  # classes last
        weight = torch.eye(x.shape[-1], dtype=x.dtype)
    if case.target.is_floating_point():
        pytest.skip("no probabilities as targets")
    if weight.ndim > 2:
        pytest.skip("no linear layer for each position")
    options = {name: value for name, value in case.options.items() if name != "options"}
    save = "exp" if case.chunked else "none"
    return linear_cross_entropy(x, weight, case.target, save=save, **options)


def module_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    torch.manual_seed(0)
    info = MODULES[name]
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=True
    )
    for i, sample in enumerate(samples):
        settings = sample.constructor_input
        module = info.module_cls(*settings.args, **settings.kwargs)
        x, target = sample.forward_input.args
        options = {
            "weight": module.weight,
            "ignore_index": module.ignore_index,
            "reduction": module.reduction,
            "label_smoothing": module.label_smoothing,
        }
        case = Case(f"{name}-{dtype}-{i}", x, None, target, options, False, F.cross_entropy)
        if isinstance(module, torch.nn.LinearCrossEntropyLoss):
            shape = (module.num_classes, *module.out_features)
            case = case._replace(
                weight=module.linear.weight.detach().unflatten(0, shape).requires_grad_(),
                options={**options, "linear_bias": module.linear.bias},
                chunked=module.options is not None,
                reference=linear_cross_entropy_loss_reference,
            )
        yield case


def operator_cases(info: Any, dtype: torch.dtype) -> Iterator[Case]:
    torch.manual_seed(0)
    for i, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=True)):
        *weights, target = sample.args
        yield Case(
            f"{info.full_name}-{dtype}-{i}",
            sample.input,
            weights[0] if weights else None,
            target,
            sample.kwargs,
            "options" in sample.kwargs,
            info.op,
        )


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", list(cases), ids=lambda case: case.name)


def check(case: Case) -> None:
    """Value, and gradients of the input, the weight and the bias."""
    loss = ours(case, *case.tensors)
    expected = case.reference(*case.tensors, case.target, **case.options)
    assert_close(loss, expected, equal_nan=True)
    bias = case.options.get("linear_bias")
    inputs = case.tensors if bias is None else [*case.tensors, bias]
    upstream = torch.randn_like(loss)
    grads = torch.autograd.grad(loss, inputs, upstream)
    for grad, want in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert_close(grad, want, equal_nan=True)


@each(case for name in MODULES for dtype in DTYPES for case in module_cases(name, dtype))
def test_modules(case: Case) -> None:
    check(case)


@each(case for info in OPERATORS for dtype in DTYPES for case in operator_cases(info, dtype))
def test_operators(case: Case) -> None:
    check(case)


@each(case for info in OPERATORS for case in operator_cases(info, torch.float64))
def test_gradients(case: Case) -> None:
    assert torch.autograd.gradcheck(partial(ours, case), case.tensors)


@pytest.mark.parametrize(
    "case", list(LINEAR.error_inputs("cpu")), ids=lambda case: case.error_regex
)
def test_errors(case: Any) -> None:
    sample = case.sample_input
    with pytest.raises(ValueError, match="linear_cross_entropy: "):
        linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
