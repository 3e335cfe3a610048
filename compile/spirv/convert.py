"""Casts and reinterpretations between every pair of dtypes.

- Integer to narrower integer: the low bits. Anything to bool: whether it is not zero.
- Float to integer: towards zero; NaN gives 0, what is out of range the nearest integer there is.
- Float to narrower float: one of the two neighbours. Vulkan leaves the direction to the device;
  all that we know of round to nearest even.
- Float to bfloat16: to nearest even, whatever the device; a NaN stays a NaN.
"""

from __future__ import annotations

from .builder import Builder
from .dtypes import BOOL, F32, U16, U32, DType, Value
from .encoding import Glsl, Op


def cast(b: Builder, value: Value, to: DType) -> Value:
    """`value` as dtype `to`, which has as many lanes."""
    source = value.dtype
    if source == to:
        return value
    if to.kind == "bfloat":
        return _to_bfloat(b, cast(b, value, F32.with_lanes(to.lanes)), to)
    if source.kind == "bfloat":
        return cast(b, _from_bfloat(b, value), to)
    if to.kind == "bool":
        op = Op.F_UNORD_NOT_EQUAL if source.is_float else Op.I_NOT_EQUAL
        return b.op(op, to, value, b.constant(source, 0))
    if source.kind == "bool":
        return b.select(value, b.constant(to, 1), b.constant(to, 0))
    if source.is_float:
        if to.is_float:
            # Exact, or Mesa leaves out a way to float16 and back.
            return b.op(Op.F_CONVERT, to, value, exact=to.bits < source.bits)
        return _float_to_integer(b, value, to)
    if to.is_float:
        return b.op(Op.CONVERT_S_TO_F if source.is_signed else Op.CONVERT_U_TO_F, to, value)
    if source.bits == to.bits:
        return b.retype(value, to)
    if to.bits == 64 and (source.is_signed or source.bits < 32):
        return _to_64_bits(b, value, to)
    extends_sign = source.is_signed and to.bits > source.bits
    return b.op(Op.S_CONVERT if extends_sign else Op.U_CONVERT, to, value)


def _to_64_bits(b: Builder, value: Value, to: DType) -> Value:
    """The low and the high word, joined.

    Not one conversion: Mesa 22.3 holds signed comparisons of its result with a constant for always
    true or always false. Devices without 64-bit registers do the same as is done here.
    """
    word = DType(value.dtype.kind, 32, value.dtype.lanes)
    low = cast(b, value, word)
    shift = Op.SHIFT_RIGHT_ARITHMETIC if word.is_signed else Op.SHIFT_RIGHT_LOGICAL
    high = b.op(shift, word, low, b.constant(word, 31))
    pair = U32.with_lanes(2)
    joined = [
        b.op(Op.BITCAST, to.scalar, b.from_lanes(pair, [*words])).id
        for words in zip(b.lanes(low), b.lanes(high), strict=True)
    ]
    return b.from_lanes(to, joined)


def _float_to_integer(b: Builder, value: Value, to: DType) -> Value:
    """Saturating: the instruction itself leaves NaN and values out of range undefined."""
    if value.dtype.bits == 16:  # whose range is smaller than most integers'
        value = b.op(Op.F_CONVERT, F32.with_lanes(to.lanes), value)
    source = value.dtype
    truth = BOOL.with_lanes(source.lanes)
    low = -(2 ** (to.bits - 1)) if to.is_signed else 0
    high = 2 ** (to.bits - 1) - 1 if to.is_signed else 2**to.bits - 1
    above = b.op(Op.F_ORD_GREATER_THAN_EQUAL, truth, value, b.constant(source, float(high + 1)))
    # True also for NaN, where the comparison is false: what is left converts well.
    at_least = b.op(Op.F_ORD_GREATER_THAN_EQUAL, truth, value, b.constant(source, float(low)))
    is_number = b.op(Op.F_ORD_EQUAL, truth, value, value)
    zero = b.constant(source, 0)
    inside = b.select(above, zero, b.select(at_least, value, zero))
    converted = b.op(Op.CONVERT_F_TO_S if to.is_signed else Op.CONVERT_F_TO_U, to, inside)
    if to.is_signed:
        below = b.op(Op.LOGICAL_AND, truth, is_number, b.op(Op.LOGICAL_NOT, truth, at_least))
        converted = b.select(below, b.constant(to, low), converted)
    return b.select(above, b.constant(to, high), converted)


