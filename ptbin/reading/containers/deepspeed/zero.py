"""DeepSpeed ZeRO folders: fp32 masters cut out of the optimizer's flat partitions, and 16-bit weights.

A tag folder (`global_step10/`) holds one `[bf16_]zero_pp_rank_<n>_mp_rank_<m>_optim_states.pt` for each data-
and tensor-parallel rank, whose flat vectors of fp32 masters have no names, and model states that name them in
order (`param_shapes`): `mp_rank_<m>_model_states.pt` for stages 1 and 2, one for each rank for stage 3. The
specification is DeepSpeed's own `deepspeed/utils/zero_to_fp32.py` (0.19.8); `fp32` here has every name
that it finds, with the same bits. Names that it loses and the 16-bit module still has (parameters frozen
in stage 1, extra state) are taken from there: a state dict without them would load as if it were whole.
Tensor-parallel ranks are put together first each, then with each other (`deepspeed_rules`).

Costs: the index of each file that is read, and buffers that are not float32 (a few kilobytes as a rule),
because `zero_to_fp32` casts them. No parameter is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.merging.tiles import Part
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.deepspeed.models import Buffers, ModelStates, Shapes, mapping_in, model_files
from ptbin.reading.containers.deepspeed.optim import OptimStates, read_optim_states
from ptbin.reading.containers.deepspeed.partitions import Cutter, Vector, short
from ptbin.reading.containers.deepspeed.rules import merge_states, parallel_degree, rules_of, tensor_ranks_of
from ptbin.reading.containers.part_files import PartFiles
from ptbin.sources.deepspeed_names import MODEL_STATES, OPTIM_STATES
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import TensorRef

# Keys of the model states that say how to put the masters together (deepspeed/checkpoint/constants.py).
_LAYOUT_KEYS = frozenset(
    "module buffer_names param_shapes frozen_param_shapes frozen_param_fragments shared_params".split()
)


def read_deepspeed(folder: Folder) -> Checkpoint:
    """Index a tag folder; `fp32` is the state dict that is meant, `module` the 16-bit weights where stored.

    Raises:
        IncompleteCheckpointError: ranks are missing, or of different saves; pipeline parallel; nothing says
            how tensor-parallel ranks make a whole.
        UnsupportedFormatError: partitioned experts; nothing that ZeRO wrote.
        CorruptArchiveError: shapes and partitions contradict each other.
        UnsupportedTensorError: partitions that are not plain vectors of floating numbers.
    """
    return _Folder(PartFiles(folder)).read()


@dataclass(slots=True)
class _Slice:
    """What one tensor-parallel rank holds: masters by name, and the 16-bit module where it is stored."""

    model: ModelStates
    fp32: dict[str, Any]
    module: DictNode | None
    ranks: list[OptimStates]


class _Folder:
    """One reading of one folder."""

    def __init__(self, files: PartFiles) -> None:
        self.files = files
        self.uri = files.uri
        self.cutter = Cutter(files.uri, files.folder.limits)
        self.buffers = Buffers(files)
        self.optim = self._optimizer_files()

    def read(self) -> Checkpoint:
        slices = [self._slice(number, len(self.optim)) for number in sorted(self.optim)]
        first = slices[0]
        fp32 = DictNode(first.model.module.kind)
        fp32.state = first.model.module.state
        root = DictNode("dict", [("fp32", fp32)])
        if len(slices) == 1:
            fp32.pairs = list(first.fp32.items())
            if first.module is not None:
                root.pairs.append(("module", first.module))
        else:
            self._merge(slices, fp32, root)
        taken = {"fp32", "optimizer_states", *_LAYOUT_KEYS}
        root.pairs.extend(
            (key, value) for key, value in first.model.root.by_name().items() if key not in taken
        )
        ranks = [rank for own in slices for rank in own.ranks]
        root.pairs.append(("optimizer_states", DictNode("dict", [(rank.name, rank.rest) for rank in ranks])))
        for rank in ranks:
            # Every element that a parameter owns is in `fp32`: the rest fills partitions up.
            self.files.leave_out(f"{rank.name} (flat partitions)", rank.groups, "padding")
        for name, held in self.files.opened:
            self.files.leave_out(name, [held], "precision_copy" if MODEL_STATES.match(name) else "optimizer")
        roles = {"fp32": "precision_copy", "module": "precision_copy", "optimizer_states": "optimizer"}
        return self.files.checkpoint("deepspeed_zero", root, preferred="fp32", roles=roles)

    def _merge(self, slices: Sequence[_Slice], fp32: DictNode, root: DictNode) -> None:
        """Masters and 16-bit weights of all tensor-parallel ranks, by what the model states say."""
        first = slices[0].model
        rules = rules_of(self.files, first.root, first.names[0])
        masters = [(own.ranks[0].name, own.fp32) for own in slices]
        fp32.pairs = merge_states(self.files, masters, rules, first.buffer_names())
        if any(own.module is None for own in slices):
            return
        modules = [(own.model.names[0], own.model.module.by_name()) for own in slices]
        module = DictNode(first.module.kind, merge_states(self.files, modules, rules, first.buffer_names()))
        module.state = first.module.state
        root.pairs.append(("module", module))

    # -- files ---------------------------------------------------------------------------------

    def _optimizer_files(self) -> dict[int, dict[int, str]]:
        """Tensor-parallel rank to data-parallel rank to file name."""
        found: dict[int, dict[int, str]] = {}
        kinds = set()
        for name in self.files.reader.names:
            match = OPTIM_STATES.match(name)
            if match is None:
                continue
            kinds.add(match["kind"])
            own = found.setdefault(int(match["mp"]), {})
            if own.setdefault(int(match["rank"]), name) != name:
                raise CorruptArchiveError(
                    f"{self.uri}: {own[int(match['rank'])]} and {name} are of one rank; "
                    "two checkpoints were saved into one folder"
                )
        if not found:
            raise UnsupportedFormatError(f"{self.uri}: no optimizer states of ZeRO")
        if len(kinds) > 1:
            raise CorruptArchiveError(f"{self.uri}: two checkpoints, of different precision, in one folder")
        for number in range(max({*found, *model_files(self.files)}) + 1):
            if number not in found:
                like = next(iter(next(iter(found.values())).values()))
                missing = like.replace(f"mp_rank_{OPTIM_STATES.match(like)['mp']}", f"mp_rank_{number:02d}")  # type: ignore[index]
                self.files.refuse_missing(missing)
        return {number: dict(sorted(own.items())) for number, own in sorted(found.items())}

    def _model_files(self, number: int, stage: int, world_size: int) -> list[str]:
        """The model states: one file, or one for each rank (DeepSpeed's engine, `_get_ckpt_name`)."""
        found = model_files(self.files).get(number, {})
        tail = f"mp_rank_{number:02d}_model_states.pt"
        if stage <= 2:
            return [self._need(found, None, tail, "")]
        return [
            self._need(found, rank, f"zero_pp_rank_{rank}_{tail}", f" of {world_size} ranks")
            for rank in range(world_size)
        ]

    def _need(self, found: dict[Any, str], key: int | None, name: str, of: str) -> str:
        if key not in found:
            self.files.refuse_missing(name, of)
        return found[key]

    # -- one tensor-parallel rank ----------------------------------------------------------------

    def _slice(self, number: int, slices: int) -> _Slice:
        ranks = self._ranks(number)
        stage = ranks[0].stage
        label = "fp32/" if slices == 1 else f"fp32/mp_rank_{number:02d}/"
        model = ModelStates(self.files, self._model_files(number, stage, len(ranks)), label)
        self._refuse_other_ranks(model, slices)
        masters = self._masters(ranks, model)
        for value in masters.values():
            if isinstance(value, TensorRef) and value.storage.key.startswith("fp32/"):
                self.files.storages[value.storage.key] = value.storage
        whole = stage <= 2 or model.is_whole()
        return _Slice(model, masters, model.module if whole else None, ranks)

    def _refuse_other_ranks(self, model: ModelStates, slices: int) -> None:
        pipeline, size = parallel_degree(model.root, "pp_degree"), tensor_ranks_of(model.root)
        if (pipeline or 1) > 1 or (size is not None and size != slices):
            self.files.refuse(
                "the model is cut over tensor, pipeline or expert parallel ranks "
                f"({model.names[0]} says so), of which {slices} are here; fetch the folder again, whole, or "
                "merge it with the tool of the framework that trained it"
            )

    def _ranks(self, number: int) -> list[OptimStates]:
        """Every data-parallel rank's partitions, rank 0 first."""
        optim = self.optim[number]
        lowest = next(iter(optim))
        first = self._rank(optim[lowest])
        world_size = first.partition_count
        stem = optim[lowest].partition("zero_pp_rank_")[0]
        ranks = []
        for rank in range(world_size):  # ends at the first that is missing, whatever the file claims
            name = f"{stem}zero_pp_rank_{rank}_mp_rank_{number:02d}_optim_states.pt"
            name = self._need(optim, rank, name, f" of {world_size} ranks, {len(optim)} are there")
            ranks.append(first if rank == lowest else self._rank(name))
        if len(optim) != world_size:
            raise CorruptArchiveError(
                f"{self.uri}: optimizer states of {len(optim)} ranks, the files say {world_size}; "
                "some are of an earlier save"
            )
        for states in ranks:
            found = (states.stage, states.partition_count, len(states.groups))
            if found != (first.stage, world_size, len(first.groups)):
                raise CorruptArchiveError(
                    f"{self.uri}: {states.name} is of ZeRO stage {found[0]} with {found[1]} partitions "
                    f"of {found[2]} groups, {first.name} of stage {first.stage} with {world_size} partitions "
                    f"of {len(first.groups)}"
                )
            for index, flat in enumerate(states.groups):
                self.files.note_pieces(f"group {index} of {number}", [Part(flat, states.name)])
        return ranks

    def _rank(self, name: str) -> OptimStates:
        root = mapping_in(self.files, name)
        self.files.opened.append((name, root))
        found = read_optim_states(self.uri, name, root, self.files.small)
        for group, step in enumerate(found.steps):
            self.files.compare_counter(f"optimizer step (group {group})", name, step)
        return found

    # -- putting together ----------------------------------------------------------------------

    def _masters(self, ranks: list[OptimStates], model: ModelStates) -> dict[str, Any]:
        """Buffers, frozen and trained parameters, ties, in the order of `zero_to_fp32`."""
        stage = ranks[0].stage
        found = model.buffers(self.buffers)
        found.update(model.frozen(stage, self.cutter))
        groups = model.groups()
        cut = self._trained_2 if stage <= 2 else self._trained_3
        found.update(cut(ranks, groups, model.label))
        model.ties(found)
        for name, value in model.module.by_name().items():
            # In stage 3 an empty tensor stands for a parameter that lies elsewhere, or nowhere.
            if stage <= 2 or not isinstance(value, TensorRef) or value.numel:
                found.setdefault(name, value)
        return found

    def _trained_2(
        self, ranks: list[OptimStates], groups: list[Shapes], label: str
    ) -> Iterator[tuple[str, TensorRef]]:
        """Stages 1 and 2: each group is one vector, cut into the ranks' partitions wherever it falls."""
        if len(groups) != len(ranks[0].groups):
            raise CorruptArchiveError(
                f"{self.uri}: param_shapes has {len(groups)} groups, the optimizer {len(ranks[0].groups)}"
            )
        # zero_to_fp32, zero2_align: the end of a group is padded to a multiple of twice the ranks
        align_to = 2 * len(ranks)
        for index, shapes in enumerate(groups):
            vector = Vector(self.uri)
            for rank in ranks:
                vector.append(rank.groups[index], f"group {index} of {rank.name}")
            paddings = self._paddings_of(ranks[0], index, len(shapes))
            offset = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                numel = math.prod(shape)
                if offset + numel > vector.numel:
                    self._refuse_sizes(name, shape, offset, vector.numel)
                cut = vector.cut(offset, numel)
                yield name, self.cutter.tensor(f"{label}{name}", shape, vector.dtype, cut)
                offset += numel + padding
            if -(-offset // align_to) != -(-vector.numel // align_to):
                raise CorruptArchiveError(
                    f"{self.uri}: the shapes of group {index} take {offset} elements, its partitions have "
                    f"{vector.numel} (padded to multiples of {align_to})"
                )

    def _paddings_of(self, rank: OptimStates, group: int, count: int) -> Sequence[int]:
        if rank.paddings is None:
            return [0] * count
        row = rank.paddings[group] if group < len(rank.paddings) else []
        if len(row) != count:
            raise CorruptArchiveError(
                f"{self.uri}: group {group} has {count} parameters and alignment paddings for {len(row)}"
            )
        return row

    def _trained_3(
        self, ranks: list[OptimStates], groups: list[Shapes], label: str
    ) -> Iterator[tuple[str, TensorRef]]:
        """Stage 3: each parameter is cut into equal parts, one for each rank, the last ones padded."""
        vectors = []
        for rank in ranks:
            vector = Vector(self.uri)
            for index, flat in enumerate(rank.groups):
                vector.append(flat, f"group {index} of {rank.name}")
            vectors.append(vector)
        available = vectors[0].numel
        for rank, vector in zip(ranks, vectors, strict=True):
            if (vector.numel, vector.dtype) != (available, vectors[0].dtype):
                raise CorruptArchiveError(
                    f"{self.uri}: {rank.name} has {vector.numel} elements of {vector.type_name}, "
                    f"{ranks[0].name} {available} of {vectors[0].type_name}"
                )
        offset = 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            share = -(-math.prod(shape) // len(ranks))
            if offset + share > available:
                self._refuse_sizes(name, shape, offset, available)
            shares = [(vector, offset) for vector in vectors]
            yield name, self.cutter.shared_out(f"{label}{name}", shape, shares)
            offset += share
        if offset != available:
            raise CorruptArchiveError(
                f"{self.uri}: the shapes take {offset} elements of each rank, the partitions have {available}"
            )

    def _refuse_sizes(self, name: str, shape: tuple[int, ...], offset: int, available: int) -> NoReturn:
        raise CorruptArchiveError(
            f"{self.uri}: {short(name)} of shape {list(shape)} begins at element {offset} of partitions "
            f"that have {available}"
        )
