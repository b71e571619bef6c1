"""How tensor-parallel ranks of DeepSpeed make a whole: by `universal_checkpoint_info`, or by names.

DeepSpeed's own `ds_to_universal` uses this information (`merge_tp_slices`, 0.19): an affine map for a
parameter, or lists of patterns of names, and rows where no list has a name. Earlier GPT-NeoX and Bloom write
none: their names are known (`merging.shipped`). No rule is a guess from equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError, UnsupportedTensorError
from ptbin.merging.recipes import Merge
from ptbin.merging.shipped import find_recipe
from ptbin.merging.tiles import Part
from ptbin.merging.views import View, concatenated, view_of
from ptbin.reading.containers.deepspeed.affine_maps import is_scaled, scaled_whole, whole_of_pieces
from ptbin.reading.containers.merges import merge_parts, parts_by_name, total_of
from ptbin.reading.containers.part_files import PartFiles
from ptbin.reading.containers.patterns import Patterns
from ptbin.values.nodes import DictNode, Instance, entry_in
from ptbin.values.tensors import TensorRef

AFFINE_VERSION = 1
WIDTHS_VERSION = 0.4
"""Of the universal checkpoint, from which on the widths of sub-parameters are recorded."""

MAX_EXTENT = 1 << 48


@dataclass(frozen=True, slots=True)
class _SubParams:
    patterns: Patterns
    shape: tuple[Any, ...]
    axis: int


@dataclass(frozen=True, slots=True)
class Rules:
    """`universal_checkpoint_info`, checked, or the rules for names that are known."""

    where: str
    merges: tuple[Merge, ...] = ()
    by_name: bool = False
    affine: DictNode | None = None
    affine_patterns: Patterns | None = None
    rows_of_vocabulary: int | None = None
    lists: dict[str, Patterns] | None = None
    sub_params: tuple[_SubParams, ...] = ()
    widths: DictNode | None = None
    version: float = 0.0

    def knows(self, name: str) -> bool:
        """Whether some list or map has the name."""
        if self.by_name or self.lists is None or self.affine_patterns is None:
            return False
        found = (*self.lists.values(), self.affine_patterns, *(row.patterns for row in self.sub_params))
        return any(name in patterns for patterns in found)


def parallel_degree(root: DictNode, name: str) -> int | None:
    """`tp_degree` or `pp_degree`, where model states state it."""
    degree = entry_in(root.get("checkpoint_parallel_dimensions"), name)
    return degree if type(degree) is int else None


def tensor_ranks_of(root: DictNode) -> int | None:
    """Tensor-parallel ranks that model states count."""
    if (degree := parallel_degree(root, "tp_degree")) is not None:
        return degree
    size = root.get("mp_world_size")
    return size if type(size) is int and parallel_degree(root, "pp_degree") in (None, 1) else None


def merges_by_name(names: Sequence[str]) -> tuple[Merge, ...]:
    """The rules of Bloom for names that only it has, those of GPT-NeoX otherwise."""
    bloom = any(".self_attention." in name for name in names)
    return find_recipe("bloom-layers" if bloom else "neox-layers").merges


_LISTS = (
    "tp_replicated_parameter_patterns",
    "parameter_to_average_patterns",
    "parameter_with_2_sub_params_cat_dim_0",
    "parameter_with_row_parallelism_patterns",
    "vocabulary_parameter_patterns",
    "autotp_unsupported_parameter_patterns",
)


def rules_of(files: PartFiles, root: DictNode, name: str, recipe: str | None = None) -> Rules:
    """The rules that model states state; without any those for known names, or the recipe's.

    Raises:
        UnsupportedFormatError: information of a later format, or that is malformed.
    """
    where = f"{files.uri}: {name}: universal_checkpoint_info"
    own = find_recipe(recipe).merges if recipe is not None else ()
    info = root.get("universal_checkpoint_info")
    if own or not isinstance(info, DictNode) or not info.pairs:
        module = root.get("module")
        names = [key for key, _ in module.pairs if type(key) is str] if isinstance(module, DictNode) else []
        return Rules(where, own or merges_by_name(names), by_name=True)
    affine = info.get("affine_map")
    params = entry_in(affine, "params")
    version = affine.get("version") if isinstance(affine, DictNode) else AFFINE_VERSION
    if type(version) is not int or version > AFFINE_VERSION:
        raise UnsupportedFormatError(
            f"{where}: affine map of version {str(version)[:20]}, ptbin reads {AFFINE_VERSION}"
        )
    lists = {}
    for key in _LISTS:
        texts = info.get(key)
        lists[key] = Patterns(
            [text for text, _ in texts.pairs] if isinstance(texts, DictNode) else texts, f"{where}: {key}"
        )
    stated = info.get("universal_checkpoint_version")
    vocabulary = info.get("original_vocab_size")
    widths = info.get("sub_param_shard_widths")
    return Rules(
        where,
        affine=params if isinstance(params, DictNode) else None,
        affine_patterns=Patterns(
            [text for text, _ in params.pairs] if isinstance(params, DictNode) else (), where
        ),
        rows_of_vocabulary=vocabulary if type(vocabulary) is int and vocabulary >= 0 else None,
        lists=lists,
        sub_params=tuple(_sub_params(row, where) for row in _rows(info.get("parameter_with_sub_params"))),
        widths=widths if isinstance(widths, DictNode) else None,
        version=float(stated) if type(stated) in (int, float) else 0.0,
    )


def _rows(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _sub_params(row: Any, where: str) -> _SubParams:
    found = row.attributes() if isinstance(row, Instance) else row
    found = found if isinstance(found, DictNode) else DictNode()
    shape, axis = found.get("shape"), found.get("partition_dim")
    if (
        not isinstance(shape, (list, tuple))
        or type(axis) is not int
        or not 0 <= axis < len(shape) <= 64
        or not all(
            _is_extent(n) for size in shape for n in (size if isinstance(size, (list, tuple)) else [size])
        )
    ):
        raise UnsupportedFormatError(f"{where}: parameter_with_sub_params is not what DeepSpeed writes")
    return _SubParams(Patterns(found.get("patterns"), where), tuple(shape), axis)


def _is_extent(value: Any) -> bool:
    return type(value) is int and -1 <= value < MAX_EXTENT


def merge_ranks(
    files: PartFiles, name: str, parts: Sequence[Part], rules: Rules, *, is_buffer: bool = False
) -> TensorRef:
    """The whole of what each tensor-parallel rank holds of a name, in the order of the ranks.

    Raises:
        IncompleteCheckpointError: no rule says how, or the parts' shapes do not go together.
        UnsupportedTensorError: DeepSpeed says that it cannot be put together.
        CorruptArchiveError: the rule and the parts contradict each other.
    """
    if len(parts) == 1:
        return parts[0].tensor
    if is_buffer:
        return files.take_first(name, parts)
    if rules.by_name:
        return merge_parts(files, name, parts, rules.merges, {})
    assert rules.lists is not None
    assert rules.affine_patterns is not None
    if name in rules.lists["autotp_unsupported_parameter_patterns"]:
        raise UnsupportedTensorError(
            f"{rules.where}: {name[:200]!r} is cut in a way that DeepSpeed has no rule for"
        )
    pattern = rules.affine_patterns.find(name)
    if pattern is not None and rules.affine is not None:
        if is_scaled(rules.affine.get(pattern)):
            return scaled_whole(files, name, parts, rules.affine.get(pattern), rules.where)
        whole, copies = whole_of_pieces(name, parts, rules.affine.get(pattern), rules.where)
        tensor = _without_padding(files, name, parts, whole, rules)
        for group in copies:
            files.take_first(name, group, tensor.storage)
        for part in parts:
            files.leave_out(part.home, [part.tensor])  # what of it was not taken is in another rank's
        return tensor
    if name in rules.lists["tp_replicated_parameter_patterns"]:
        return files.take_first(name, parts)
    if name in rules.lists["parameter_to_average_patterns"]:
        return total_of(files, name, parts, mean=True)
    files.note_pieces(name, parts)
    views = [view_of(part.tensor, part.home) for part in parts]
    _refuse_unlike(files, name, parts, views)
    sub_params = next((row for row in rules.sub_params if name in row.patterns), None)
    if name in rules.lists["parameter_with_2_sub_params_cat_dim_0"]:
        halves = [-(-view.shape[0] // 2) if view.shape else 0 for view in views]
        rest = [view.shape[0] - half for view, half in zip(views, halves, strict=True) if view.shape]
        view = _interleaved(views, 0, [halves, rest])
    elif sub_params is not None:
        view = _of_sub_params(name, views, sub_params, rules)
    else:
        axis = 1 if name in rules.lists["parameter_with_row_parallelism_patterns"] else 0
        if any(len(view.shape) <= axis for view in views):
            files.refuse(
                f"{name[:200]!r} has {len(views[0].shape)} dimensions and should be cut along number {axis}"
            )
        view = concatenated(views, axis)
    return _without_padding(files, name, parts, view, rules)


def merge_states(
    files: PartFiles, states: Sequence[tuple[str, Mapping[Any, Any]]], rules: Rules, buffers: Collection[str]
) -> list[tuple[Any, Any]]:
    """The state dicts of all ranks as one, each with its file's name. Errors as `merge_ranks`."""
    merged: list[tuple[Any, Any]] = []
    ties: dict[int, TensorRef] = {}
    for key, value, parts in parts_by_name(files, states):
        if parts and id(value) not in ties:
            ties[id(value)] = merge_ranks(files, key, parts, rules, is_buffer=key in buffers)
        merged.append((key, ties.get(id(value), value)))
    return merged


