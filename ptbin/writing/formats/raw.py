"""Format `raw`: contiguous little-endian tensors, each at a multiple of 64 bytes. Pure planning.

The index that describes them is a file of its own (`writing.outputs`).
"""

from __future__ import annotations

from typing import Any

from ptbin.values.segments import FilePlan
from ptbin.writing.casts import Casts
from ptbin.writing.formats.dense import dense_file, dense_tensors
from ptbin.writing.layout import FileLayout

__all__ = ["plan_raw"]

ALIGNMENT = 64


def plan_raw(name: str, entries: list[tuple[str, Any]], casts: Casts) -> FilePlan:
    """Lay a `raw` file out; errors as `dense_tensors`."""
    return dense_file(name, FileLayout(), dense_tensors(entries, casts, "raw"), alignment=ALIGNMENT)
