"""Names that tensors of Megatron's ranks have in the whole model. Pure.

Layers and experts count from 0 in each rank's file: a layer's own number is its place behind the layers of
all stages before, an expert's its place behind those of the ranks before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ptbin.reading.containers.grouped_experts import is_grouped
from ptbin.reading.containers.megatron import Rank, Sizes

__all__ = ["Path", "expert_in", "global_name", "is_expert", "orders_of", "piece_of", "split_like"]

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
