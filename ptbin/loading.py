"""Weights as NumPy arrays, without any framework: a lazy mapping over whatever `ptbin` reads.

    weights = ptbin.load("weights/last.bin")
    weights["encoder.weight"]            # read, or mapped, now

On local files an array is a read-only view of the mapped file where it lies there plainly; elsewhere exactly
its bytes are read, by ranged requests. bfloat16 and float8 arrays have the types of `ml_dtypes`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ptbin.dtypes import DType
from ptbin.errors import UnsupportedTensorError
from ptbin.options import ConvertOptions
from ptbin.proof.logical import iter_logical_bytes
from ptbin.reading.checkpoint import one_clear_error
from ptbin.reading.selected import read_selected
from ptbin.sources import open_source
from ptbin.tensors import ByteRange, TensorRef

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from ptbin.stores import RangeReader

__all__ = ["Weights", "load"]


def load(
    uri: str,
    *,
    select: str | None = None,
    strip_prefix: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Weights:
    """The weights at `uri`: a `.bin` of either format, safetensors, shards by their index, a checkpoint.

    Reads only the index; each array when it is asked for. Close it, or use it as a context manager.

    Args:
        select, strip_prefix: as `ConvertOptions` has them, for checkpoints.

    Raises:
        CheckpointError: it cannot be read, or is unsafe. StorageError: from the store.
    """
    reader = open_source(uri, storage_options)
    try:
        with one_clear_error(reader.uri):
            options = ConvertOptions(select=select, strip_prefix=strip_prefix)
            state_dict = read_selected(reader, options).state_dict
    except BaseException:
        reader.close()
        raise
    tensors = {name: value for name, value in state_dict.entries if isinstance(value, TensorRef)}
    return Weights(reader, tensors)


class Weights(Mapping[str, "NDArray[Any]"]):
    """Name to array, in the order of the file. Iterating over names reads nothing.

    Arrays that are views of a mapped file stay valid after `close`.
    """

    def __init__(self, reader: RangeReader, tensors: dict[str, TensorRef]) -> None:
        self._reader = reader
        self._tensors = tensors
        self._maps: dict[str, mmap.mmap] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        dtype = _numpy_dtype(name, tensor)
        mapped = self._mapped(tensor, dtype)
        return mapped if mapped is not None else self._read(tensor, dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Weights {self._reader.uri!r}: {len(self)} tensors>"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._tensors[name].shape

    def close(self) -> None:
        """Release the store; arrays not asked for until then can no longer be had."""
        self._reader.close()
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mapped(self, tensor: TensorRef, dtype: Any) -> NDArray[Any] | None:
        """A view of the mapped file; None where the bytes do not lie there as they are needed."""
        import numpy

        place = tensor.storage.place
        plain = isinstance(place, ByteRange) and not tensor.storage.big_endian and not tensor.flags
        if not plain or not tensor.numel or not self._reader.is_local:
            return None
        assert isinstance(place, ByteRange)
        first, end = tensor.span
        reader, offset = self._reader.locate(place.offset + first, end - first)
        descriptor = reader.fileno()
        if descriptor is None:
            return None
        mapping = self._maps.get(reader.uri)
        if mapping is None:
            mapping = self._maps[reader.uri] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        flat = numpy.frombuffer(mapping, dtype=numpy.uint8, count=end - first, offset=offset)
        steps = tuple(step * tensor.dtype.itemsize for step in tensor.stride)
        return numpy.ndarray(tensor.shape, dtype, flat, 0, steps)

    def _read(self, tensor: TensorRef, dtype: Any) -> NDArray[Any]:
        import numpy

        data = bytearray()
        for piece in iter_logical_bytes(tensor, self._reader):
            data += piece
        array = numpy.frombuffer(bytes(data), dtype=dtype).reshape(tensor.shape)
        if "conj" in tensor.flags:
            array = array.conj()
        return -array if "neg" in tensor.flags else array


def _numpy_dtype(name: str, tensor: TensorRef) -> Any:
    import numpy

    dtype: DType = tensor.dtype
    if dtype.numpy_name is None or tensor.quantizer is not None:
        raise UnsupportedTensorError(f"{name!r} is {dtype.name}, which NumPy has no type for")
    if dtype.name == "bfloat16" or dtype.name.startswith("float8"):
        import ml_dtypes

        return numpy.dtype(getattr(ml_dtypes, dtype.numpy_name))
    return numpy.dtype(dtype.numpy_name)
