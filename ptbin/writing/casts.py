"""Which tensors change their element type: floating ones, where `--dtype` asks for another type. Pure."""

from __future__ import annotations

from typing import Any

from ptbin.errors import UnsupportedTensorError
from ptbin.values.dtypes import CAST_NAMES, DType, dtype_by_name
from ptbin.values.state_dict import iter_tensors
from ptbin.values.tensors import TensorRef


class Casts:
    """The casts of one output; `target` is None where nothing is cast.

    Scales and zero points of quantized tensors stay as they are, and so does everything that is not floating.
    """

    def __init__(self, entries: list[tuple[str, Any]], target: str | None) -> None:
        self._target = dtype_by_name(target) if target is not None else None
        self._cast: set[tuple[object, ...]] = set()
        if self._target is None:
            return
        for label, tensor in iter_tensors(entries):
            fits = tensor.dtype.name in CAST_NAMES and tensor.dtype is not self._target
            if fits and not label.endswith(("#scales", "#zero_points")):
                self._cast.add(tensor.layout_key())

    def of(self, tensor: TensorRef) -> DType | None:
        """The type the tensor gets; None where it keeps its own."""
        return self._target if self._cast and tensor.layout_key() in self._cast else None

    def of_all(self, tensors: list[TensorRef], key: str) -> DType | None:
        """As `of`, for views of one storage that stay together.

        Raises:
            UnsupportedTensorError: they have several types, and one of them is to be cast.
        """
        if not self._cast:
            return None
        found = {self.of(tensor) for tensor in tensors}
        if found == {None}:
            return None
        if len(found) > 1 or len({tensor.dtype.name for tensor in tensors}) > 1:
            raise UnsupportedTensorError(
                f"storage {key!r} is viewed through several element types; it cannot be cast as one"
            )
        return found.pop()
