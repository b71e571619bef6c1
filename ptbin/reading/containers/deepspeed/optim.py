"""DeepSpeed's `*_optim_states.pt`: what one rank's file says of the flat partitions of fp32 masters.

Sources: deepspeed/runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py (`state_dict`), 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.reading.containers.deepspeed.partitions import refuse_overlap, short
from ptbin.reading.containers.small_tensors import SmallTensors
from ptbin.values.nodes import DictNode, Global, Instance, entry_in
from ptbin.values.tensors import TensorRef

MAX_EXTENT = 1 << 48
MAX_STEPS = 8
"""Groups whose counters are compared."""

# deepspeed/runtime/zero/config.py, ZeroStageEnum: some Pythons pickle an enum as getattr(class, name)
_STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


@dataclass(slots=True)
class OptimStates:
    """What one file of optimizer states says.

    Attributes:
        groups: the flat tensors, one (or, stage 3, several in a row) for each parameter group.
        paddings: for each group the elements behind each parameter; None where the file has none.
        rest: the optimizer's own state.
        steps: of the optimizer, one for each group that counts them.
    """

    name: str
    stage: int
    partition_count: int
    groups: list[TensorRef]
    paddings: list[list[int]] | None
    rest: Any
    steps: tuple[float, ...]


def read_optim_states(uri: str, name: str, root: DictNode, small: SmallTensors) -> OptimStates:
    """Read and check one file's record.

    Raises:
        UnsupportedFormatError: nothing that ZeRO wrote; groups partitioned over different ranks.
        CorruptArchiveError: not what DeepSpeed writes.
    """
    states = root.get("optimizer_state_dict")
    where = f"{uri}: {name}"
    if not isinstance(states, DictNode):
        raise UnsupportedFormatError(f"{where}: no optimizer state of DeepSpeed's in it")
    stage = _stage(states, where)
    if "ds_zero_partition_groups" in states.by_name():
        raise UnsupportedFormatError(
            f"{where}: experts are partitioned over separate groups; convert it with DeepSpeed's "
            "ds_to_universal.py"
        )
    key = "single_partition_of_fp32_groups" if stage <= 2 else "fp32_flat_groups"
    groups = states.get(key)
    if not isinstance(groups, (list, tuple)) or not all(isinstance(flat, TensorRef) for flat in groups):
        raise CorruptArchiveError(f"{where}: {key} is not a list of tensors")
    refuse_overlap(where, groups)
    rest = states.get("base_optimizer_state") if stage <= 2 else states.get("optimizer_state_dict")
    return OptimStates(
        name,
        stage,
        _partition_count(states, where),
        list(groups),
        _paddings(states, where),
        rest,
        tuple(_steps(rest, small)),
    )


def _stage(states: DictNode, where: str) -> int:
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
        raise UnsupportedFormatError(f"{where}: ZeRO stage {short(value)}, expected 1, 2 or 3")
    return value


def _partition_count(states: DictNode, where: str) -> int:
    value = states.get("partition_count")
    counts = value if isinstance(value, list) else [value]
    if not counts or not all(type(count) is int and count > 0 for count in counts):
        raise CorruptArchiveError(f"{where}: partition_count is {short(value)}, expected a number of ranks")
    if len(set(counts)) > 1:
        raise UnsupportedFormatError(
            f"{where}: groups of parameters are partitioned over {short(sorted(set(counts)))} ranks, as "
            "experts are; convert it with DeepSpeed's ds_to_universal.py"
        )
    return int(counts[0])


def _paddings(states: DictNode, where: str) -> list[list[int]] | None:
    """`param_alignment_paddings`, of DeepSpeed 0.19 and later: elements behind each parameter."""
    value = states.get("param_alignment_paddings")
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in value):
        raise CorruptArchiveError(f"{where}: param_alignment_paddings is not a list of lists")
    for row in value:
        if not all(type(n) is int and 0 <= n < MAX_EXTENT for n in row):
            raise CorruptArchiveError(f"{where}: param_alignment_paddings does not hold numbers of elements")
    return [list(row) for row in value]


def _steps(rest: Any, small: SmallTensors) -> Iterator[float]:
    """The optimizer's counters, which say when the file was saved; they lie in `state`, a row for a group."""
    state = entry_in(rest, "state")
    rows = [value for _, value in state.pairs] if isinstance(state, DictNode) else []
    for row in rows[:MAX_STEPS]:
        step = small.counter(entry_in(row, "step"))
        if step is not None:
            yield step
