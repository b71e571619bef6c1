"""From a state dict to the files of one output: which, how named, what in each. Pure.

One file, or shards of at most `max_shard_size` with an index, cut as huggingface_hub cuts them: in order, a
new shard where the next tensor would not fit, tensors that share memory together, a larger one by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.errors import NoStateDictError, UnsupportedTensorError
from ptbin.values.segments import FilePlan
from ptbin.values.state_dict import LeftOut, StateDict, tensors_of
from ptbin.values.tensors import SparseTensor, TensorRef
from ptbin.writing.casts import Casts
from ptbin.writing.formats import FORMATS, OutputFormat
from ptbin.writing.layout import FileContent

Entries = list[tuple[str, Any]]

INDEX_SUFFIX = ".index.json"
MAX_SPLIT_NAME = 100


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """The files of one output: those with weights, and small texts by name.

    Attributes:
        owners: for each file, which of the state dicts it holds.
        left_out: values that the format cannot hold and that nothing is lost with.
    """

    files: tuple[FilePlan, ...]
    texts: tuple[tuple[str, bytes], ...] = ()
    owners: tuple[int, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def plan_outputs(
    state_dicts: Sequence[StateDict],
    name: str,
    *,
    format_name: OutputFormat = "torch",
    dtype: str | None = None,
    max_shard_size: int | None = None,
    archive_root: str | None = None,
) -> OutputPlan:
    """Lay out the output of one checkpoint: `name` (`last.bin`), or one file for each of several state dicts.

    Those are called `last.<path>.bin`, the path reduced to characters that are safe in file names everywhere.
    `dtype` is what floating-point tensors are cast to; a file has up to `max_shard_size` bytes of tensors.

    Raises:
        UnsupportedTensorError: a tensor that the format cannot hold. NoStateDictError: no tensor is left.
    """
    names = [name] if len(state_dicts) == 1 else _split_names(name, [found.path for found in state_dicts])
    plans = [
        _plan_output(found, own, format_name, dtype, max_shard_size, archive_root)
        for found, own in zip(state_dicts, names, strict=True)
    ]
    return OutputPlan(
        tuple(file for plan in plans for file in plan.files),
        tuple(text for plan in plans for text in plan.texts),
        tuple(index for index, plan in enumerate(plans) for _ in plan.files),
        tuple(item for plan in plans for item in plan.left_out),
    )


def _split_names(name: str, paths: list[str]) -> list[str]:
    stem, _, suffix = name.rpartition(".")
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        # Paths come out of foreign pickles: nothing of them but plain characters reaches a file name.
        plain = re.sub(r"[^A-Za-z0-9_-]+", ".", path).strip(".")[:MAX_SPLIT_NAME] or "top"
        own, count = plain, 1
        while own.casefold() in taken:
            count += 1
            own = f"{plain}_{count}"
        taken.add(own.casefold())
        names.append(f"{stem}.{own}.{suffix}")
    return names


def _plan_output(
    state_dict: StateDict,
    name: str,
    format_name: OutputFormat,
    dtype: str | None,
    max_shard_size: int | None,
    archive_root: str | None,
) -> OutputPlan:
    all_entries, metadata = state_dict.entries, state_dict.metadata
    left: tuple[LeftOut, ...] = ()
    output_format = FORMATS[format_name]
    if output_format.only_tensors:
        all_entries, left = _leave_values_out(state_dict, format_name)
        metadata = None
    casts = Casts(all_entries, dtype)
    shards = _shards(all_entries, casts, max_shard_size)
    files = []
    for index, entries in enumerate(shards):
        shard_name = name if len(shards) == 1 else _shard_name(name, index, len(shards))
        content = FileContent(
            shard_name,
            entries,
            casts,
            state_dict.mapping_kind,
            metadata if index == 0 else None,
            archive_root,
        )
        files.append(output_format.plan(content))
    texts: list[tuple[str, bytes]] = []
    if output_format.index is not None:
        texts.append((name + INDEX_SUFFIX, output_format.index(files)))
    elif len(files) > 1:
        texts.append((name + INDEX_SUFFIX, _weight_map(files)))
    return OutputPlan(tuple(files), tuple(texts), left_out=left)


def _leave_values_out(state_dict: StateDict, format_name: str) -> tuple[Entries, tuple[LeftOut, ...]]:
    """The entries that a format of tensors alone can hold, and the values that nothing is lost with."""
    kept: Entries = []
    left: list[LeftOut] = []
    for name, value in state_dict.entries:
        if isinstance(value, (TensorRef, SparseTensor)):
            kept.append((name, value))
            continue
        if tensors_of(name, value):
            raise UnsupportedTensorError(
                f"{name!r} is a {type(value).__name__} of tensors, format {format_name} holds tensors under "
                "names only; --flatten gives them names, --format torch keeps it, "
                f"--drop '{re.escape(name)[:200]}$' leaves it out"
            )
        reason = f"format {format_name} holds tensors only, not a {type(value).__name__}"
        left.append(LeftOut(state_dict.place(name), 0, "value", reason))
    if not kept:
        raise NoStateDictError(f"nothing in {state_dict.path!r} that format {format_name} can hold")
    if state_dict.metadata is not None:
        reason = f"format {format_name} holds tensors only"
        left.append(LeftOut(state_dict.place("_metadata"), 0, "value", reason))
    return kept, tuple(left)


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