def _refuse_unlike(files: PartFiles, name: str, parts: Sequence[Part], views: Sequence[View]) -> None:
    """All ranks' parts have one type and as many dimensions; which extents may differ is up to the rule."""
    for part, view in zip(parts, views, strict=True):
        alike = (view.dtype, len(view.shape)) == (views[0].dtype, len(views[0].shape))
        if not alike or sum(a != b for a, b in zip(view.shape, views[0].shape, strict=True)) > 1:
            files.refuse_unlike(name, parts[0], part)


def _interleaved(views: Sequence[View], axis: int, widths: Sequence[Sequence[int]]) -> View:
    """All ranks' pieces of the first sub-parameter, then those of the second one, and so on."""
    offsets = [0] * len(views)
    pieces = []
    for own in widths:
        for rank, width in enumerate(own):
            pieces.append(views[rank].taken(axis, offsets[rank], width))
            offsets[rank] += width
    return concatenated(pieces, axis)


def _of_sub_params(name: str, views: Sequence[View], row: _SubParams, rules: Rules) -> View:
    stated = row.shape[row.axis]
    total = sum(view.shape[row.axis] if row.axis < len(view.shape) else 0 for view in views)
    if isinstance(stated, (list, tuple)):
        sizes = tuple(stated)
    elif rules.version < WIDTHS_VERSION and stated > 0 and total % stated == 0:
        sizes = (total // stated,) * stated if stated <= total else ()
    else:
        sizes = ()
    widths = _widths_of(row, name, sizes, len(views), rules)
    logical = [sum(size) if isinstance(size, (list, tuple)) else size for size in row.shape]
    logical[row.axis] = sum(sizes)
    numel = sum(math.prod(view.shape) for view in views)
    known = math.prod(size for size in logical if size >= 0)
    if sum(size < 0 for size in logical) == 1 and known and numel % known == 0:
        logical = [numel // known if size < 0 else size for size in logical]
    shaped = []
    for rank, view in enumerate(views):
        shape = [*logical]
        shape[row.axis] = sum(own[rank] for own in widths)
        if any(size < 0 for size in shape) or math.prod(shape) != math.prod(view.shape):
            raise CorruptArchiveError(
                f"{rules.where}: {name[:200]!r} of rank {rank} is {list(view.shape)}, its "
                f"sub-parameters {shape}"
            )
        shaped.append(view.reshaped(tuple(shape)) if tuple(shape) != view.shape else view)
    return _interleaved(shaped, row.axis, widths)


def _widths_of(
    row: _SubParams, name: str, sizes: tuple[int, ...], ranks: int, rules: Rules
) -> Sequence[Sequence[int]]:
    """Of each sub-parameter how much each rank holds."""
    if rules.version >= WIDTHS_VERSION:
        found = rules.widths.get(row.patterns.find(name) or "") if rules.widths is not None else None
        widths = [list(own) for own in _rows(found) if isinstance(own, (list, tuple))]
    else:
        widths = [[size // ranks] * ranks for size in sizes]
    fits = len(widths) == len(sizes) > 0 and all(
        len(own) == ranks and all(_is_extent(n) and n >= 0 for n in own) and sum(own) == size
        for own, size in zip(widths, sizes, strict=True)
    )
    if not fits:
        raise CorruptArchiveError(
            f"{rules.where}: the widths of the sub-parameters of {name[:200]!r} do not add up over "
            f"{ranks} ranks"
        )
    return widths


def _without_padding(
    files: PartFiles, name: str, parts: Sequence[Part], view: View, rules: Rules
) -> TensorRef:
    """The tensor; of a vocabulary only as many rows as it had before it was padded."""
    assert rules.lists is not None
    what = f"{files.uri}: the parts of {name[:200]!r}"
    rows = rules.rows_of_vocabulary
    if name in rules.lists["vocabulary_parameter_patterns"] and rows is not None and view.shape[:1] > (rows,):
        view.tensor(what, name)  # proves that the parts fill what is cut off as well
        view = view.taken(0, 0, rows)
        for part in parts:
            files.leave_out(part.home, [part.tensor], "padding")
    return view.tensor(what, name, files.known_storages)
