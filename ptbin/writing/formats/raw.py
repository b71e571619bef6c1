"""Format `raw`: contiguous little-endian tensors, each at a multiple of 64 bytes. Pure planning.

A separate file, the index, describes them.
"""

from __future__ import annotations

import json

from ptbin.values.segments import FilePlan
from ptbin.writing.formats.dense import dense_file, dense_tensors
from ptbin.writing.layout import FileContent, FileLayout

ALIGNMENT = 64


def plan_raw(file: FileContent) -> FilePlan:
    """Lay a `raw` file out; errors as `dense_tensors`."""
    return dense_file(file.name, FileLayout(), dense_tensors(file, "raw"), alignment=ALIGNMENT)


def raw_index(files: list[FilePlan]) -> bytes:
    """Where each tensor lies, of all files of an output."""
    rows = {
        tensor.name: {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.source.shape),
            "file": file.name,
            "offset": tensor.offset,
            "nbytes": tensor.nbytes,
        }
        for file in files
        for tensor in file.tensors
    }
    metadata = {
        "format": "raw",
        "version": 1,
        "byte_order": "little",
        "alignment": ALIGNMENT,
        "total_size": sum(file.plan.size for file in files),
    }
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f'{{\n  "metadata": {json.dumps(metadata)},\n  "tensors": {{\n{lines}\n  }}\n}}\n'.encode()
