"""Megatron-LM's `mp_rank_*` folders: the model's tensors of all ranks, as a run on one rank saves them.

A file holds what one tensor-, pipeline- and expert-parallel rank has: names of layers and experts count from
0 in each. Stages come in the order of the model: all of the first virtual chunk, then all of the second
(megatron/core/transformer/transformer_layer.py, `get_transformer_layer_offset`), so a layer's own number is
its place behind the layers of all stages before, however unevenly they were given out. How pieces of one
tensor make a whole is recipe `megatron` (`merging.megatron`). What several ranks hold must be equal.

Costs: the index of each file. Memory: one small record for each tensor of each file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

from ptbin.merging.recipes import Merge
from ptbin.merging.shipped import find_recipe
from ptbin.merging.tiles import Part
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.grouped_experts import grouped_experts
from ptbin.reading.containers.megatron import (
    Path,
    Rank,
    Sizes,
    describe_sizes,
    expert_in,
    folder_of,
    global_name,
    is_expert,
    is_grouped,
    megatron_arguments,
    megatron_facts,
    orders_of,
    piece_of,
    rank_of,
    sizes_of,
    split_like,
)
from ptbin.reading.containers.merges import merge_parts
from ptbin.reading.containers.part_files import PartFiles, Tree
from ptbin.reading.contents import role_of_content
from ptbin.reading.tree import holds_data
from ptbin.values.nodes import DictNode, Instance, Opaque
from ptbin.values.tensors import TensorRef

DEFAULT_RECIPE = "megatron"
MAX_DEPTH = 8
MAX_SHOWN = 3

_CHUNK = re.compile(r"^model(?P<n>\d{1,4})$")
_HEAD = re.compile(r"^(?P<above>(?:.*\.)?)(?:output_layer|word_embeddings_for_head)\.weight$")
_EMBEDDING = re.compile(r"(?:^|\.)word_embeddings\.weight$")
_EXTRA_STATE = "_extra_state"

# Keys of a file next to the model (megatron/training/checkpointing.py, `generate_state_dict`).
_ROLES = {
    "args": "hyperparameters",
    "optimizer": "optimizer",
    "opt_param_scheduler": "scheduler",
    "lr_scheduler": "scheduler",
    "rng_state": "random_state",
    "rerun_state_machine": "trainer_state",
}


@dataclass(slots=True)
class _Held:
    """One tensor of the whole.

    Attributes:
        path: where in the model; old models are nested mappings.
        parts: by (number among the groups of experts, number among the pieces): every copy of that piece.
    """

    path: Path
    parts: dict[tuple[int, int], list[Part]] = field(default_factory=dict)


def read_megatron_parts(folder: Folder) -> Checkpoint:
    """Index the files of all ranks.

    Raises:
        IncompleteCheckpointError: a rank's file is missing, files are of different saves, a name that no rule
            merges, an argument that nothing states.
    """
    return _Ranks(folder).read()


class _Ranks:
    def __init__(self, folder: Folder) -> None:
        self.files = PartFiles(folder)
        self.names = sorted(folder.reader.names)
        self.recipe = find_recipe(folder.recipe) if folder.recipe is not None else None
        self.sizes: Sizes | None = None
        self.facts: dict[str, int] = {}
        self.arguments: dict[str, Any] | None = None
        self.is_old = False
        self.ranks: dict[Rank, str] = {}
        # by place in the order of the model: virtual chunk, stage
        self.chunks: dict[tuple[int, int], dict[Rank, dict[str, tuple[Path, TensorRef]]]] = {}
        self.found: dict[str, _Held] = {}
        self.savers: dict[str, Any] = {}  # the number of the process that saved each file, where it says so

    def read(self) -> Checkpoint:
        root: DictNode | None = None
        place: Path = ()
        for name in self.names:
            own = self.files.open(name).root
            if not isinstance(own, DictNode):
                self.files.refuse(f"{name} holds a {type(own).__name__} and not what Megatron saves")
            if root is None:
                self._set_up(name, own)
            else:
                self._compare_sizes(name, own)
            self.savers[name] = (megatron_arguments(own) or {}).get("rank")
            place = self._take(own, name)
            root = own if root is None else root
        assert root is not None
        sizes = self._complete_sizes()
        self._refuse_exchanged(sizes)
        self._number_layers(sizes)
        self._tie()
        model = DictNode("OrderedDict")
        tree = Tree(model)
        for name, held in self.found.items():
            tree.put(held.path, self._whole(name, held, sizes))
        for held in self.found.values():
            for part in (part for parts in held.parts.values() for part in parts):
                self.files.leave_out(part.home, [part.tensor], "unviewed")  # gaps of a buffer of several
        root.pairs = [*((key, value) for key, value in root.pairs if not _is_model(key)), (place[0], model)]
        return self.files.checkpoint("megatron_parts", root, preferred=place[0], facts=self.facts)

    # -- one file --------------------------------------------------------------------------------------

    def _set_up(self, name: str, root: DictNode) -> None:
        self.arguments = megatron_arguments(root)
        self.facts = megatron_facts(root)
        if self.recipe is not None:
            own = {key: value for key, value in self.recipe.values if type(value) is int}
            self.facts |= own
        self.sizes = sizes_of(self.arguments)
        if self.arguments is not None and self.arguments.get("moe_extended_tp"):
            self.files.refuse(
                f"{name} was saved with moe_extended_tp, whose parts ptbin does not put together"
            )
        version = root.get("checkpoint_version")
        # Before version 2 a rank's rows of queries, keys and values were in another order
        # (`fix_query_key_value_ordering`).
        is_old = not (type(version) in (int, float) and version >= 2)
        self.is_old = root.get("args") is not None and is_old

    def _compare_sizes(self, name: str, root: DictNode) -> None:
        if (found := sizes_of(megatron_arguments(root))) != self.sizes:
            self.files.refuse(
                f"{name} was saved on {describe_sizes(found)}, {self.names[0]} on "
                f"{describe_sizes(self.sizes)}: the files are not of one save"
            )

    def _take(self, root: DictNode, name: str) -> Path:
        """Note every tensor of a file's model; where it lies."""
        rank = rank_of(name, self.sizes)
        if rank is None:
            self.files.refuse(f"{name} is not named as one of the files of {describe_sizes(self.sizes)}")
        if rank in self.ranks:
            self.files.refuse(f"{name} and {self.ranks[rank]} are of one rank")
        self.ranks[rank] = name
        models = [(key, value) for key, value in root.pairs if _is_model(key) and isinstance(value, DictNode)]
        if not models:
            models = [("state_dict", root)] if _is_flat(root) else []
        if not models:
            self.files.refuse(f"{name} holds no `model`")
        if models[0][1] is not root:
            rest = [(key, value) for key, value in root.pairs if not _is_model(key) and holds_data(value)]
            for key, value in rest:
                # What has no role here (an averaged copy, say) is one rank's piece: never chosen.
                self.files.leave_out(name, [value], _ROLES.get(key) or role_of_content(value))
            left = {id(value) for _, value in rest}
            root.pairs = [(key, value) for key, value in root.pairs if id(value) not in left]
        for key, model in models:
            match = _CHUNK.match(key)
            chunk = int(match["n"]) if match is not None else 0
            held = self.chunks.setdefault((chunk, rank.pipeline), {}).setdefault(rank, {})
            for path, value in _values(model, set()):
                dotted = ".".join(path)
                if path[-1].endswith(_EXTRA_STATE):
                    self.files.leave_out(name, [value], "scaling_state")
                elif isinstance(value, TensorRef):
                    held[dotted] = (path, value)
                elif isinstance(value, (DictNode, Opaque, Instance)):
                    self.files.refuse(f"{name}: {dotted[:200]!r} is neither a tensor nor a mapping")
        if models[0][1] is root:
            root.pairs = []
        return ("model" if _CHUNK.match(models[0][0]) else models[0][0],)

    def _complete_sizes(self) -> Sizes:
        """The sizes that the arguments state, or else as many as the names show. No file is missing."""
        sizes = self.sizes
        if sizes is None:
            tensor, pipeline, expert = (
                max(getattr(rank, kind) for rank in self.ranks) + 1
                for kind in ("tensor", "pipeline", "expert")
            )
            sizes = Sizes(tensor, pipeline, expert, tensor)
        if sizes.tensor % sizes.expert_tensor:
            self.files.refuse(
                f"it was saved on {describe_sizes(sizes)}, whose files do not say who holds which experts"
            )
        missing = list(islice((rank for rank in sizes.ranks() if rank not in self.ranks), MAX_SHOWN))
        if missing:
            names = [folder_of(rank, self.names[0], sizes) for rank in missing]
            more = " and others" if len(missing) == MAX_SHOWN else ""
            self.files.refuse(
                f"it was saved on {describe_sizes(sizes)}; not there: {', '.join(names)}{more}; fetch all "
                "files of this save"
            )
        return sizes

    def _refuse_exchanged(self, sizes: Sizes) -> None:
        """Raise IncompleteCheckpointError: files lie in each other's folders, or one is there twice.

        Megatron counts processes by tensor-parallel rank first, whatever the order of the others is.
        """
        for (chunk, _), stage in self.chunks.items():
            for rank, held in stage.items():
                if (rank.tensor, rank.expert) == (0, 0):
                    for dotted, (_, tensor) in held.items():
                        part = Part(tensor, self.ranks[rank])
                        self.files.note_pieces(f"{chunk} {dotted}", [part], "stages")
        order = [
            self.ranks[rank] for rank in sorted(self.ranks, key=lambda rank: (rank.pipeline, rank.tensor))
        ]
        savers = [self.savers[name] for name in order]
        if sizes.expert > 1 or not all(type(n) is int for n in savers) or len(set(savers)) < len(savers):
            return
        if savers != sorted(savers):
            at = next(at for at, pair in enumerate(pairwise(savers)) if pair[0] > pair[1])
            self.files.refuse(
                f"{order[at]} was saved by process {savers[at]}, {order[at + 1]} by process "
                f"{savers[at + 1]}: they lie in each other's folders"
            )

    # -- names of the whole ----------------------------------------------------------------------------

    def _number_layers(self, sizes: Sizes) -> None:
        """Give every tensor the name that it has in the whole: layers behind those of the stages before."""
        before: dict[str, int] = {}
        for key in sorted(self.chunks):
            counts: dict[str, dict[Rank, int]] = {}
            experts = self._experts_of_a_rank(self.chunks[key])
            rows = []
            for rank, held in self.chunks[key].items():
                for order, (dotted, (path, tensor)) in zip(
                    orders_of(held, rank, experts), held.items(), strict=True
                ):
                    name = global_name(dotted, rank, before, counts, experts)
                    rows.append((order, rank, name, path, tensor))
            rows.sort(key=lambda row: row[:2])
            for _, rank, name, path, tensor in rows:
                whole = self.found.setdefault(name, _Held(split_like(path, name)))
                piece = piece_of(name, rank, sizes)
                whole.parts.setdefault(piece, []).append(Part(tensor, self.ranks[rank]))
            for above, found in counts.items():
                self._refuse_unlike(f"layers of {above[:100]!r}", found)
                before[above] = before.get(above, 0) + max(found.values())
        expected = self.facts.get("num_layers")
        if len(before) == 1 and expected is not None and [expected] != list(before.values()):
            self.files.refuse(
                f"the stages hold {next(iter(before.values()))} layers, the arguments say {expected}: "
                "part of the model is missing, or the files are not of one save"
            )

    def _experts_of_a_rank(self, held: dict[Rank, dict[str, tuple[Path, TensorRef]]]) -> dict[str, int]:
        """How many experts each rank has, by what stands before their number."""
        found: dict[str, dict[Rank, int]] = {}
        for rank, tensors in held.items():
            for dotted in tensors:
                if (expert := expert_in(dotted)) is not None:
                    own = found.setdefault(expert[0], {})
                    own[rank] = max(own.get(rank, 0), expert[1] + 1)
        for above, counts in found.items():
            self._refuse_unlike(f"experts of {above[:100]!r}", counts)
        return {above: max(counts.values()) for above, counts in found.items()}

    def _refuse_unlike(self, what: str, counts: dict[Rank, int]) -> None:
        first, *others = counts
        for other in others:
            if counts[other] != counts[first]:
                self.files.refuse(
                    f"{self.ranks[other]} holds {counts[other]} {what}, {self.ranks[first]} {counts[first]}: "
                    "the files are not of one save"
                )

    def _tie(self) -> None:
        """Let the last stage's copy of tied embeddings be a copy of those of the first stage."""
        embeddings = [name for name in self.found if _EMBEDDING.search(name)]
        heads = [name for name in self.found if _HEAD.search(name)]
        if len(embeddings) != 1 or len(heads) != 1:
            return
        if self.facts.get("untied") != 0 and not heads[0].endswith("word_embeddings_for_head.weight"):
            return
        embedding, head = self.found[embeddings[0]], self.found.pop(heads[0])
        for piece, parts in head.parts.items():
            embedding.parts.setdefault(piece, []).extend(parts)

    # -- tensors of the whole --------------------------------------------------------------------------

    def _whole(self, name: str, held: _Held, sizes: Sizes) -> TensorRef:
        if is_grouped(name):
            return grouped_experts(self.files, name, held.parts, sizes, self.facts)
        count = sizes.expert_tensor if is_expert(name) else sizes.tensor
        if self.is_old and count > 1 and "query_key_value" in name:
            self.files.refuse(
                f"the rows of {name[:200]!r} are in the order of Megatron's checkpoint_version 0 or 1; load "
                "the checkpoint with Megatron and save it again"
            )
        absent = next((n for n in range(count) if (0, n) not in held.parts), None)
        if absent is not None:
            home = next(iter(held.parts.values()))[0].home
            others = [file for rank, file in sorted(self.ranks.items()) if rank.tensor == absent]
            self.files.refuse(
                f"{name[:200]!r} is in {home} and not in {', '.join(others[:MAX_SHOWN])}: they are not of "
                "one save"
            )
        copies = [held.parts[0, n] for n in range(count)]
        first = copies[0][0]
        other = next((own[0] for own in copies if own[0].tensor.shape != first.tensor.shape), None)
        if other is not None:  # every cut of Megatron's is even
            self.files.refuse_unlike(name, first, other)
        tensor = merge_parts(self.files, name, [own[0] for own in copies], self._merges(), self.facts)
        for own in copies:
            self.files.take_first(name, own, tensor.storage)
        return tensor

    def _merges(self) -> tuple[Merge, ...]:
        own = self.recipe.merges if self.recipe is not None else ()
        return own or find_recipe(DEFAULT_RECIPE).merges


def _is_model(key: Any) -> bool:
    return type(key) is str and (key in ("model", "state_dict") or _CHUNK.match(key) is not None)


def _is_flat(root: DictNode) -> bool:
    """Whether the file is a state dict and nothing else, as NeMo packs it."""
    return any(isinstance(value, TensorRef) for _, value in root.pairs)


def _values(model: DictNode, seen: set[int], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What lies in nested mappings; of one that was looked into before (they may hold one another) itself."""
    seen.add(id(model))
    for key, value in model.pairs:
        if type(key) is not str:
            continue
        if isinstance(value, DictNode) and id(value) not in seen and len(above) < MAX_DEPTH:
            yield from _values(value, seen, (*above, key))
        else:
            yield (*above, key), value
