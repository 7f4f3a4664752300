"""Rows shared out among threads while they work: one operation for `kernels.py`."""

# mypy: disable-error-code="no-untyped-def"
# ^ this function writes a program; numba infers the types in it

from numba.core import types
from numba.extending import intrinsic


@intrinsic
def take(typing, taken, count):
    """taken[0] += count, by one thread at a time. -> what it was, int64"""
    signature = types.int64(taken, types.int64)

    def generate(context, builder, signature, arguments):
        array, count = arguments
        pointer = context.make_array(signature.args[0])(context, builder, array).data
        return builder.atomic_rmw("add", pointer, count, ordering="monotonic")

    return signature, generate
