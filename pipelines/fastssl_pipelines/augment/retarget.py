"""One formula, several compilers: the functions of a module, compiled with other primitives.

`sample_params.py` and `pixel_ops.py` are torch as they stand. `rebind` hands each of their
functions, its source unchanged, to another compiler, in a namespace where `where`, `sqrt`, `get`,
... are that compiler's own.
"""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any


def rebind(
    modules: Sequence[ModuleType],
    primitives: Mapping[str, Any],
    compile: Callable[[FunctionType], Any],
    constant: Callable[[Any], Any],
) -> dict[str, Any]:
    """Every formula (a function without annotations) and number of `modules`, compiled. name ->
    object

    primitives: replacements by name; a formula of that name is not compiled. compile: the
    decorator. constant: what the compiler wants for a global number.
    """
    space: dict[str, Any] = {"__name__": __name__, **primitives}
    for module in modules:
        for name, value in vars(module).items():
            if name in primitives:
                continue
            if isinstance(value, int | float):
                space[name] = constant(value)
            elif isinstance(value, FunctionType) and not value.__annotations__:
                if value.__module__ == module.__name__:  # not one that the module imported
                    space[name] = compile(FunctionType(value.__code__, space, name))
    return space
