"""How the elements of two tensors differ, block by block: counts, largest differences, cosine.

Takes bytes and element types and knows nothing of where they came from. Reals are compared in float64, into
which every float type of at most 64 bits goes without rounding; integers exactly. numpy and ml_dtypes only.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ptbin.differences.values import Numbers
from ptbin.values.dtypes import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1 << 16
"""Elements at a time: float64 arrays of that many fit into a core's cache."""

_INTEGERS = {"qint8": "int8", "quint8": "uint8", "qint32": "int32", "bool": "uint8"} | {
    name: name for name in ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
}
_REALS = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}
_COMPLEX = {"complex128": "<f8", "complex64": "<f4", "complex32": "<f2"}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|a - b| <= atol + rtol * |b| is close enough, as `numpy.isclose` and `torch.isclose` have it.

    Two NaNs are close, and two infinities of one sign.
    """

    rtol: float = 0.0
    atol: float = 0.0

    def __bool__(self) -> bool:
        return self.rtol > 0 or self.atol > 0


def has_numbers(dtype: DType) -> bool:
    """Whether elements of this type can be subtracted."""
    known = dtype.name in _INTEGERS or dtype.name in _REALS or dtype.name in _COMPLEX
    return known or dtype.name == "bfloat16" or _float8_table(dtype.name) is not None


def resolve_lazy(data: memoryview, dtype: DType, flags: tuple[str, ...]) -> memoryview:
    """What torch shows of bytes with these flags: `neg` turns all signs around, `conj` the imaginary ones."""
    import numpy

    part = dtype.itemsize // 2 if dtype.name in _COMPLEX else dtype.itemsize
    words = numpy.frombuffer(data, f"<u{part}").copy()
    sign = words.dtype.type(1 << (8 * part - 1))
    if "neg" in flags:
        words ^= sign
    if "conj" in flags:
        words[1::2] ^= sign
    return memoryview(words.view(numpy.uint8).data)


def same_bytes(a: memoryview, b: memoryview) -> bool:
    import numpy

    # not `a == b`: that compares element by element, and holds the interpreter's lock
    return bool((numpy.frombuffer(a, numpy.uint8) == numpy.frombuffer(b, numpy.uint8)).all())


@dataclass(slots=True)
class Tally:
    """Sums and largest differences of what was compared so far; those of two parts can be put together."""

    different: int = 0
    beyond: int = 0
    non_finite: int = 0
    finite: int = 0
    max_abs: float = 0
    index: int | None = None
    """Flat index of the largest difference."""
    max_rel: float | None = None
    dot: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0
    numeric: bool = field(default=True)

    def add(
        self, a: memoryview, b: memoryview, types: tuple[DType, DType], base: int, tolerance: Tolerance
    ) -> None:
        """Count one block of elements, the first of which has flat index `base`."""
        import numpy

        with numpy.errstate(all="ignore"):
            changed = _changed_bits(a, b, types[0]) if types[0] is types[1] else None
            left, right = _decode(a, types[0]), _decode(b, types[1])
            if left is None or right is None:
                assert changed is not None
                self.numeric = False
                self.different += int(changed.sum())
                self.beyond = self.different
            elif left.dtype.kind in "iu" and right.dtype.kind in "iu" and _same_sign_range(left, right):
                self._add_integers(left, right, changed, base, tolerance)
            else:
                self._add_reals(left, right, changed, base, tolerance)

    def add_equal(self, data: memoryview, dtype: DType) -> None:
        """Count a block that both sides have bit for bit: what it adds to the cosine."""
        import numpy

        with numpy.errstate(all="ignore"):
            values = _decode(data, dtype)
            if values is None:
                return
            flat = values.astype(float).reshape(-1)
            finite = numpy.isfinite(flat)
            self.finite += int(finite.sum())
            square = _dot(flat, flat) if finite.all() else _dot(flat[finite], flat[finite])
        self.dot += square
        self.square_a += square
        self.square_b += square

    def merge(self, other: Tally) -> None:
        self.different += other.different
        self.beyond += other.beyond
        self.non_finite += other.non_finite
        self.finite += other.finite
        self.numeric = self.numeric and other.numeric
        if other.index is not None and (self.index is None or other.max_abs > self.max_abs):
            self.max_abs, self.index = other.max_abs, other.index
        self._take_rel(other.max_rel)
        self.dot += other.dot
        self.square_a += other.square_a
        self.square_b += other.square_b

    def numbers(self, elements: int, shape: tuple[int, ...]) -> Numbers:
        """The result, for tensors of `shape`."""
        counted = self.numeric and self.finite > 0
        return Numbers(
            elements=elements,
            different=self.different,
            beyond_tolerance=self.beyond,
            non_finite=self.non_finite,
            max_abs=self.max_abs if counted else None,
            max_rel=self.max_rel if counted else None,
            index=_unravel(self.index, shape) if self.index is not None else None,
            cosine=self._cosine(),
        )

    def _cosine(self) -> float | None:
        lengths = math.sqrt(self.square_a) * math.sqrt(self.square_b) if self.numeric else 0.0
        if not lengths or not math.isfinite(lengths) or not math.isfinite(self.dot):
            return None
        return max(-1.0, min(1.0, self.dot / lengths))

    def _take_rel(self, largest: float | None) -> None:
        if largest is not None and (self.max_rel is None or largest > self.max_rel):
            self.max_rel = largest

    def _add_integers(
        self, a: NDArray[Any], b: NDArray[Any], changed: NDArray[Any] | None, base: int, tolerance: Tolerance
    ) -> None:
        import numpy

        wide = numpy.uint64 if numpy.uint64 in (a.dtype, b.dtype) else numpy.int64
        a, b = a.astype(wide), b.astype(wide)
        # as unsigned numbers, whose difference wraps to the right one where the signed would overflow
        distance = numpy.maximum(a, b).view(numpy.uint64) - numpy.minimum(a, b).view(numpy.uint64)
        changed = distance > 0 if changed is None else changed
        self._take(
            distance, abs(b.astype(float)), changed, numpy.zeros_like(changed), base, tolerance, len(a)
        )
        self._take_sums(a.astype(float), b.astype(float))

    def _add_reals(
        self, a: NDArray[Any], b: NDArray[Any], changed: NDArray[Any] | None, base: int, tolerance: Tolerance
    ) -> None:
        import numpy

        rounded = _rounded(a) | _rounded(b) if changed is None else None
        if rounded is not None and a.dtype.kind in "iu" and b.dtype.kind in "iu":
            # One of them uint64: as such they are equal, or not at all.
            rounded &= (a < 0) | (b < 0) | (a.astype(numpy.uint64) != b.astype(numpy.uint64))
        a, b = a.astype(float, copy=False), b.astype(float, copy=False)
        if a.ndim != b.ndim:  # one of them complex
            a, b = _as_complex(a), _as_complex(b)
        same = (a == b) | (numpy.isnan(a) & numpy.isnan(b)) if changed is None or tolerance else None
        if same is not None and same.ndim > 1:
            same = same.all(axis=1)
        if changed is None:
            assert same is not None
            assert rounded is not None
            same &= (
                ~rounded
            )  # what float64 rounds is no value of the other type, though both look alike in it
            changed = ~same
        distance = _modulus(a - b)
        count = len(a)
        close = numpy.zeros_like(changed) if same is None else same
        if not math.isfinite(distance.max()):
            finite = numpy.isfinite(a) & numpy.isfinite(b)
            finite = finite.all(axis=1) if finite.ndim > 1 else finite
            self.non_finite += int((changed & ~finite).sum())
            count = int(finite.sum())
            mask = finite if a.ndim == 1 else finite[:, None]
            # what is not finite is far, unless both are the same
            changed, far = changed & finite, changed & ~finite
            self.different += int(far.sum())
            self.beyond += int((far & ~close).sum()) if tolerance else int(far.sum())
            a, b = numpy.where(mask, a, 0.0), numpy.where(mask, b, 0.0)
            distance = _modulus(a - b)
        self._take(distance, _modulus(b), changed, close, base, tolerance, count)
        self._take_sums(a.reshape(-1), b.reshape(-1))

    def _take(
        self,
        distance: NDArray[Any],
        size: NDArray[Any],
        changed: NDArray[Any],
        close: NDArray[Any],
        base: int,
        tolerance: Tolerance,
        count: int,
    ) -> None:
        """Distances of finite pairs; `size` is |b|."""
        self.finite += count
        self.different += int(changed.sum())
        if tolerance:
            near = close | (distance <= tolerance.atol + tolerance.rtol * size)
            self.beyond += int((changed & ~near).sum())
        else:
            self.beyond += int(changed.sum())
        largest = distance.max().item()
        if largest > self.max_abs:
            self.max_abs, self.index = largest, base + int(distance.argmax())
        positive = size > 0
        if positive.all():
            self._take_rel(float((distance / size).max()))
        elif positive.any():
            self._take_rel(float((distance[positive] / size[positive]).max()))

    def _take_sums(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        self.dot += _dot(a, b)
        self.square_a += _dot(a, a)
        self.square_b += _dot(b, b)


def _dot(a: NDArray[Any], b: NDArray[Any]) -> float:
    import numpy

    # not `a @ b`: BLAS starts threads for it, and its last bits depend on how many
    return float(numpy.einsum("i,i->", a, b))


def _modulus(values: NDArray[Any]) -> NDArray[Any]:
    import numpy

    size: NDArray[Any] = abs(values) if values.ndim == 1 else numpy.hypot(values[:, 0], values[:, 1])
    return size


def _as_complex(values: NDArray[Any]) -> NDArray[Any]:
    import numpy

    return values if values.ndim == 2 else numpy.stack([values, numpy.zeros_like(values)], axis=1)


def _rounded(values: NDArray[Any]) -> NDArray[Any]:
    """Which elements float64 does not hold exactly: integers beyond 2**53, some of them."""
    import numpy

    if values.dtype not in (numpy.int64, numpy.uint64):
        return numpy.zeros(len(values), bool)
    # The largest ones are rounded to 2**63 and 2**64, which their own type does not hold.
    most = numpy.iinfo(values.dtype).max - (1023 if values.dtype == numpy.int64 else 2047)
    beyond = values > most
    held = numpy.where(beyond, values.dtype.type(0), values)
    rounded: NDArray[Any] = beyond | (held.astype(float).astype(values.dtype) != held)
    return rounded


def _same_sign_range(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether one 64-bit type holds both."""
    import numpy

    return numpy.uint64 not in (a.dtype, b.dtype) or (a.dtype.kind, b.dtype.kind) == ("u", "u")


