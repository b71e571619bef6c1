"""From a state dict and the options to the files of one output: which, how named, what in each. Pure.

One file, or shards of at most `max_shard_size` with an index, cut as huggingface_hub cuts them: in order, a
new shard where the next tensor would not fit, tensors that share memory together, a larger one by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ptbin.errors import NoStateDictError
from ptbin.options import ConvertOptions
from ptbin.segments import FilePlan
from ptbin.state_dict import LeftOut, StateDict, tensors_of
from ptbin.tensors import SparseTensor, TensorRef
from ptbin.writing.casts import Casts
from ptbin.writing.dense_formats import plan_raw, plan_safetensors
from ptbin.writing.torch_format import plan_torch_archive

__all__ = ["OutputPlan", "plan_output"]

Entries = list[tuple[str, Any]]

INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """The files of one output: those with weights, and small texts by name."""

    files: tuple[FilePlan, ...]
    texts: tuple[tuple[str, bytes], ...] = ()


def plan_output(
    state_dict: StateDict, options: ConvertOptions, name: str, *, archive_root: str | None
) -> OutputPlan:
    """Lay an output out whose only or first name is `name` (`last.bin`).

    Values that the format cannot hold move to the state dict's `left_out`.

    Raises:
        UnsupportedTensorError: a tensor that the format cannot hold. NoStateDictError: no tensor is left.
    """
    if options.format != "torch":
        _leave_values_out(state_dict, options.format)
    casts = Casts(state_dict.entries, options.dtype)
    shards = _shards(state_dict.entries, casts, options.max_shard_size)
    files = []
    for index, entries in enumerate(shards):
        shard_name = name if len(shards) == 1 else _shard_name(name, index, len(shards))
        if options.format == "raw":
            files.append(plan_raw(shard_name, entries, casts))
        elif options.format == "safetensors":
            files.append(plan_safetensors(shard_name, entries, casts))
        else:
            files.append(
                plan_torch_archive(
                    shard_name,
                    entries,
                    mapping_kind=state_dict.mapping_kind,
                    metadata=state_dict.metadata if index == 0 else None,
                    archive_root=archive_root,
                    casts=casts,
                )
            )
    texts: list[tuple[str, bytes]] = []
    if options.format == "raw":
        texts.append((name + INDEX_SUFFIX, _raw_index(files)))
    elif len(files) > 1:
        texts.append((name + INDEX_SUFFIX, _weight_map(files)))
    return OutputPlan(tuple(files), tuple(texts))


def _leave_values_out(state_dict: StateDict, format_name: str) -> None:
    kept: Entries = []
    for name, value in state_dict.entries:
        if isinstance(value, (TensorRef, SparseTensor)):
            kept.append((name, value))
            continue
        nbytes = sum(tensor.nbytes for _, tensor in tensors_of(name, value))
        reason = f"format {format_name} holds tensors only, not a {type(value).__name__}"
        state_dict.left_out.append(LeftOut(name, nbytes, reason))
    if not kept:
        raise NoStateDictError(f"nothing in {state_dict.path!r} that format {format_name} can hold")
    if state_dict.metadata is not None:
        state_dict.left_out.append(LeftOut("_metadata", 0, f"format {format_name} holds tensors only"))
    state_dict.entries, state_dict.metadata = kept, None


def _shards(entries: Entries, casts: Casts, limit: int | None) -> list[Entries]:
    if limit is None:
        return [entries]
    home: dict[int, int] = {}
    shards: list[Entries] = [[]]
    sizes = [0]
    for name, value in entries:
        tensors = [tensor for _, tensor in tensors_of(name, value)]
        shared = {home[id(t.storage)] for t in tensors if id(t.storage) in home}
        nbytes = sum(_output_nbytes(tensor, casts) for tensor in tensors)
        if shared:
            index = max(shared)
        else:
            if shards[-1] and nbytes and sizes[-1] + nbytes > limit:
                shards.append([])
                sizes.append(0)
            index = len(shards) - 1
            sizes[index] += nbytes
        shards[index].append((name, value))
        home.update((id(tensor.storage), index) for tensor in tensors if tensor.numel)
    return shards


def _output_nbytes(tensor: TensorRef, casts: Casts) -> int:
    return (casts.of(tensor) or tensor.dtype).nbytes_of(tensor.numel)


def _shard_name(name: str, index: int, count: int) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{index + 1:05d}-of-{count:05d}.{suffix}"


def _weight_map(files: list[FilePlan]) -> bytes:
    """Hugging Face's index: `total_size` counts what is stored once, once."""
    weight_map = {}
    total = 0
    for file in files:
        total += sum({(t.record, t.offset): t.nbytes for t in file.tensors}.values())
        weight_map.update({tensor.name: file.name for tensor in file.tensors if "#" not in tensor.name})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _raw_index(files: list[FilePlan]) -> bytes:
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
        "alignment": 64,
        "total_size": sum(file.plan.size for file in files),
    }
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f'{{\n  "metadata": {json.dumps(metadata)},\n  "tensors": {{\n{lines}\n  }}\n}}\n'.encode()
