"""Small tensors whose numbers are computed while a checkpoint is read: casts, sums and means.

Everything else that ptbin writes are bytes as they were. What is computed here is bounded, lies in memory,
and is as torch on a CPU computes it: in float32, rounded to the element type after each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ptbin.errors import LimitExceededError
from ptbin.merging.tiles import Part
from ptbin.stores.joined import JoinedReader
from ptbin.values.crc32 import confirm_crc32, crc32_of
from ptbin.values.dtypes import BY_NAME, DType
from ptbin.values.tensors import ByteRange, InMemory, Storage, TensorRef, dense_strides

if TYPE_CHECKING:
    import numpy as np

MAX_SMALL_NBYTES = 256 << 20
"""All tensors of a checkpoint together that are computed in memory."""

_CODES = {"bfloat16": "u2", "float16": "f2", "float32": "f4", "float64": "f8"}


class SmallTensors:
    """Those of one checkpoint. Costs: each is read once."""

    def __init__(self, reader: JoinedReader) -> None:
        self._reader = reader
        self._nbytes = 0

    def can_read(self, tensor: TensorRef) -> bool:
        """Whether it is stored as it is, in floating numbers."""
        return tensor.dtype.name in _CODES and isinstance(tensor.storage.place, (ByteRange, InMemory))

    def reserve(self, *tensors: TensorRef) -> bool:
        """Count these against the limit; whether they may be read as well."""
        self._nbytes += sum(tensor.nbytes + 4 * tensor.numel for tensor in tensors)
        return self._nbytes <= MAX_SMALL_NBYTES

    def numbers(self, tensor: TensorRef) -> np.ndarray[Any, Any]:
        """The elements, in the type's own numbers; bfloat16 as float32.

        Raises:
            ChecksumMismatchError: the record's CRC-32 is another.
        """
        import numpy as np

        place = tensor.storage.place
        assert isinstance(place, (ByteRange, InMemory))
        # The whole record where a CRC-32 vouches for it, which is nearly always no more than the tensor.
        whole = isinstance(place, InMemory) or place.crc32 is not None
        first, end = (0, place.nbytes) if whole else tensor.span
        data = self._read(place, first, end)
        width = tensor.dtype.itemsize
        code = (">" if tensor.storage.big_endian else "<") + _CODES[tensor.dtype.name]
        flat = np.frombuffer(data, np.dtype(code), count=len(data) // width)
        flat = flat[tensor.storage_offset - first // width :]
        view = np.lib.stride_tricks.as_strided(
            flat, tensor.shape, tuple(step * width for step in tensor.stride), writeable=False
        )
        if tensor.dtype.name == "bfloat16":
            return (view.astype("<u4") << np.uint32(16)).view("<f4")
        return view

    def counter(self, value: Any) -> float | None:
        """A counter as optimizers save it, a number or a tensor of one; None for anything else."""
        if type(value) in (int, float):
            return float(value)
        if isinstance(value, TensorRef) and value.numel == 1 and self.can_read(value):
            return float(self.numbers(value).reshape(()))
        return None

    def tensor(self, key: str, numbers: np.ndarray[Any, Any], dtype: DType) -> TensorRef:
        """A tensor over a storage in memory, its numbers rounded to the type."""
        import numpy as np

        with np.errstate(all="ignore"):
            if dtype.name == "bfloat16":
                raw = _rounded_to_bfloat16(numbers).tobytes()
            else:
                raw = numbers.astype("<" + _CODES[dtype.name]).tobytes()
        storage = Storage(key, len(raw), InMemory(raw))
        return TensorRef(storage, dtype, numbers.shape, dense_strides(numbers.shape))

    def as_float32(self, key: str, tensor: TensorRef) -> TensorRef:
        """The tensor cast."""
        return self.tensor(key, self.numbers(tensor), BY_NAME["float32"])

    def are_equal(self, parts: Sequence[Part], *, zero: bool = False) -> bool:
        """Whether the parts have the same bits; with `zero`, whether those of +0.0 everywhere."""
        import numpy as np

        first = np.ascontiguousarray(self.numbers(parts[0].tensor)).tobytes()
        if zero and any(first):
            return False
        return all(np.ascontiguousarray(self.numbers(p.tensor)).tobytes() == first for p in parts[1:])

    def total(self, name: str, parts: Sequence[Part], *, mean: bool) -> TensorRef:
        """The sum of the parts, or their mean, added in the order of their ranks."""
        import numpy as np

        dtype = parts[0].tensor.dtype
        wide = np.dtype("f8") if dtype.name == "float64" else np.dtype("f4")
        with np.errstate(all="ignore"):
            found = np.zeros(parts[0].tensor.shape, wide)
            for part in parts:
                found = self.rounded(found + self.numbers(part.tensor).astype(wide), dtype)
            if mean:
                found = (found / wide.type(len(parts))).astype(wide)
        return self.tensor(name, found, dtype)

    def rounded(self, numbers: np.ndarray[Any, Any], dtype: DType) -> np.ndarray[Any, Any]:
        """The numbers as the type has them, in the width that they came in."""
        import numpy as np

        if dtype.name == "bfloat16":
            return (_rounded_to_bfloat16(numbers).astype("<u4") << np.uint32(16)).view("<f4")
        return numbers.astype(_CODES[dtype.name]).astype(numbers.dtype)

    def refuse_too_many(self, name: str) -> None:
        """Raises LimitExceededError."""
        raise LimitExceededError(
            f"{self._reader.uri}: {name[:200]!r} and those before it that have to be computed are more than "
            f"{MAX_SMALL_NBYTES} bytes"
        )

    def _read(self, place: ByteRange | InMemory, first: int, end: int) -> bytes:
        if isinstance(place, InMemory):
            return place.data[first:end]
        data = self._reader.read(place.offset + first, end - first)
        if place.crc32 is not None:
            confirm_crc32(self._reader.uri, place.member, crc32_of(data), place.crc32)
        return data


def _rounded_to_bfloat16(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves of float32 numbers, rounded to even; a NaN stays one."""
    import numpy as np

    bits = numbers.astype("<f4").view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), rounded).astype("<u2")
