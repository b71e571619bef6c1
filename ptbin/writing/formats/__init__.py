"""The output formats, each a plan: a list of segments. A new one is a module, and its name and row below.

What a format says of itself is in its row: nothing that writes asks which one it is. The proof, which shares
no code with the writing side, opens each with the reader that it is meant for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ptbin.values.segments import FilePlan
    from ptbin.writing.layout import FileContent

__all__ = ["FORMATS", "OUTPUT_SUFFIXES", "Format", "OutputFormat"]

OutputFormat = Literal["torch", "raw", "safetensors"]


@dataclass(frozen=True, slots=True)
class Format:
    """An output format.

    Attributes:
        suffix: what its files end in.
        help: what it is, for the help of `--format`; empty where the name says it.
        plan: lays one file out.
        only_tensors: whether it holds tensors under names and nothing else.
        index: text that describes the files of an output, a single one too; None where a file says it all.
    """

    suffix: str
    help: str
    plan: Callable[[FileContent], FilePlan]
    only_tensors: bool = True
    index: Callable[[list[FilePlan]], bytes] | None = None


# Imported where they are used: a listing, which asks for suffixes alone, needs none of them.


def _plan_torch(file: FileContent) -> FilePlan:
    from ptbin.writing.formats.torch_archive import plan_torch_archive

    return plan_torch_archive(file)


def _plan_raw(file: FileContent) -> FilePlan:
    from ptbin.writing.formats.raw import plan_raw

    return plan_raw(file)


def _raw_index(files: list[FilePlan]) -> bytes:
    from ptbin.writing.formats.raw import raw_index

    return raw_index(files)


def _plan_safetensors(file: FileContent) -> FilePlan:
    from ptbin.writing.formats.safetensors import plan_safetensors

    return plan_safetensors(file)


FORMATS: dict[OutputFormat, Format] = {
    "torch": Format(".bin", "as pytorch_model.bin", _plan_torch, only_tensors=False),
    "raw": Format(".bin", "bare tensors and a JSON index", _plan_raw, index=_raw_index),
    "safetensors": Format(".safetensors", "", _plan_safetensors),
}

OUTPUT_SUFFIXES: dict[OutputFormat, str] = {name: entry.suffix for name, entry in FORMATS.items()}
