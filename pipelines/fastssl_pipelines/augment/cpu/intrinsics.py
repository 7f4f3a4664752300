"""Operations for `kernels.py` that numba does not have: weighted sums of neighbours in vectors,
prefetching, atomic addition.

LLVM's loop vectoriser does not find the sums by itself: it sees four floats of a pixel, or one of
many neighbours, per iteration. They use LLVM's generic vectors, which every processor supports.
None checks bounds: callers allocate room for the last vector.
"""

# mypy: disable-error-code="no-untyped-def"
# ^ these functions generate code; numba infers the types in it

from functools import partial, reduce

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 32  # floats computed at a time, in as many registers as they need
LINE = 16  # floats of a cache line of 64 bytes


def _vector(builder, lanes, array, offset):
    """A pointer to `lanes` floats of an array's data."""
    pointer = builder.gep(array, [offset])
    return builder.bitcast(pointer, ir.VectorType(ir.FloatType(), lanes).as_pointer())


def _spread_number(builder, lanes, number):
    """A number in all lanes of a vector."""
    unset = ir.Constant(ir.VectorType(ir.FloatType(), lanes), ir.Undefined)
    first = builder.insert_element(unset, number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, unset, zeros)


def _scale(builder, lanes, number, vector):
    return builder.fmul(_spread_number(builder, lanes, number), vector, flags=("contract",))


def _data(context, builder, signature, arguments):
    """The arguments, with arrays as pointers to their data."""
    return [
        context.make_array(kind)(context, builder, value).data
        if isinstance(kind, types.Array)
        else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


def _sum(builder, term, count):
    """term(0) + ... + term(count - 1); `count`: a Python int, or a value of the generated code."""
    if isinstance(count, int):
        terms = [term(ir.Constant(ir.IntType(64), k)) for k in range(count)]
        return reduce(partial(builder.fadd, flags=("contract",)), terms)
    total = cgutils.alloca_once_value(builder, term(ir.Constant(count.type, 0)))
    one = ir.Constant(count.type, 1)
    with cgutils.for_range(builder, builder.sub(count, one)) as loop:
        more = term(builder.add(loop.index, one))
        builder.store(builder.fadd(builder.load(total), more, flags=("contract",)), total)
    return builder.load(total)


@intrinsic
def weigh_bytes(typing, out, o, flat, i, spacing, weight, j, count):
    """LANES of out from `o` on: the sum of weight[j + k] * flat[i + k * spacing] over k < count."""
    intp = types.intp
    signature = types.none(out, intp, flat, intp, intp, weight, intp, intp)

    def generate(context, builder, signature, arguments):
        out, o, flat, i, spacing, weight, j, count = _data(context, builder, signature, arguments)
        kind = ir.VectorType(ir.IntType(8), LANES).as_pointer()

        def term(k):
            start = builder.gep(flat, [builder.add(i, builder.mul(k, spacing))])
            values = builder.load(builder.bitcast(start, kind), align=1)
            floats = builder.uitofp(values, ir.VectorType(ir.FloatType(), LANES))
            number = builder.load(builder.gep(weight, [builder.add(j, k)]))
            return _scale(builder, LANES, number, floats)

        builder.store(_sum(builder, term, count), _vector(builder, LANES, out, o), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def weigh_pixels(typing, out, o, line, i, weight, j, count):
    """out[o : o + 4] = the sum of weight[j + k] * line[i + 3 k : i + 3 k + 4] over k < count."""
    fixed = count.literal_value if isinstance(count, types.IntegerLiteral) else None
    intp = types.intp
    signature = types.none(out, intp, line, intp, weight, intp, intp)

    def generate(context, builder, signature, arguments):
        out, o, line, i, weight, j, count = _data(context, builder, signature, arguments)

        def term(k):
            start = builder.add(i, builder.mul(k, ir.Constant(k.type, 3)))
            pixel = builder.load(_vector(builder, 4, line, start), align=4)
            number = builder.load(builder.gep(weight, [builder.add(j, k)]))
            return _scale(builder, 4, number, pixel)

        builder.store(_sum(builder, term, fixed or count), _vector(builder, 4, out, o), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def weigh_pairs(typing, out, o, source, i, weight, before, after, count):
    """LANES of out from `o` on: the sum of weight[t] * (source[i + before[t]] + source[i +
    after[t]]) over t < count."""
    intp = types.intp
    signature = types.none(out, intp, source, intp, weight, before, after, intp)

    def generate(context, builder, signature, arguments):
        out, o, source, i, weight, before, after, count = _data(
            context, builder, signature, arguments
        )

        def load(offsets, t):
            start = builder.add(i, builder.load(builder.gep(offsets, [t])))
            return builder.load(_vector(builder, LANES, source, start), align=4)

        def term(t):
            both = builder.fadd(load(before, t), load(after, t))
            return _scale(builder, LANES, builder.load(builder.gep(weight, [t])), both)

        builder.store(_sum(builder, term, count), _vector(builder, LANES, out, o), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def prefetch_for_write(typing, array, i, count):
    """Prefetch array[i : i + count] into the cache, for writing."""
    signature = types.none(array, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        array, i, count = _data(context, builder, signature, arguments)
        byte = ir.IntType(8).as_pointer()
        numbers = [ir.IntType(32)] * 3
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, *numbers])
        )
        write, locality, data = (ir.Constant(ir.IntType(32), n) for n in (1, 3, 1))
        lines = builder.udiv(builder.add(count, count.type(LINE)), count.type(LINE))
        with cgutils.for_range(builder, lines) as loop:
            start = builder.gep(array, [builder.add(i, builder.mul(loop.index, count.type(LINE)))])
            builder.call(prefetch, [builder.bitcast(start, byte), write, locality, data])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def atomic_fetch_add(typing, counter, count):
    """counter[0] += count, atomically. -> its value before, int64"""
    signature = types.int64(counter, types.int64)

    def generate(context, builder, signature, arguments):
        array, count = arguments
        pointer = context.make_array(signature.args[0])(context, builder, array).data
        return builder.atomic_rmw("add", pointer, count, ordering="monotonic")

    return signature, generate
