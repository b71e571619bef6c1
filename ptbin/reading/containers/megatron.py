"""What Megatron-LM's checkpoints say of themselves: arguments as numbers, ranks by folders, names of tensors.

Layers and experts count from 0 in each rank's file: a layer's number in the model is its place behind the
layers of all stages before, an expert's its place behind those of the ranks before.

Sources: megatron/training/arguments.py (names of arguments), checkpointing.py (`get_checkpoint_name`),
core/parallel_state.py (`RankGenerator`: which expert- and tensor-parallel ranks a rank has); NeMo's
configuration keeps most of the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptbin.reading.containers.part_files import mapping_of
from ptbin.values.nodes import DictNode

MAX_SIZE = 1 << 20
"""Of one dimension of parallelism, and of other numbers that something is made for each of."""
MAX_NUMBER = 1 << 40

_MEGATRON = re.compile(r"^mp_rank_(?P<tp>\d{2,})(?:_(?P<second>\d{3}))?(?:_(?P<third>\d{3}))?$")
_NEMO = re.compile(r"^tp_rank_(?P<tp>\d{2,})_pp_rank_(?P<pp>\d{3})$")
_KINDS = ("tensor", "pipeline", "expert")
_GATED_ACTIVATIONS = ("swiglu", "geglu", "reglu", "fast-swiglu", "fast-geglu", "fast-reglu")


def megatron_arguments(root: Any) -> dict[str, Any] | None:
    """Megatron's `args`, or NeMo's configuration; None where both are missing."""
    if not isinstance(root, DictNode):
        return None
    for path in (("args",), ("common_state", "args"), ("hyper_parameters", "cfg"), ("hyper_parameters",)):
        node: Any = root
        for step in path:
            node = mapping_of(node)
            node = node.get(step) if node is not None else None
        found = mapping_of(node)
        if found is not None and not _SIZES.isdisjoint(named := found.by_name()):
            return named
    return None


_SIZES = frozenset(["tensor_model_parallel_size", "num_attention_heads", "hidden_size"])


def megatron_facts(root: Any) -> dict[str, int]:
    """Whole numbers of the arguments, by their own names, and what follows from several of them.

    `num_query_groups`, `kv_channels` and `swiglu` (any gated unit; 0 without) are stated wherever arguments
    are; `vocab_size` only where it counts all rows that are not padding.
    """
    arguments = megatron_arguments(root)
    if arguments is None:
        return {}
    found = {
        name: int(value)
        for name, value in arguments.items()
        if type(value) in (int, bool) and 0 <= value < MAX_NUMBER
    }
    heads, width = found.get("num_attention_heads", 0), found.get("hidden_size", 0)
    if heads and (arguments.get("group_query_attention") is False or not found.get("num_query_groups")):
        found["num_query_groups"] = heads
    if not found.get("kv_channels") and heads and width % heads == 0:
        found["kv_channels"] = width // heads
    gated = found.get("swiglu") or found.get("gated_linear_unit")
    found["swiglu"] = int(bool(gated) or arguments.get("activation") in _GATED_ACTIVATIONS)
    if found.get("moe_mlp_glu_interleave_size"):
        del found["swiglu"]  # gate and up in blocks: neither one behind the other nor no gate at all
    if "untie_embeddings_and_output_weights" in found:
        found["untied"] = found["untie_embeddings_and_output_weights"]
    elif "share_embeddings_and_output_weights" in found:
        found["untied"] = 1 - found["share_embeddings_and_output_weights"]
    # Its vocabulary had one row more than the argument says in some versions and not in others.
    if not found.get("vocab_size") or "Null" in str(arguments.get("tokenizer_type")):
        found.pop("vocab_size", None)
    return found


@dataclass(frozen=True, slots=True)
class Sizes:
    """Ranks along each dimension of parallelism; `expert_tensor` divides the tensors of experts."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int

    def ranks(self) -> Iterator[Rank]:
        """Those that save, each once: one for each piece of an expert, where `expert_tensor` divides `tensor`
        (`get_expert_data_parallel_rank() == 0`). As many as a file says: take no more than are needed.
        """
        for stage in range(self.pipeline):
            for n in range(max(self.expert * self.expert_tensor, self.tensor)):
                yield Rank(n % self.tensor, stage, n // self.expert_tensor % self.expert)


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """Coordinates that a folder's name has."""

    tensor: int
    pipeline: int = 0
    expert: int = 0


def sizes_of(arguments: Mapping[str, Any] | None) -> Sizes | None:
    """What the arguments say; None where they are missing or unusable."""
    if arguments is None:
        return None

    def size(name: str, default: int) -> int:
        value = arguments.get(name)
        return value if type(value) is int and 0 < value <= MAX_SIZE else default

    tensor = size("tensor_model_parallel_size", 1)
    return Sizes(
        tensor,
        size("pipeline_model_parallel_size", 1),
        size("expert_model_parallel_size", 1),
        size("expert_tensor_parallel_size", tensor),
    )


def rank_of(name: str, sizes: Sizes | None) -> Rank | None:
    """The rank whose file this is, by its folder; None where the name and the sizes do not go together.

    A folder has the pipeline's rank only where there is a pipeline, the expert's only where experts are
    parallel: one number behind the first may be either.
    """
    folder = name.rpartition("/")[0]
    if (match := _NEMO.match(folder)) is not None:
        rank = Rank(int(match["tp"]), int(match["pp"]))
    elif (match := _MEGATRON.match(folder)) is not None:
        numbers = [int(match[key]) for key in ("second", "third") if match[key] is not None]
        kinds: tuple[str, ...] = ("pipeline", "expert")
        if sizes is not None:
            kinds = tuple(kind for kind in kinds if getattr(sizes, kind) > 1)
            if len(kinds) != len(numbers):
                return None
        rank = Rank(int(match["tp"]), **dict(zip(kinds, numbers, strict=False)))
    else:
        return None
    known = (Rank(sizes.tensor, sizes.pipeline, sizes.expert),) if sizes is not None else ()
    beyond = any(getattr(rank, kind) >= getattr(end, kind) for end in known for kind in _KINDS)
    return None if beyond else rank


def folder_of(rank: Rank, like: str, sizes: Sizes) -> str:
    """The name that the file of another rank would have."""
    folder, _, file = like.rpartition("/")
    if _NEMO.match(folder):
        return f"tp_rank_{rank.tensor:02d}_pp_rank_{rank.pipeline:03d}/{file}"
    stage = f"_{rank.pipeline:03d}" if sizes.pipeline > 1 else ""
    expert = f"_{rank.expert:03d}" if sizes.expert > 1 else ""
    return f"mp_rank_{rank.tensor:02d}{stage}{expert}/{file}"


def describe_sizes(sizes: Sizes | None) -> str:
    """The ranks of a run, for messages."""
    if sizes is None:
        return "an unknown number of ranks"
    found = f"{sizes.tensor} tensor-parallel x {sizes.pipeline} pipeline"
    if sizes.expert > 1 or sizes.expert_tensor != sizes.tensor:
        found += f" x {sizes.expert} expert-parallel ({sizes.expert_tensor} tensor-parallel in experts)"
    return found + " ranks"


# -- names in the whole model

Path = tuple[str, ...]
"""Keys of nested mappings; those of one model after megatron-core have one step."""

_LAYER = re.compile(r"^(?P<above>(?:.*?\.)?layers\.)(?P<n>\d{1,6})(?P<below>\..+)$")
_EXPERT = re.compile(
    r"^(?P<above>.*\.local_experts\.)(?P<n>\d{1,6})(?P<below>\..+)$"
    r"|^(?P<above2>.*\.experts\.linear_fc\d\.(?:weight|bias))(?P<n2>\d{1,6})$"
)
# The layers of multi-token prediction lie in one stage, all of them.
_ELSEWHERE = re.compile(r"(?:^|\.)mtp\.")
_EXPERTS = re.compile(r"\.(?:local_)?experts\.")


def is_grouped(name: str) -> bool:
    """Whether a tensor of this name is all experts of a layer."""
    return name.endswith((".experts.weight1", ".experts.weight2"))


def expert_in(dotted: str) -> tuple[str, int, str] | None:
    """What stands before an expert's number, the number, and what stands behind it."""
    match = _EXPERT.match(dotted)
    if match is None:
        return None
    return match["above"] or match["above2"], int(match["n"] or match["n2"]), match["below"] or ""


def orders_of(held: Iterable[str], rank: Rank, experts: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """Where each tensor of a rank stands in the whole: an expert behind those of lower numbers."""
    first: dict[str, int] = {}
    for index, dotted in enumerate(held):
        expert = expert_in(dotted)
        if expert is None:
            yield index, 0, 0
        else:
            above, number, _ = expert
            yield first.setdefault(above, index), rank.expert * experts[above] + number, index


def global_name(
    dotted: str,
    rank: Rank,
    before: dict[str, int],
    counts: dict[str, dict[Rank, int]],
    experts: dict[str, int],
) -> str:
    """The name in the whole model: layers follow those of earlier stages, experts those of earlier ranks."""
    if (expert := expert_in(dotted)) is not None:
        above, number, below = expert
        dotted = f"{above}{rank.expert * experts[above] + number}{below}"
    if (match := _LAYER.match(dotted)) is None or _ELSEWHERE.search(match["above"]):
        return dotted
    above, number = match["above"], int(match["n"])
    found = counts.setdefault(above, {})
    found[rank] = max(found.get(rank, 0), number + 1)
    return f"{above}{before.get(above, 0) + number}{match['below']}"


def is_expert(name: str) -> bool:
    return _EXPERTS.search(name) is not None and "shared_expert" not in name


def piece_of(name: str, rank: Rank, sizes: Sizes) -> tuple[int, int]:
    if not is_expert(name):
        return 0, rank.tensor
    return rank.expert if is_grouped(name) else 0, rank.tensor % sizes.expert_tensor


def split_like(path: Path, name: str) -> Path:
    """A dotted name as steps that have as many dots as those of a path."""
    steps = name.split(".")
    found = []
    for step in path:
        count = step.count(".") + 1
        found.append(".".join(steps[:count]))
        steps = steps[count:]
    return tuple(found)
