"""Format `safetensors`: a header of JSON, then contiguous little-endian tensors. Pure planning.

The header comes first (its README), tensors in order of falling element size, so that each is aligned to its
own. Of tied tensors it stores one; the other names go into `__metadata__`, dropped name to kept name, as
`safetensors.torch.save_model` does.
"""

from __future__ import annotations

import json
from typing import Any

from ptbin.errors import UnsupportedTensorError
from ptbin.values.dtypes import PAIRED, SAFETENSORS_NAMES
from ptbin.values.names import is_unicode
from ptbin.values.segments import FilePlan
from ptbin.writing.formats.dense import DenseTensor, dense_file, dense_tensors
from ptbin.writing.layout import FileContent, FileLayout

ALIGNMENT = 64


def plan_safetensors(file: FileContent) -> FilePlan:
    """Lay a safetensors file out.

    Raises:
        UnsupportedTensorError: as `dense_tensors`; an element type or a name that the format does not have.
    """
    tensors = dense_tensors(file, "safetensors")
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
                "which safetensors does not have; --format raw holds it"
            )
        if any(each == "__metadata__" or each in metadata for each in tensor.names):
            raise UnsupportedTensorError(f"{kept!r} is not a name that a tensor may have in safetensors")
        for each in tensor.names:
            if not is_unicode(each):
                raise UnsupportedTensorError(
                    f"the name {each!a} is not valid Unicode, which readers of safetensors refuse; "
                    "--rename it, or write another format"
                )
        header[kept] = {
            "dtype": short,
            "shape": _shape_of(kept, tensor),
            "data_offsets": [position, position + tensor.nbytes],
        }
        metadata.update(dict.fromkeys(dropped, kept))
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    layout = FileLayout()
    layout.text(len(text).to_bytes(8, "little") + text)
    return dense_file(file.name, layout, tensors, alignment=1)


def _shape_of(name: str, tensor: DenseTensor) -> list[int]:
    """As the format counts it: pairs of 4-bit numbers are two.

    Raises:
        UnsupportedTensorError: one pair without a dimension, which the format cannot tell from two numbers.
    """
    shape = list(tensor.source.shape)
    if SAFETENSORS_NAMES[tensor.dtype.name] == PAIRED:
        if not shape:
            raise UnsupportedTensorError(
                f"{name!r} is a pair of 4-bit numbers without a dimension, which safetensors cannot hold; "
                "--format raw holds it"
            )
        shape[-1] *= 2
    return shape
