"""Buffers of DeepSpeed's model states as `zero_to_fp32` gives them: floating numbers cast to float32."""

from __future__ import annotations

from typing import Any

from ptbin.reading.containers.deepspeed.partitions import FLOATING
from ptbin.reading.containers.part_files import PartFiles
from ptbin.values.nodes import Opaque
from ptbin.values.tensors import TensorRef

__all__ = ["Buffers"]

MAX_CAST_NBYTES = 64 << 20
"""All buffers together that are cast in memory; a model whose buffers are larger has its weights in them."""


class Buffers:
    """Casts the buffers of one checkpoint; tied ones stay tied."""

    def __init__(self, files: PartFiles) -> None:
        self._files = files
        self._nbytes = 0
        self._casts: dict[tuple[Any, ...], TensorRef | Opaque] = {}

    def as_float32(self, value: Any) -> Any:
        """A buffer as `zero_to_fp32` gives it: floating numbers as float32, anything else as it is.

        What is too large or too odd to cast here becomes an `Opaque`, an error once `fp32` is converted.
        """
        if not isinstance(value, TensorRef) or not value.dtype.name.startswith(FLOATING):
            return value
        if value.dtype.name == "float32":
            return value
        known = self._casts.get(value.layout_key())
        if known is None:
            known = self._casts[value.layout_key()] = self._cast(value)
        return known

    def _cast(self, tensor: TensorRef) -> TensorRef | Opaque:
        kind = f"{tensor.dtype.name} buffer"
        if not self._files.small.can_read(tensor):
            return Opaque(kind, "it would have to be cast to float32; --select module takes it as it is")
        first, end = tensor.span
        self._nbytes += max(end - first, tensor.storage.nbytes) + 4 * tensor.numel
        if self._nbytes > MAX_CAST_NBYTES:
            return Opaque(kind, f"buffers of more than {MAX_CAST_NBYTES} bytes to be cast to float32")
        made = self._files.small.as_float32(f"fp32/buffer/{len(self._casts)}", tensor)
        self._files.storages[made.storage.key] = made.storage
        return made
