"""Formats `raw` and `safetensors`: contiguous little-endian tensors in one file. Pure planning.

`raw` is nothing but the tensors, each at a multiple of 64 bytes; the index that describes them is a file of
its own (`writing.outputs`). `safetensors` puts its header in front (its README), tensors in order of falling
element size, so that each is aligned to its own. Of tied tensors it stores one; the other names go into
`__metadata__`, dropped name to kept name, as `safetensors.torch.save_model` does.
"""

from __future__ import annotations

import json
from typing import Any

from ptbin.dtypes import SAFETENSORS_NAMES
from ptbin.errors import UnsupportedTensorError
from ptbin.segments import FilePlan, Literal, PlannedTensor
from ptbin.writing.casts import Casts
from ptbin.writing.dense import DenseTensor, dense_tensors
from ptbin.writing.layout import FileLayout
from ptbin.writing.prechecks import is_checked, prechecks_for

__all__ = ["plan_raw", "plan_safetensors"]

ALIGNMENT = 64


def plan_raw(name: str, entries: list[tuple[str, Any]], casts: Casts) -> FilePlan:
    """Lay a `raw` file out; errors as `dense_tensors`."""
    layout = FileLayout()
    return _filled(name, layout, dense_tensors(entries, casts, "raw"), alignment=ALIGNMENT)


def plan_safetensors(name: str, entries: list[tuple[str, Any]], casts: Casts) -> FilePlan:
    """Lay a safetensors file out.

    Raises:
        UnsupportedTensorError: as `dense_tensors`; an element type or a name that the format has not.
    """
    tensors = dense_tensors(entries, casts, "safetensors")
    tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)
    # transformers refuses a file that does not say which framework's layout it follows
    metadata = {"format": "pt"}
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for tensor in tensors:
        kept, *dropped = tensor.names
        short = SAFETENSORS_NAMES.get(tensor.dtype.name)
        if short is None or tensor.dtype.per_unit > 1:
            raise UnsupportedTensorError(
                f"{kept!r} has element type {tensor.dtype.name}, "
                "which safetensors has not; --format raw holds it"
            )
        if {"__metadata__", *metadata} & set(tensor.names):
            raise UnsupportedTensorError(f"{kept!r} is no name that a tensor may have in safetensors")
        header[kept] = {
            "dtype": short,
            "shape": list(tensor.source.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        metadata.update(dict.fromkeys(dropped, kept))
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    layout = FileLayout()
    layout.add(Literal(len(text).to_bytes(8, "little") + text))
    return _filled(name, layout, tensors, alignment=1)


def _filled(name: str, layout: FileLayout, tensors: list[DenseTensor], *, alignment: int) -> FilePlan:
    prechecks = prechecks_for([tensor.recipes for tensor in tensors])
    planned: list[PlannedTensor] = []
    for index, tensor in enumerate(tensors):
        layout.align(alignment)
        checked = is_checked(tensor.recipes, prechecks)
        record = layout.body(str(index), tensor.recipes, checked=checked)
        planned.extend(
            PlannedTensor(label, tensor.source, tensor.dtype, None, record.offset, record.key)
            for label in tensor.names
        )
    return FilePlan(name, layout.finish(prechecks), tuple(planned))