def _from_bfloat(b: Builder, value: Value) -> Value:
    lanes = value.dtype.lanes
    word = U32.with_lanes(lanes)
    bits = b.op(Op.U_CONVERT, word, value)
    return b.op(
        Op.BITCAST,
        F32.with_lanes(lanes),
        b.op(Op.SHIFT_LEFT_LOGICAL, word, bits, b.constant(word, 16)),
    )


def _to_bfloat(b: Builder, value: Value, to: DType) -> Value:
    word, truth = U32.with_lanes(to.lanes), BOOL.with_lanes(to.lanes)
    bits = b.op(Op.BITCAST, word, value)
    high = b.op(Op.SHIFT_RIGHT_LOGICAL, word, bits, b.constant(word, 16))
    odd = b.op(Op.BITWISE_AND, word, high, b.constant(word, 1))
    # Half of the last place less one, and one more where the last place is odd: ties to even.
    half = b.op(Op.I_ADD, word, odd, b.constant(word, 0x7FFF))
    rounded = b.op(
        Op.SHIFT_RIGHT_LOGICAL, word, b.op(Op.I_ADD, word, bits, half), b.constant(word, 16)
    )
    magnitude = b.op(Op.BITWISE_AND, word, bits, b.constant(word, 0x7FFFFFFF))
    is_nan = b.op(Op.U_GREATER_THAN, truth, magnitude, b.constant(word, 0x7F800000))
    quiet = b.op(Op.BITWISE_OR, word, high, b.constant(word, 0x40))
    result = b.select(is_nan, quiet, rounded)
    return b.retype(b.op(Op.U_CONVERT, U16.with_lanes(to.lanes), result), to)


def float32_of_half_bits(b: Builder, bits: Value) -> Value:
    """float32 of integers that are the bits of float16, on devices without float16 too."""
    word, pair = U32.with_lanes(bits.dtype.lanes), F32.with_lanes(2)
    unpacked = [
        b.glsl(Glsl.UNPACK_HALF_2X16, pair, Value(U32, (lane,)))
        for lane in b.lanes(cast(b, bits, word))
    ]
    return b.from_lanes(F32.with_lanes(bits.dtype.lanes), [b.lanes(two)[0] for two in unpacked])


def reinterpret(b: Builder, value: Value, to: DType) -> Value:
    """The same bits as another dtype; the lowest lane holds the lowest bits."""
    source = value.dtype
    if _same_registers(source, to):
        return b.retype(value, to)
    if source.lanes == to.lanes:
        return b.op(Op.BITCAST, to, value)
    bits = reinterpret(b, value, _as_bits(source))
    words = _split(b, bits, to) if source.bits > to.bits else _join(b, bits, to)
    return reinterpret(b, words, to)


def _same_registers(source: DType, to: DType) -> bool:
    return (
        source.lanes == to.lanes
        and source.bits == to.bits
        and not source.is_float
        and not to.is_float
    ) or source == to


def _as_bits(dtype: DType) -> DType:
    return DType("uint", dtype.bits, dtype.lanes)


def _split(b: Builder, bits: Value, to: DType) -> Value:
    """Each wide lane as several narrow ones."""
    wide, narrow = bits.dtype.scalar, _as_bits(to).scalar
    lanes = []
    for lane in b.lanes(bits):
        for shift in range(0, wide.bits, narrow.bits):
            shifted = Value(wide, (lane,))
            if shift:
                shifted = b.op(Op.SHIFT_RIGHT_LOGICAL, wide, shifted, b.constant(wide, shift))
            lanes.append(b.op(Op.U_CONVERT, narrow, shifted).id)
    return b.from_lanes(_as_bits(to), lanes)


def _join(b: Builder, bits: Value, to: DType) -> Value:
    """Several narrow lanes as one wide one."""
    wide, narrow = _as_bits(to).scalar, bits.dtype.scalar
    lanes, source = [], b.lanes(bits)
    count = wide.bits // narrow.bits
    for start in range(0, len(source), count):
        joined: Value | None = None
        for index, lane in enumerate(source[start : start + count]):
            part = b.op(Op.U_CONVERT, wide, Value(narrow, (lane,)))
            if joined is None:
                joined = part
                continue
            shift = b.constant(wide, index * narrow.bits)
            part = b.op(Op.SHIFT_LEFT_LOGICAL, wide, part, shift)
            joined = b.op(Op.BITWISE_OR, wide, joined, part)
        assert joined is not None
        lanes.append(joined.id)
    return b.from_lanes(_as_bits(to), lanes)
