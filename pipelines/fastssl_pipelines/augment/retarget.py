"""Compile the functions of a module with another compiler and its primitives.

`sample_params.py` and `pixel_ops.py` are plain torch. `retarget` compiles each of their functions,
its source unchanged, in a namespace where `where`, `sqrt`, `get`, ... are the primitives of that
compiler.
"""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any


def retarget(
    modules: Sequence[ModuleType],
    primitives: Mapping[str, Any],
    compile: Callable[[FunctionType], Any],
    constant: Callable[[Any], Any],
) -> dict[str, Any]:
    """The formulas of `modules` (functions without annotations), compiled, and their numbers. name
    -> object

    primitives: replacements by name; a formula of that name is not compiled. compile: the
    decorator of the compiler. constant: converts a global number into the form that it expects.
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
