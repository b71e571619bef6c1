"""DeepSpeed ZeRO folders: fp32 masters cut out of the optimizer's flat partitions, 16-bit weights beside.

A tag folder (`global_step10/`) holds one `[bf16_]zero_pp_rank_<n>_mp_rank_00_optim_states.pt` for each data
parallel rank, whose flat vectors of fp32 masters have no names, and model states that name them in order
(`param_shapes`): `mp_rank_00_model_states.pt` for stages 1 and 2, one for each rank for stage 3. The
specification is DeepSpeed's own `deepspeed/utils/zero_to_fp32.py` (0.19.8); `fp32` here has every name
that it finds, with the same bits. Names that it loses and the 16-bit module still has (parameters frozen
in stage 1, extra state) are taken from there: a state dict without them would load as if it were whole.

Costs: the index of each file that is read, and buffers that are not float32 (a few kilobytes as a rule),
because `zero_to_fp32` casts them. No parameter is read.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ptbin.errors import (
    ChecksumMismatchError,
    CorruptArchiveError,
    IncompleteCheckpointError,
    LimitExceededError,
    UnsupportedFormatError,
    UnsupportedTensorError,
)
from ptbin.reading.containers.checkpoint import Checkpoint, Folder, read_part
from ptbin.values.dtypes import BY_NAME, DType
from ptbin.values.nodes import DictNode, Global, Instance, Opaque
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import ByteRange, InMemory, Joined, Place, Storage, TensorRef, dense_strides

__all__ = ["read_deepspeed"]

_OPTIM = re.compile(
    r"^(?P<kind>bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$"
)
_MODEL = re.compile(r"^(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")

_PIPELINE = re.compile(r"^layer_\d+-(.+-)?model_states\.pt$")
_EXPERT = re.compile(r"^(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt$")

# deepspeed/runtime/zero/config.py, ZeroStageEnum: some Pythons pickle an enum as getattr(class, name)
_STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}

# Keys of the model states that say how to put the masters together (deepspeed/checkpoint/constants.py).
_LAYOUT_KEYS = frozenset(
    "module buffer_names param_shapes frozen_param_shapes frozen_param_fragments shared_params".split()
)

MAX_DIMENSIONS = 64
MAX_EXTENT = 1 << 48

MAX_CAST_NBYTES = 64 << 20
"""All buffers together that are cast in memory; a model whose buffers are larger has its weights in them."""

_CAST_FROM = {"bfloat16": "u2", "float16": "f2", "float64": "f8"}
_FLOATING = ("float", "bfloat")


def read_deepspeed(folder: Folder) -> Checkpoint:
    """Index a tag folder; `fp32` is the state dict that is meant, `module` the 16-bit weights where stored.

    Raises:
        IncompleteCheckpointError: ranks are missing; tensor or pipeline parallel, experts in other files.
        UnsupportedFormatError: partitioned experts; nothing that ZeRO wrote.
        CorruptArchiveError: shapes and partitions contradict each other.
        UnsupportedTensorError: partitions that are no plain vectors of floating numbers.
    """
    return _Folder(folder).read()


# -- flat vectors ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Vector:
    """Flat tensors, one behind the other, as one vector; offsets are elements."""

    uri: str
    dtype: DType | None = None
    pieces: list[ByteRange | InMemory] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return self.ends[-1] if self.ends else 0

    def append(self, flat: TensorRef, what: str) -> None:
        """Raises UnsupportedTensorError: the tensor is not a run of plain bytes, or of another type."""
        if self.dtype is None:
            self.dtype = flat.dtype
        if flat.dtype != self.dtype:
            raise UnsupportedTensorError(
                f"{self.uri}: {what} is {flat.dtype.name}, the partition before it {self.dtype.name}"
            )
        if flat.numel:
            self.pieces.append(_bytes_of(flat, f"{self.uri}: {what}"))
            self.ends.append(self.numel + flat.numel)

    def cut(self, start: int, numel: int) -> Iterator[ByteRange | InMemory]:
        """The elements from `start` on, which must be there, as ranges."""
        assert self.dtype is not None
        width = self.dtype.itemsize
        index = bisect.bisect_right(self.ends, start)
        while numel > 0:
            begin = self.ends[index - 1] if index else 0
            taken = min(numel, self.ends[index] - start)
            yield _slice(self.pieces[index], (start - begin) * width, taken * width)
            start, numel, index = start + taken, numel - taken, index + 1


def _bytes_of(flat: TensorRef, what: str) -> ByteRange | InMemory:
    """Where the elements of a one-dimensional tensor lie."""
    place = flat.storage.place
    if len(flat.shape) != 1 or not flat.contiguous or flat.quantizer is not None or flat.flags:
        raise UnsupportedTensorError(f"{what}: shape {list(flat.shape)}, expected one contiguous dimension")
    if not flat.dtype.name.startswith(_FLOATING):
        raise UnsupportedTensorError(f"{what}: {flat.dtype.name}, expected floating numbers")
    if flat.storage.big_endian:
        raise UnsupportedTensorError(f"{what}: stored big-endian")
    if not isinstance(place, (ByteRange, InMemory)):
        raise UnsupportedTensorError(f"{what}: stored compressed; unpack and pack the file uncompressed")
    return _slice(place, flat.storage_offset * flat.dtype.itemsize, flat.nbytes)


def _slice(place: ByteRange | InMemory, start: int, nbytes: int) -> ByteRange | InMemory:
    """Part of a place. What vouches for the whole record (its CRC-32, its framing) does not for a part."""
    if start == 0 and nbytes == place.nbytes:
        return place
    if isinstance(place, InMemory):
        return InMemory(place.data[start : start + nbytes])
    return ByteRange(place.offset + start, nbytes, member=place.member)


def _type_of(vector: _Vector) -> str:
    return "no type" if vector.dtype is None else vector.dtype.name


def _refuse_overlap(uri: str, tensors: Iterable[TensorRef]) -> None:
    """No byte may serve two tensors: a small file would unfold to any size."""
    spans = sorted((id(t.storage), *t.span) for t in tensors if t.numel)
    for (storage, _, end), (following, start, _) in itertools.pairwise(spans):
        if storage == following and start < end:
            raise CorruptArchiveError(f"{uri}: two partitions lie on the same bytes of one storage")


# -- the folder ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Rank:
    """What one file of optimizer states says.

    Attributes:
        groups: the flat tensors, one (or, stage 3, several in a row) for each parameter group.
        paddings: for each group the elements behind each parameter; None where the file has none.
        rest: the optimizer's own state.
    """

    name: str
    stage: int
    partition_count: int
    groups: list[TensorRef]
    paddings: list[list[int]] | None
    rest: Any


class _Folder:
    """One reading of one folder."""

    def __init__(self, folder: Folder) -> None:
        self.reader = folder.reader
        self.limits = folder.limits
        self.uri = folder.reader.uri
        self.storages: dict[str, Storage] = {}
        self.opened: list[tuple[str, DictNode]] = []
        self.pieces = 0
        self.cast_nbytes = 0
        self.casts: dict[tuple[Any, ...], TensorRef | Opaque] = {}
        self.optim = self._optimizer_files()
        self.opening = folder.opening(next(iter(self.optim.values())))

    def read(self) -> Checkpoint:
        ranks = self._read_ranks()
        stage, world_size = ranks[0].stage, len(ranks)
        models = self._model_files(stage, world_size)
        model = self._read_model(models[0])
        module: DictNode = model.get("module")
        fp32 = DictNode(module.kind, list(self._masters(ranks, models, model, module).items()))
        fp32.state = module.state
        root = DictNode("dict", [("fp32", fp32)])
        if stage <= 2 or self._is_whole(module, model):
            root.pairs.append(("module", module))
        taken = {"fp32", "optimizer_states", *_LAYOUT_KEYS}
        root.pairs.extend((key, value) for key, value in model.by_name().items() if key not in taken)
        root.pairs.append(("optimizer_states", DictNode("dict", [(rank.name, rank.rest) for rank in ranks])))
        return Checkpoint(
            self.uri,
            self.reader.size,
            "deepspeed_zero",
            root,
            self.opening.programs,
            self.storages,
            self.opening.vocabulary,
            preferred="fp32",
            roles={
                "fp32": "precision_copy",
                "module": "precision_copy",
                "optimizer_states": "optimizer",
            },
            excluded=list(self._excluded(ranks)),
        )

    def _excluded(self, ranks: list[_Rank]) -> Iterator[Excluded]:
        """What the tree leaves out of the files, once everything in the tree has been counted."""
        for rank in ranks:
            # Every element that a parameter owns is in `fp32`: the rest fills partitions up.
            yield Excluded(f"{rank.name} (flat partitions)", "padding", node=rank.groups)
        for name, root in self.opened:
            yield Excluded(name, "precision_copy" if _MODEL.match(name) else "optimizer", node=root)

    # -- files ---------------------------------------------------------------------------------

    def _optimizer_files(self) -> dict[int, str]:
        """Rank to file name, by rank."""
        found: dict[int, str] = {}
        kinds = set()
        for name in self.reader.names:
            if _PIPELINE.match(name) or _EXPERT.match(name):
                self._refuse_model_parallel(f"{name} is a part of it")
            match = _OPTIM.match(name) or _MODEL.match(name)
            if match is None:
                continue
            if int(match["mp"]) > 0:
                self._refuse_model_parallel(f"{name} is one")
            if match.re is _OPTIM:
                kinds.add(match["kind"])
                if found.setdefault(int(match["rank"]), name) != name:
                    raise CorruptArchiveError(
                        f"{self.uri}: {found[int(match['rank'])]} and {name} are of one rank; "
                        "two checkpoints were saved into one folder"
                    )
        if not found:
            raise UnsupportedFormatError(
                f"{self.uri}: no optimizer states of ZeRO; a universal checkpoint holds one folder for each "
                "parameter, convert the checkpoint it was made from"
            )
        if len(kinds) > 1:
            raise CorruptArchiveError(f"{self.uri}: two checkpoints, of different precision, in one folder")
        return dict(sorted(found.items()))

    def _model_files(self, stage: int, world_size: int) -> list[str]:
        """The model states: one file, or one for each rank (DeepSpeed's engine, `_get_ckpt_name`)."""
        found = {}
        for name in self.reader.names:
            match = _MODEL.match(name)
            if match is not None:
                found[None if match["rank"] is None else int(match["rank"])] = name
        if stage <= 2:
            return [self._need(found, None, "mp_rank_00_model_states.pt", "")]
        return [
            self._need(
                found, rank, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", f" of {world_size} ranks"
            )
            for rank in range(world_size)
        ]

    def _need(self, found: dict[Any, str], key: int | None, name: str, of: str) -> str:
        if key not in found:
            raise IncompleteCheckpointError(
                f"{self.uri}: {name} is missing{of}; fetch the folder again, whole"
            )
        return found[key]

    def _open(self, name: str) -> DictNode:
        checkpoint = read_part(self.reader, name, self.opening)
        self.storages.update({f"{name}/{key}": storage for key, storage in checkpoint.storages.items()})
        if not isinstance(checkpoint.root, DictNode):
            raise CorruptArchiveError(f"{self.uri}: {name} holds no mapping")
        self.opened.append((name, checkpoint.root))
        return checkpoint.root

    # -- optimizer states ----------------------------------------------------------------------

    def _read_ranks(self) -> list[_Rank]:
        """Every rank's partitions, rank 0 first."""
        lowest = next(iter(self.optim))
        first = self._read_rank(self.optim[lowest])
        world_size = first.partition_count
        stem = self.optim[lowest].partition("zero_pp_rank_")[0]
        ranks = []
        for rank in range(world_size):  # ends at the first that is missing, whatever the file claims
            name = f"{stem}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            name = self._need(self.optim, rank, name, f" of {world_size} ranks, {len(self.optim)} are there")
            ranks.append(first if rank == lowest else self._read_rank(name))
        if len(self.optim) != world_size:
            raise CorruptArchiveError(
                f"{self.uri}: optimizer states of {len(self.optim)} ranks, the files say {world_size}; "
                "some are of an earlier save"
            )
        for rank_states in ranks:
            found = (rank_states.stage, rank_states.partition_count, len(rank_states.groups))
            if found != (first.stage, world_size, len(first.groups)):
                raise CorruptArchiveError(
                    f"{self.uri}: {rank_states.name} is of ZeRO stage {found[0]} with {found[1]} partitions "
                    f"of {found[2]} groups, {first.name} of stage {first.stage} with {world_size} partitions "
                    f"of {len(first.groups)}"
                )
        return ranks

    def _read_rank(self, name: str) -> _Rank:
        states = self._open(name).get("optimizer_state_dict")
        where = f"{self.uri}: {name}"
        if not isinstance(states, DictNode):
            raise UnsupportedFormatError(f"{where}: no optimizer state of DeepSpeed's in it")
        stage = self._stage(states, where)
        if "ds_zero_partition_groups" in states.by_name():
            raise UnsupportedFormatError(
                f"{where}: experts are partitioned over groups of their own; convert it with DeepSpeed's "
                "ds_to_universal.py"
            )
        key = "single_partition_of_fp32_groups" if stage <= 2 else "fp32_flat_groups"
        groups = states.get(key)
        if not isinstance(groups, (list, tuple)) or not all(isinstance(flat, TensorRef) for flat in groups):
            raise CorruptArchiveError(f"{where}: {key} is no list of tensors")
        _refuse_overlap(where, groups)
        rest = states.get("base_optimizer_state") if stage <= 2 else states.get("optimizer_state_dict")
        return _Rank(
            name,
            stage,
            self._partition_count(states, where),
            list(groups),
            self._paddings(states, where),
            rest,
        )

    def _stage(self, states: DictNode, where: str) -> int:
        value = states.get("zero_stage")
        if isinstance(value, Instance) and isinstance(value.args, tuple) and value.args:
            if value.class_path.endswith(".ZeroStageEnum"):
                value = value.args[0]
            elif isinstance(value.cls, Global) and value.cls.name == "getattr" and len(value.args) == 2:
                value = _STAGES.get(str(value.args[1]))
        if value is None:
            raise UnsupportedFormatError(
                f"{where}: not written by ZeRO (no zero_stage); for the 16-bit weights name the file "
                "mp_rank_00_model_states.pt itself"
            )
        if type(value) is not int or not 1 <= value <= 3:
            raise UnsupportedFormatError(f"{where}: ZeRO stage {_short(value)}, expected 1, 2 or 3")
        return value

    def _partition_count(self, states: DictNode, where: str) -> int:
        value = states.get("partition_count")
        counts = value if isinstance(value, list) else [value]
        if not counts or not all(type(count) is int and count > 0 for count in counts):
            raise CorruptArchiveError(
                f"{where}: partition_count is {_short(value)}, expected a number of ranks"
            )
        if len(set(counts)) > 1:
            raise UnsupportedFormatError(
                f"{where}: groups of parameters are partitioned over {_short(sorted(set(counts)))} ranks, as "
                "experts are; convert it with DeepSpeed's ds_to_universal.py"
            )
        return int(counts[0])

    def _paddings(self, states: DictNode, where: str) -> list[list[int]] | None:
        """`param_alignment_paddings`, of DeepSpeed 0.19 and later: elements behind each parameter."""
        value = states.get("param_alignment_paddings")
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in value):
            raise CorruptArchiveError(f"{where}: param_alignment_paddings is no list of lists")
        for row in value:
            if not all(type(n) is int and 0 <= n < MAX_EXTENT for n in row):
                raise CorruptArchiveError(f"{where}: param_alignment_paddings are no numbers of elements")
        return [list(row) for row in value]

    # -- model states --------------------------------------------------------------------------

    def _read_model(self, name: str) -> DictNode:
        model = self._open(name)
        where = f"{self.uri}: {name}"
        if isinstance(model.get("ds_autoep_layers") or model.get("autoep_layers"), list):
            raise UnsupportedFormatError(
                f"{where}: experts are partitioned by AutoEP; convert it with DeepSpeed's ds_to_universal.py"
            )
        degrees = model.get("checkpoint_parallel_dimensions")
        sizes = [model.get("mp_world_size")]
        if isinstance(degrees, DictNode):
            sizes += [degrees.get("tp_degree"), degrees.get("pp_degree")]
        if any(type(size) is int and size > 1 for size in sizes):
            self._refuse_model_parallel(f"{name} says so")
        if not isinstance(model.get("module"), DictNode) or model.get("param_shapes") is None:
            raise UnsupportedFormatError(
                f"{where}: names no parameters of a ZeRO optimizer (pipeline parallel, or saved without it); "
                "convert it with DeepSpeed's ds_to_universal.py"
            )
        if not isinstance(model.get("buffer_names"), list):
            raise CorruptArchiveError(
                f"{where}: no buffer_names, so these are no model states of DeepSpeed's"
            )
        return model

    def _refuse_model_parallel(self, why: str) -> NoReturn:
        raise IncompleteCheckpointError(
            f"{self.uri}: the model is cut over tensor, pipeline or expert parallel ranks ({why}); merge it "
            "with the tool of the framework that trained it, or DeepSpeed's ds_to_universal.py"
        )

    def _shapes(self, node: Any, what: str) -> dict[str, tuple[int, ...]]:
        """Name to shape, checked."""
        if not isinstance(node, DictNode):
            raise CorruptArchiveError(f"{self.uri}: {what} is no mapping of names to shapes")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in node.pairs:
            if (
                not isinstance(name, str)
                or not isinstance(shape, (tuple, list))
                or len(shape) > MAX_DIMENSIONS
                or not all(type(n) is int and 0 <= n < MAX_EXTENT for n in shape)
            ):
                raise CorruptArchiveError(f"{self.uri}: {what} has {_short(name)} with shape {_short(shape)}")
            shapes[name] = tuple(shape)
        return shapes

    def _groups(self, model: DictNode) -> list[dict[str, tuple[int, ...]]]:
        node = model.get("param_shapes")
        if not isinstance(node, (list, tuple)):
            raise CorruptArchiveError(f"{self.uri}: param_shapes is no list of groups")
        groups: list[dict[str, tuple[int, ...]]] = []
        seen: set[str] = set()
        for entry in node:
            shapes = self._shapes(entry, "param_shapes")
            twice = next((name for name in shapes if name in seen), None)
            if twice is not None:
                raise CorruptArchiveError(f"{self.uri}: param_shapes names {_short(twice)} in two groups")
            seen.update(shapes)
            groups.append(shapes)
        return groups

    def _is_whole(self, module: DictNode, model: DictNode) -> bool:
        """Whether the module has its parameters: in stage 3 it has empty tensors in their places."""
        held = module.by_name()
        shapes = {name: shape for group in self._groups(model) for name, shape in group.items()}
        shapes.update(self._frozen_shapes(model))
        return all(isinstance(t := held.get(name), TensorRef) and t.shape == s for name, s in shapes.items())

    # -- putting together ----------------------------------------------------------------------

    def _masters(
        self, ranks: list[_Rank], models: list[str], model: DictNode, module: DictNode
    ) -> dict[str, Any]:
        """Buffers, frozen and trained parameters, ties, in the order of `zero_to_fp32`."""
        stage = ranks[0].stage
        buffer_names = {name for name in model.get("buffer_names") if isinstance(name, str)}
        held = module.by_name()
        found = {name: self._as_float32(value) for name, value in held.items() if name in buffer_names}
        found.update(self._frozen(stage, models, model))
        groups = self._groups(model)
        found.update(self._trained_2(ranks, groups) if stage <= 2 else self._trained_3(ranks, groups))
        shared = model.get("shared_params")
        for name, target in shared.pairs if isinstance(shared, DictNode) else ():
            if isinstance(name, str) and isinstance(target, str) and target in found:
                found[name] = found[target]
        for name, value in held.items():
            # In stage 3 an empty tensor stands for a parameter that lies elsewhere, or nowhere.
            if stage <= 2 or not isinstance(value, TensorRef) or value.numel:
                found.setdefault(name, value)
        return found

    def _trained_2(
        self, ranks: list[_Rank], groups: list[dict[str, tuple[int, ...]]]
    ) -> Iterator[tuple[str, TensorRef]]:
        """Stages 1 and 2: each group is one vector, cut into the ranks' partitions wherever it falls."""
        if len(groups) != len(ranks[0].groups):
            raise CorruptArchiveError(
                f"{self.uri}: param_shapes has {len(groups)} groups, the optimizer {len(ranks[0].groups)}"
            )
        # zero_to_fp32, zero2_align: the end of a group is padded to a multiple of twice the ranks
        align_to = 2 * len(ranks)
        for index, shapes in enumerate(groups):
            vector = _Vector(self.uri)
            for rank in ranks:
                vector.append(rank.groups[index], f"group {index} of {rank.name}")
            paddings = self._paddings_of(ranks[0], index, len(shapes))
            offset = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                numel = math.prod(shape)
                if offset + numel > vector.numel:
                    self._refuse_sizes(name, shape, offset, vector.numel)
                yield name, self._tensor(name, shape, vector.dtype, vector.cut(offset, numel))
                offset += numel + padding
            if -(-offset // align_to) != -(-vector.numel // align_to):
                raise CorruptArchiveError(
                    f"{self.uri}: the shapes of group {index} take {offset} elements, its partitions have "
                    f"{vector.numel} (padded to multiples of {align_to})"
                )

    def _paddings_of(self, rank: _Rank, group: int, count: int) -> Sequence[int]:
        if rank.paddings is None:
            return [0] * count
        row = rank.paddings[group] if group < len(rank.paddings) else []
        if len(row) != count:
            raise CorruptArchiveError(
                f"{self.uri}: group {group} has {count} parameters and alignment paddings for {len(row)}"
            )
        return row

    def _trained_3(
        self, ranks: list[_Rank], groups: list[dict[str, tuple[int, ...]]]
    ) -> Iterator[tuple[str, TensorRef]]:
        """Stage 3: each parameter is cut into equal parts, one for each rank, the last ones padded."""
        vectors = []
        for rank in ranks:
            vector = _Vector(self.uri)
            for index, flat in enumerate(rank.groups):
                vector.append(flat, f"group {index} of {rank.name}")
            vectors.append(vector)
        available = vectors[0].numel
        for rank, vector in zip(ranks, vectors, strict=True):
            if (vector.numel, vector.dtype) != (available, vectors[0].dtype):
                raise CorruptArchiveError(
                    f"{self.uri}: {rank.name} has {vector.numel} elements of {_type_of(vector)}, "
                    f"{ranks[0].name} {available} of {_type_of(vectors[0])}"
                )
        offset = 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            numel = math.prod(shape)
            share = -(-numel // len(ranks))
            if offset + share > available:
                self._refuse_sizes(name, shape, offset, available)
            yield name, self._shared_out(name, shape, [(vector, offset) for vector in vectors])
            offset += share
        if offset != available:
            raise CorruptArchiveError(
                f"{self.uri}: the shapes take {offset} elements of each rank, the partitions have {available}"
            )

    def _shared_out(
        self, name: str, shape: tuple[int, ...], shares: Sequence[tuple[_Vector, int]]
    ) -> TensorRef:
        """A tensor of which each rank holds ceil(numel / ranks) elements from an offset of its vector on."""
        numel = math.prod(shape)
        share = -(-numel // len(shares))
        parts = (
            part
            for rank, (vector, offset) in enumerate(shares)
            for part in vector.cut(offset, max(min(share, numel - rank * share), 0))
        )
        return self._tensor(name, shape, shares[0][0].dtype, parts)

    def _refuse_sizes(self, name: str, shape: tuple[int, ...], offset: int, available: int) -> NoReturn:
        raise CorruptArchiveError(
            f"{self.uri}: {_short(name)} of shape {list(shape)} begins at element {offset} of partitions "
            f"that have {available}"
        )

    def _tensor(
        self, name: str, shape: tuple[int, ...], dtype: DType | None, parts: Iterable[ByteRange | InMemory]
    ) -> TensorRef:
        """A new storage over the parts, and the tensor that fills it."""
        pieces = tuple(parts)
        self.pieces += len(pieces) + 1
        if self.pieces > self.limits.tensors:
            raise LimitExceededError(f"{self.uri}: more than {self.limits.tensors} pieces of tensors")
        place: Place = InMemory(b"")
        if pieces:
            place = pieces[0] if len(pieces) == 1 else Joined(pieces)
        dtype = dtype or BY_NAME["float32"]
        storage = Storage(f"fp32/{name}", math.prod(shape) * dtype.itemsize, place)
        assert place.nbytes == storage.nbytes
        self.storages[storage.key] = storage
        return TensorRef(storage, dtype, shape, dense_strides(shape))

    # -- frozen parameters -----------------------------------------------------------------------

    def _frozen_shapes(self, model: DictNode) -> dict[str, tuple[int, ...]]:
        node = model.get("frozen_param_shapes")
        return {} if node is None else self._shapes(node, "frozen_param_shapes")

    def _frozen(self, stage: int, models: list[str], model: DictNode) -> Iterator[tuple[str, TensorRef]]:
        """Parameters that no optimizer holds, in the type they were trained with."""
        shapes = self._frozen_shapes(model)
        if not shapes:
            return
        fragments = [self._fragments(models[0], model, shapes)]
        if stage <= 2:
            for name, shape in shapes.items():
                if fragments[0][name].shape != shape:
                    raise CorruptArchiveError(
                        f"{self.uri}: frozen {_short(name)} has shape {list(fragments[0][name].shape)}, "
                        f"expected {list(shape)}"
                    )
                yield name, fragments[0][name]
            return
        fragments += [self._fragments(file, self._read_model(file), shapes) for file in models[1:]]
        for name, shape in shapes.items():
            share = -(-math.prod(shape) // len(models))
            vectors = []
            for file, held in zip(models, fragments, strict=True):
                vector = _Vector(self.uri)
                vector.append(held[name], f"frozen {_short(name)} in {file}")
                if vector.numel < share or vector.dtype != fragments[0][name].dtype:
                    raise CorruptArchiveError(
                        f"{self.uri}: frozen {_short(name)} in {file} has {vector.numel} elements, a share "
                        f"of shape {list(shape)} over {len(models)} ranks has {share}"
                    )
                vectors.append((vector, 0))
            yield name, self._shared_out(name, shape, vectors)

    def _fragments(
        self, file: str, model: DictNode, shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, TensorRef]:
        node = model.get("frozen_param_fragments")
        held = node.by_name() if isinstance(node, DictNode) else {}
        for name in shapes:
            if not isinstance(held.get(name), TensorRef):
                raise CorruptArchiveError(f"{self.uri}: {file} has no fragment of frozen {_short(name)}")
        found = {name: held[name] for name in shapes}
        _refuse_overlap(f"{self.uri}: {file}", found.values())
        return found

    # -- buffers -------------------------------------------------------------------------------

    def _as_float32(self, value: Any) -> Any:
        """A buffer as `zero_to_fp32` gives it: floating numbers as float32, anything else as it is.

        What is too large or too odd to cast here becomes an `Opaque`, an error once `fp32` is converted.
        """
        if not isinstance(value, TensorRef) or not value.dtype.name.startswith(_FLOATING):
            return value
        if value.dtype.name == "float32":
            return value
        known = self.casts.get(value.layout_key())
        if known is None:
            known = self.casts[value.layout_key()] = self._cast(value)
        return known

    def _cast(self, ref: TensorRef) -> TensorRef | Opaque:
        import numpy as np

        kind = f"{ref.dtype.name} buffer"
        code, place = _CAST_FROM.get(ref.dtype.name), ref.storage.place
        if code is None or not isinstance(place, (ByteRange, InMemory)):
            return Opaque(kind, "it would have to be cast to float32; --select module takes it as it is")
        # The whole record where a CRC-32 vouches for it, which is nearly always no more than the buffer.
        whole = isinstance(place, InMemory) or place.crc32 is not None
        first, end = (0, place.nbytes) if whole else ref.span
        self.cast_nbytes += end - first + 4 * ref.numel
        if self.cast_nbytes > MAX_CAST_NBYTES:
            return Opaque(kind, f"buffers of more than {MAX_CAST_NBYTES} bytes to be cast to float32")
        data = self._read(place, first, end)
        width = ref.dtype.itemsize
        flat = np.frombuffer(
            data, np.dtype((">" if ref.storage.big_endian else "<") + code), count=len(data) // width
        )[ref.storage_offset - first // width :]
        view = np.lib.stride_tricks.as_strided(
            flat, ref.shape, tuple(step * width for step in ref.stride), writeable=False
        )
        if ref.dtype.name == "bfloat16":
            single = (view.astype("<u4") << np.uint32(16)).astype("<u4")
        else:
            with np.errstate(all="ignore"):
                single = view.astype("<f4")
        raw = single.tobytes()
        storage = Storage(f"fp32/buffer/{len(self.casts)}", len(raw), InMemory(raw))
        self.storages[storage.key] = storage
        return TensorRef(storage, BY_NAME["float32"], ref.shape, dense_strides(ref.shape))

    def _read(self, place: ByteRange | InMemory, first: int, end: int) -> bytes:
        if isinstance(place, InMemory):
            return place.data[first:end]
        data = self.reader.read(place.offset + first, end - first)
        if place.crc32 is not None and zlib.crc32(data) != place.crc32:
            raise ChecksumMismatchError(
                f"{self.uri}: {place.member} has CRC-32 {zlib.crc32(data):08x}, expected {place.crc32:08x}"
            )
        return data


def _short(value: Any) -> str:
    """A value of the file in a message; records have no contents there."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"
    if isinstance(value, (str, int, float, type(None))):
        return repr(value)[:100]
    if isinstance(value, (list, tuple)) and len(value) < 8 and all(type(n) is int for n in value):
        return f"[{', '.join(_short(n) for n in value)}]"
    return f"a {type(value).__name__}"