def _changed_bits(a: memoryview, b: memoryview, dtype: DType) -> NDArray[Any]:
    """Which elements (stored units of packed types) differ in any bit."""
    import numpy

    width = dtype.itemsize
    word = f"<u{min(width, 8)}"
    differ: NDArray[Any] = numpy.frombuffer(a, word) != numpy.frombuffer(b, word)
    if width > 8:
        differ = numpy.any(differ.reshape(-1, width // 8), axis=1)
    return differ


def _decode(data: memoryview, dtype: DType) -> NDArray[Any] | None:
    """Elements as numbers: integers as they are, float64, or float64 pairs; None where there are
    none.
    """
    import numpy

    if dtype.name in _INTEGERS:
        return numpy.frombuffer(data, numpy.dtype(_INTEGERS[dtype.name]).newbyteorder("<"))
    if dtype.name in _REALS:
        return numpy.frombuffer(data, _REALS[dtype.name]).astype(float)
    if dtype.name in _COMPLEX:
        return numpy.frombuffer(data, _COMPLEX[dtype.name]).astype(float).reshape(-1, 2)
    if dtype.name == "bfloat16":  # the upper half of a float32
        halves = numpy.frombuffer(data, "<u2").astype("<u4")
        return (halves << 16).view("<f4").astype(float)
    table = _float8_table(dtype.name)
    return None if table is None else table[numpy.frombuffer(data, numpy.uint8)]


@functools.cache
def _float8_table(name: str) -> NDArray[Any] | None:
    """The values of all 256 bit patterns; None for types that are not one number a byte."""
    import numpy

    if not name.startswith("float8"):
        return None
    import ml_dtypes

    codes = numpy.arange(256, dtype=numpy.uint8)
    values: NDArray[Any] = codes.view(getattr(ml_dtypes, name)).astype(float)
    return values


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    where = []
    for n in reversed(shape):
        index, inner = divmod(index, n)
        where.append(inner)
    return tuple(reversed(where))
