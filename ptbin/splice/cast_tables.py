"""Casts of the small element types as tables: every bit pattern of one or two bytes, and its result.

Also what makes the tables: float32 bit patterns as those of float16 and the float8 types. `casting` says what
torch does with NaNs and with what is too large.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bit patterns of float32.
SIGN = 0x80000000
MAGNITUDE = 0x7FFFFFFF
F32_INF = 0x7F800000
_QUIET = 0x00400000


@dataclass(frozen=True, slots=True)
class _Table:
    """All results of a cast from a type of one or two bytes.

    Attributes:
        results: by the element's bits.
        first_overflow: the smallest magnitude that overflows; one more than there are if none does.
        overflows: by the element's bits, whether it does.
    """

    results: NDArray[Any]
    first_overflow: int
    overflows: NDArray[Any]

    def look_up(self, values: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """The results, and how many elements overflow."""
        magnitude_mask = len(self.results) // 2 - 1
        overflowed = 0
        if self.first_overflow <= magnitude_mask and (values & magnitude_mask).max() >= self.first_overflow:
            overflowed = int(self.overflows[values].sum())
        return self.results.take(values), overflowed


@cache
def table_of(source: str, target: str) -> _Table:
    """The table of a cast, made once in a process: 2**8 or 2**16 results."""
    import numpy

    wide = _widened(source)
    finite = numpy.isfinite(wide.view(numpy.float32))
    with numpy.errstate(all="ignore"):
        if target == "float32":
            results = wide
        elif target == "float64":
            results = wide.view(numpy.float32).astype(numpy.float64)
        elif target == "float16":
            results = float16_bits(wide)
        elif target == "bfloat16":
            # bfloat16 reaches further than all the small types: nothing overflows here.
            results = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(numpy.uint16)
            results[numpy.isnan(wide.view(numpy.float32))] = 0x7FC0
        else:
            results = _float8_bits(wide, target)
    if target in _FLOAT8:
        after = _widened(target)[results].view(numpy.float32)
    elif target == "bfloat16":
        after = (results.astype(numpy.uint32) << 16).view(numpy.float32)
    else:
        after = results.view(f"f{results.itemsize}")
    overflows = finite & ~numpy.isfinite(after)
    half = len(results) // 2
    first = int(overflows[:half].argmax()) if overflows[:half].any() else half
    return _Table(results, first, overflows)


@dataclass(frozen=True, slots=True)
class _Float8:
    """A float8 type: its mantissa's width, its exponent's bias, what it gives for too large and for NaN.

    `unsigned_zero`: there is no negative zero, its bit pattern is the NaN.
    Source: torch/headeronly/util/Float8_*.h, 2.13.
    """

    mantissa: int
    bias: int
    overflow: int
    nan: int
    unsigned_zero: bool = False


_FLOAT8 = {
    "float8_e4m3fn": _Float8(3, 7, overflow=0x7E, nan=0x7F),
    "float8_e4m3fnuz": _Float8(3, 8, overflow=0x80, nan=0x80, unsigned_zero=True),
    "float8_e5m2": _Float8(2, 15, overflow=0x7C, nan=0x7F),
    "float8_e5m2fnuz": _Float8(2, 16, overflow=0x80, nan=0x80, unsigned_zero=True),
}


def _widened(source: str) -> NDArray[Any]:
    """Every bit pattern of a small type as float32's."""
    import numpy

    if source == "bfloat16":
        return numpy.arange(1 << 16, dtype=numpy.uint32) << 16
    if source == "float16":
        halves = numpy.arange(1 << 16, dtype=numpy.uint16)
        wide = halves.view(numpy.float16).astype(numpy.float32).view(numpy.uint32)
        wide[(halves & 0x7FFF) > 0x7C00] |= _QUIET
        return wide
    if source == "float8_e5m2":  # the upper half of a float16
        return _widened("float16")[::256].copy()
    kind = _FLOAT8[source]
    wide = _float8_values(kind).astype(numpy.float32).view(numpy.uint32)
    wide = numpy.concatenate([wide, wide | SIGN])
    if kind.unsigned_zero:
        wide[kind.nan] = 0x7F800001
    else:
        wide[[kind.nan, kind.nan | 0x80]] = 0x7FF00000, 0xFFF00000
    return wide


def _float8_values(kind: _Float8) -> NDArray[Any]:
    """The positive bit patterns as numbers, as if none stood for an infinity or NaN."""
    import numpy

    codes = numpy.arange(0x80)
    exponent, mantissa = codes >> kind.mantissa, codes & ((1 << kind.mantissa) - 1)
    significand = mantissa + numpy.where(exponent > 0, 1 << kind.mantissa, 0)
    values: NDArray[Any] = numpy.ldexp(
        significand.astype(float), numpy.maximum(exponent, 1) - kind.bias - kind.mantissa
    )
    return values


def _float8_bits(wide: NDArray[Any], target: str) -> NDArray[Any]:
    """float32 bit patterns as those of a float8 type, slowly."""
    import numpy

    kind = _FLOAT8[target]
    values = _float8_values(kind)
    values = numpy.append(values, 2 * values[-1] - values[-2])  # where the next one would be
    middles = (values[1:] + values[:-1]) / 2
    numbers = numpy.abs(wide.view(numpy.float32).astype(float))
    codes = numpy.searchsorted(middles, numbers, side="left")  # a tie goes down,
    ties = numpy.isin(numbers, middles)
    codes[ties] += codes[ties] & 1  # and from there to the even one
    codes[codes >= kind.overflow] = kind.overflow
    codes[numpy.isnan(numbers)] = kind.nan
    negative = (wide & SIGN) != 0
    if kind.unsigned_zero:
        negative &= codes > 0
    result: NDArray[Any] = numpy.where(negative, codes | 0x80, codes).astype(numpy.uint8)
    return result


def float16_bits(values: NDArray[Any]) -> NDArray[Any]:
    """float32 bit patterns as float16's; NaNs made quiet, as the processor's own instruction does."""
    import numpy

    result = values.view(numpy.float32).astype(numpy.float16).view(numpy.uint16)
    nan = (values & MAGNITUDE) > F32_INF
    if nan.any():
        chosen = values[nan]
        result[nan] = ((chosen >> 16) & 0x8000) | 0x7E00 | ((chosen >> 13) & 0x3FF)
    return result
