"""Element casts of streamed bytes: what `torch.Tensor.to(dtype)` gives on a CPU, bit for bit, without torch.

Checked against torch 2.13.0 (x86-64, AVX-512 and AVX2) by `tests/ptbin/test_casting.py`. Every cast goes
through float32, as torch's do, so float64 to a smaller type is rounded twice. Rounding is to nearest, ties to
even. What is too large becomes an infinity, in the `fnuz` types (which have none) NaN, and in float8_e4m3fn
448, its largest number, infinities included: so torch 2.13 has it, and such elements are not in the tally.

NaNs keep sign and the high bits of their payload, made quiet, except that
    - to a float8 type only the sign is kept, and by the `fnuz` types not even that (their only NaN is 0x80);
    - bfloat16 to float32 is a shift and changes nothing;
    - to bfloat16 all NaNs become one: 0xffff from float32 and float64, 0x7fc0 from the smaller types.

In three casts torch is not of one mind about NaNs: its vectorised loops take 16 or 32 elements at a time and
leave the last ones of a tensor to scalar code. float32 and float64 to bfloat16 give 0xffff in the former and
0x7fc0 in the latter; float16 to float32 makes NaNs quiet in the former only. Here every element gets what
torch's vectorised code gives.

Tensors' bytes are little-endian here, and this module takes the machine to be so as well. Sizes are in
elements unless a name says `nbytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptbin.splice.cast_tables import F32_INF, MAGNITUDE, SIGN, float16_bits, table_of
from ptbin.values.dtypes import CAST_NAMES, DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Elements per numpy call. float32 to bfloat16 reads 3.2 GB/s with 8 Ki, where the calls themselves count,
# 7.2 with 64 Ki, whose scratch buffers stay in an L2 cache of 1 MiB, and 6.1 with 1 Mi (one core, AMD EPYC).
# Each call releases the interpreter's lock and takes it again: with 64 Ki, 16 cores did little else.
BLOCK = 1 << 18
# Shorter pieces are put together first: a gather may yield single elements.
SMALL_NBYTES = 1 << 16

# The smallest that round to infinity: half an ulp above the largest finite number.
_BF16_OVERFLOW = 0x7F7F8000
_F16_OVERFLOW = 0x477FF000  # 65520
_F16_NORMAL = 0x38800000  # 2**-14, the smallest normal float16


@dataclass(slots=True)
class CastTally:
    """What a cast did to its elements.

    Attributes:
        overflowed: elements that were finite in the source and are infinite or NaN in the target.
    """

    overflowed: int = 0


def iter_cast(stream: Iterator[bytes], source: DType, target: DType, tally: CastTally) -> Iterator[bytes]:
    """The elements of a stream as another type, in order, in pieces of at most `BLOCK` elements.

    `stream` may break inside an element. `tally` is complete when the iterator is exhausted.

    Raises:
        ValueError: one of the types is not in `CAST_NAMES`, or the stream ends inside an element.
    """
    for dtype in (source, target):
        if dtype.name not in CAST_NAMES:
            raise ValueError(f"no casts from or to {dtype.name}; there are {', '.join(CAST_NAMES)}")
    return _iter_cast(stream, source, target, tally)


def _iter_cast(stream: Iterator[bytes], source: DType, target: DType, tally: CastTally) -> Iterator[bytes]:
    import numpy

    caster = _Caster(source.name, target.name)
    bits = numpy.dtype(f"<u{source.itemsize}")
    for piece in _whole_elements(stream, source.itemsize):
        values = numpy.frombuffer(piece, dtype=bits)
        for start in range(0, len(values), BLOCK):
            # Inside a generator numpy.errstate would reach the consumer at each `yield`.
            with numpy.errstate(all="ignore"):
                result = caster.cast(values[start : start + BLOCK], tally)
            yield result.tobytes()


def _whole_elements(stream: Iterator[bytes], itemsize: int) -> Iterator[bytes | bytearray | memoryview]:
    """The stream in pieces of whole elements that are not small (the last one may be)."""
    pending = bytearray()
    for piece in stream:
        data: bytes | bytearray = piece
        if pending or len(piece) < SMALL_NBYTES:
            pending += piece
            if len(pending) < SMALL_NBYTES:
                continue
            data, pending = pending, bytearray()
        rest = len(data) % itemsize
        if rest:
            pending += data[-rest:]
            yield memoryview(data)[:-rest]
        else:
            yield data
    if len(pending) % itemsize:
        raise ValueError(f"the stream ends {len(pending) % itemsize} bytes into an element of {itemsize}")
    if pending:
        yield pending


class _Caster:
    """Casts blocks of bit patterns. Scratch and result are used again: a result dies at the next call."""

    def __init__(self, source: str, target: str) -> None:
        import numpy

        self._source, self._target = source, target
        self._words = numpy.empty(BLOCK, numpy.uint32)
        self._odd = numpy.empty(BLOCK, numpy.uint32)
        self._flags = numpy.empty(BLOCK, numpy.bool_)
        self._low = numpy.empty(BLOCK, numpy.uint16)
        self._high = numpy.empty(BLOCK, numpy.uint16)

    def cast(self, values: NDArray[Any], tally: CastTally) -> NDArray[Any]:
        """The bit patterns `values` (at most `BLOCK`) as bit patterns of the target."""
        import numpy

        if self._source == self._target:
            return values
        if self._source not in {"float64", "float32"}:
            return self._look_up(self._source, values, tally)
        if self._source == "float64":
            wide, values = values, values.view(numpy.float64).astype(numpy.float32).view(numpy.uint32)
            # What float8_e4m3fn makes finite again has not overflowed.
            if self._target != "float8_e4m3fn" and _reaches(values, F32_INF):
                tally.overflowed += _count_infinite(values) - _count_infinite(wide)
        if self._target == "float32":
            return values
        if self._target == "float64":
            return values.view(numpy.float32).astype(numpy.float64)
        if self._target == "bfloat16":
            return self._to_bfloat16(values, tally)
        if self._target == "float16":
            return self._to_float16(values, tally)
        return self._to_float8(values, tally)

    def _to_bfloat16(self, values: NDArray[Any], tally: CastTally) -> NDArray[Any]:
        import numpy

        words, result = self._words[: len(values)], self._high[: len(values)]
        # To nearest, ties to even: add just under half an ulp, and one more where the last bit kept is odd.
        numpy.right_shift(values, 16, out=words)
        numpy.bitwise_and(words, 1, out=words)
        numpy.add(words, 0x7FFF, out=words)
        numpy.add(words, values, out=words)
        # A shift and a narrowing copy: six times as fast as a copy of every second uint16.
        numpy.right_shift(words, 16, out=words)
        numpy.copyto(result, words, casting="unsafe")
        if _reaches(values, _BF16_OVERFLOW):
            magnitude = values & MAGNITUDE
            result[magnitude > F32_INF] = 0xFFFF  # the sum has made anything of NaNs, zeros included
            tally.overflowed += _count_between(magnitude, _BF16_OVERFLOW, F32_INF)
        return result

    def _to_float16(self, values: NDArray[Any], tally: CastTally) -> NDArray[Any]:
        import numpy

        n = len(values)
        words, odd, flags = self._words[:n], self._odd[:n], self._flags[:n]
        # Counted from the smallest normal number on, all that needs more care (subnormals, what overflows,
        # infinities, NaNs) is at the upper end: one comparison finds it.
        numpy.bitwise_and(values, MAGNITUDE, out=words)
        numpy.subtract(words, _F16_NORMAL, out=words)
        numpy.greater_equal(words, _F16_OVERFLOW - _F16_NORMAL, out=flags)
        special = int(numpy.count_nonzero(flags))
        if special > n // 8:  # many subnormals or zeros
            tally.overflowed += _count_between(values & MAGNITUDE, _F16_OVERFLOW, F32_INF)
            return float16_bits(values)
        # Rounded as for bfloat16; the exponent of the smallest normal number is 1.
        numpy.right_shift(words, 13, out=odd)
        numpy.bitwise_and(odd, 1, out=odd)
        numpy.add(words, odd, out=words)
        numpy.add(words, (1 << 23) + 0xFFF, out=words)
        numpy.right_shift(words, 13, out=words)
        result, sign = self._low[:n], self._high[:n]
        numpy.copyto(result, words, casting="unsafe")
        numpy.right_shift(values, 16, out=words)
        numpy.copyto(sign, words, casting="unsafe")
        numpy.bitwise_and(sign, 0x8000, out=sign)
        numpy.bitwise_or(result, sign, out=result)
        if special:
            where = numpy.flatnonzero(flags)
            chosen = values[where]
            result[where] = float16_bits(chosen)
            tally.overflowed += _count_between(chosen & MAGNITUDE, _F16_OVERFLOW, F32_INF)
        return result

    def _to_float8(self, values: NDArray[Any], tally: CastTally) -> NDArray[Any]:
        import numpy

        n = len(values)
        words, flags, low, high = self._words[:n], self._flags[:n], self._low[:n], self._high[:n]
        # The upper half, its last bit set if anything is below it, rounds to the few bits of a float8 as the
        # whole number does; it is also finite, infinite or NaN where the whole number is.
        numpy.right_shift(values, 16, out=words)
        numpy.copyto(high, words, casting="unsafe")
        numpy.copyto(low, values, casting="unsafe")
        numpy.not_equal(low, 0, out=flags)
        numpy.bitwise_or(high, flags.view(numpy.uint8), out=high)
        return self._look_up("bfloat16", high, tally)

    def _look_up(self, source: str, values: NDArray[Any], tally: CastTally) -> NDArray[Any]:
        result, overflowed = table_of(source, self._target).look_up(values)
        tally.overflowed += overflowed
        return result


def _reaches(values: NDArray[Any], magnitude: int) -> bool:
    """Whether a float32 bit pattern, of either sign, is at or above `magnitude`."""
    import numpy

    # As signed integers the positive numbers are largest, as unsigned ones the negative.
    return bool(values.view(numpy.int32).max() >= magnitude or values.max() >= (SIGN | magnitude))


def _count_between(magnitudes: NDArray[Any], first: int, end: int) -> int:
    import numpy

    return int(numpy.count_nonzero((magnitudes >= first) & (magnitudes < end)))


def _count_infinite(values: NDArray[Any]) -> int:
    """How many float bit patterns are infinite or NaN."""
    import numpy

    return len(values) - int(numpy.count_nonzero(numpy.isfinite(values.view(f"f{values.itemsize}"))))
