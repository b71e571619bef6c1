"""Parts of a name from several ranks as one tensor, by the rules of a recipe; what Megatron's kin need.

The files themselves say nothing of how a tensor was cut, so a rule does: rows, columns, equal copies, or a
sum. No rule for a name is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedTensorError
from ptbin.merging.recipes import Merge
from ptbin.merging.tiles import Part, require_plain
from ptbin.merging.views import View, concatenated, view_of
from ptbin.reading.containers.part_files import PartFiles
from ptbin.values.tensors import TensorRef


def parts_by_name(
    files: PartFiles, states: Sequence[tuple[str, Mapping[Any, Any]]]
) -> Iterator[tuple[Any, Any, list[Part]]]:
    """(name, the first file's value, a tensor's parts in the order of the files).

    Args:
        states: each file's name and what it holds. What is not a tensor is the first file's.

    Raises:
        IncompleteCheckpointError: a file has a name that another one lacks.
        CorruptArchiveError: a tensor whose key is not a name.
    """
    (home, first), *others = states
    for key, value in first.items():
        if not isinstance(value, TensorRef):
            yield key, value, []
            continue
        if type(key) is not str:
            raise CorruptArchiveError(f"{files.uri}: {home} has a key that is not a name")
        parts = [Part(value, home)]
        for name, held in others:
            other = held.get(key)
            if not isinstance(other, TensorRef):
                files.refuse(f"{key[:200]!r} is in {home} and not in {name}: they are not of one save")
            parts.append(Part(other, name))
        yield key, value, parts
    for name, held in others:
        more = next((key for key in held if key not in first), None)
        if more is not None:
            files.refuse(f"{str(more)[:200]!r} is in {name} and not in {home}: they are not of one save")
        files.leave_out(name, [value for value in held.values() if not isinstance(value, TensorRef)])


def merge_parts(
    files: PartFiles, name: str, parts: Sequence[Part], merges: Sequence[Merge], facts: Mapping[str, int]
) -> TensorRef:
    """The whole of the parts, which come in the order of their ranks.

    Raises:
        IncompleteCheckpointError: no rule says how, or the parts' shapes do not go together.
    """
    count = len(parts)
    merge = next(
        (m for m in merges if re.fullmatch(m.names, name) and _counts(files, name, count, m, facts)), None
    )
    if count == 1 and not (merge is not None and merge.cut in facts):
        return parts[0].tensor
    if merge is None:
        files.refuse(
            f"nothing says how {count} parts of {name[:200]!r} make a whole; a recipe with a `merge` "
            "rule for it does (docs/parts.md)"
        )
    if merge.how == "equal":
        return files.take_first(name, parts)
    if merge.how in ("sum", "mean"):
        return total_of(files, name, parts, mean=merge.how == "mean")
    for part in parts:
        require_plain(part, name)
    files.note_pieces(name, parts)
    first = parts[0].tensor
    groups = _copies(parts, merge, facts)
    parts = [group[0] for group in groups]
    axis = _axis(files, name, parts, merge, facts)
    for part in parts:
        shape = part.tensor.shape
        if part.tensor.dtype != first.dtype or [*shape[:axis], *shape[axis + 1 :]] != [
            *first.shape[:axis],
            *first.shape[axis + 1 :],
        ]:
            files.refuse_unlike(name, parts[0], part)
    views = [view_of(part.tensor, part.home) for part in parts]
    whole = _gated(files, name, views) if merge.how == "gated" else concatenated(views, axis)
    rows = facts.get(merge.cut, 0)
    if 0 < rows < (whole.final_shape or whole.shape)[0]:
        whole = whole.in_final_shape().taken(0, 0, rows)
        for part in parts:
            files.leave_out(part.home, [part.tensor], "padding")
    tensor = whole.tensor(f"{files.uri}: the parts of {name[:200]!r}", name, files.known_storages)
    for group in groups:
        files.take_first(name, group, tensor.storage)
    return tensor


def total_of(files: PartFiles, name: str, parts: Sequence[Part], *, mean: bool) -> TensorRef:
    """The sum of all ranks' parts, or their mean; where it comes to one of them, that one.

    A mean of equal parts is any of them, a sum of zeros is zero. Otherwise the numbers are computed and the
    parts left out under the role that says so.

    Raises:
        IncompleteCheckpointError: parts of unlike shapes or types.
        UnsupportedTensorError: parts that are not plain floating numbers.
        LimitExceededError: more of them than are computed in memory.
    """
    first = parts[0].tensor
    for part in parts:
        require_plain(part, name)
        if (part.tensor.shape, part.tensor.dtype) != (first.shape, first.dtype):
            files.refuse_unlike(name, parts[0], part)
        if not files.small.can_read(part.tensor):
            raise UnsupportedTensorError(
                f"{part.home}: {name[:200]!r} is summed over ranks and no floating numbers"
            )
    if not files.small.reserve(*(part.tensor for part in parts)):
        files.small.refuse_too_many(name)
    if files.small.are_equal(parts, zero=not mean):
        return files.take_first(name, parts)
    made = files.small.total(name, parts, mean=mean)
    files.storages[f"computed/{name}"] = made.storage
    for part in parts:
        files.leave_out(part.home, [part.tensor], "averaged" if mean else "summed")
    return made


def _counts(files: PartFiles, name: str, count: int, merge: Merge, facts: Mapping[str, int]) -> bool:
    if count > 1 and merge.when and merge.when not in facts:
        files.refuse(
            f"how {count} parts of {name[:200]!r} make a whole depends on {merge.when!r}, which the "
            "checkpoint does not state; give it in the `values` of a recipe (docs/parts.md)"
        )
    return not merge.when or facts.get(merge.when, 0) != 0


def _copies(parts: Sequence[Part], merge: Merge, facts: Mapping[str, int]) -> list[Sequence[Part]]:
    """Each piece's copies: where pieces are fewer than ranks (few key heads), neighbours hold the same."""
    pieces = facts.get(merge.heads, 0) if merge.heads else 0
    count = len(parts) // pieces if 0 < pieces < len(parts) and len(parts) % pieces == 0 else 1
    return [parts[index : index + count] for index in range(0, len(parts), count)]


def _axis(files: PartFiles, name: str, parts: Sequence[Part], merge: Merge, facts: Mapping[str, int]) -> int:
    shape = parts[0].tensor.shape
    axis = {"rows": 0, "gated": 0, "columns": 1}.get(merge.how)
    if axis is None:
        width, dim = shape[-1] if shape else 0, facts.get("dim")
        if dim is None or dim not in (width, width * len(parts)):
            files.refuse(
                f"{len(parts)} parts of {name[:200]!r} are {list(shape)}, which is neither rows nor columns "
                f"of a matrix as wide as the model's `dim` ({dim or 'which nothing states'})"
            )
        axis = 0 if width == dim else len(shape) - 1
    if axis >= len(shape):
        files.refuse(f"{name[:200]!r} has {len(shape)} dimensions and should be cut along number {axis}")
    return axis


def _gated(files: PartFiles, name: str, views: Sequence[View]) -> View:
    """All first halves of rows, then all second ones."""
    halves = []
    for view in views:
        if view.shape[0] % 2:
            files.refuse(f"{name[:200]!r} has {view.shape[0]} rows, which cannot be halved")
        halves.append(view.split(0, (2, view.shape[0] // 2)))
    whole = concatenated(halves, 1)
    return View(whole.dtype, whole.shape, whole.boxes, (2 * whole.shape[1], *whole.shape[2:]))
