"""What processes tell each other of tensors: type, shape and content, as JSON.

The content is a SHA-256, or the place in a mapped file that the tensor's memory still equals: then it was not
hashed, and the process that reads the file can compare it. Pure; knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.values.digests import StoredTensor
from ptbin.values.dtypes import BY_NAME
from ptbin.values.tensors import ByteRange, Storage, TensorRef

Fact = Sequence[Any]
"""(type, shape, content): content is hexadecimal text, or (offset, storage offset, stride) as in `View`. How
the type is quantized, and lazy operations (`conj`, `neg`), stand behind its name.
"""
Facts = dict[str, Fact]


@dataclass(frozen=True, slots=True)
class View:
    """A tensor in a file.

    Attributes:
        offset: where its storage begins, in bytes.
        storage_offset, stride: in elements.
    """

    offset: int
    storage_offset: int
    stride: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of_tensor(cls, tensor: TensorRef) -> View | None:
        """None where it does not lie in a file as plain bytes of this machine's order."""
        place = tensor.storage.place
        if not isinstance(place, ByteRange) or tensor.storage.big_endian:
            return None
        return cls(place.offset, tensor.storage_offset, tensor.stride, tensor.dtype.name, tensor.shape)

    def stored(self) -> StoredTensor:
        """The same for `proof.digests`."""
        storage = Storage("", 0, ByteRange(self.offset, 0))
        dtype = BY_NAME[self.dtype]
        return StoredTensor.of(TensorRef(storage, dtype, self.shape, self.stride, self.storage_offset))


def view_of(fact: Fact) -> View | None:
    """Where it lies; None where it was hashed."""
    dtype, shape, content = fact
    if isinstance(content, str):
        return None
    offset, storage_offset, stride = content
    return View(offset, storage_offset, tuple(stride), dtype.partition(" ")[0], tuple(shape))
