"""What is known of a stored file once it has been read: where its tensors lie, and digests of all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ptbin.values.tensors import ByteRange, TensorRef


@dataclass(slots=True, unsafe_hash=True)  # not frozen, as in `values.tensors`
class StoredTensor:
    """Where a tensor lies in a stored file: first byte, shape and stride in elements."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    """None where the tensor is contiguous."""
    itemsize: int
    per_unit: int = 1

    @classmethod
    def of(cls, tensor: TensorRef) -> StoredTensor:
        """Of a tensor that lies in its file as plain bytes."""
        place, dtype = tensor.storage.place, tensor.dtype
        assert isinstance(place, ByteRange)
        first, stride = place.offset + tensor.span[0], None if tensor.contiguous else tensor.stride
        return cls(first, tensor.nbytes, tensor.shape, stride, dtype.itemsize, dtype.per_unit)


@dataclass(slots=True)
class FileDigests:
    """SHA-256 as hexadecimal text, CRC-32 as a number.

    Attributes:
        sha256: of the whole file.
        gaps_sha256: of the bytes that lie in no tensor that is stored contiguously, in the order of the file.
    """

    sha256: str | None = None
    gaps_sha256: str | None = None
    crc32: int = 0
    records: dict[tuple[int, int], int] = field(default_factory=dict)
    """(offset, nbytes) to CRC-32."""
    tensors: dict[StoredTensor, str] = field(default_factory=dict)
