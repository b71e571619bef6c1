"""What a selection leaves behind, by path and role. Pure.

Walks everything but the selected state dicts, from the top down. A record whose role is known by its content
is one row; a name decides where what lies below it does not look like weights; a state dict that is not taken
is a copy of the selected one, or nothing that is known. Rows without a role are what `accounting` stops at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ptbin.reading.averages import AVERAGED, RAW, is_same_model
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.contents import role_of_content
from ptbin.reading.roles import contradicts, looks_like_weights, role_of_leaf, role_of_name
from ptbin.reading.search import Candidate, Findings
from ptbin.reading.tree import as_mapping, is_branch, is_unreadable_tensor, named_children
from ptbin.values.nodes import NdArray, Opaque
from ptbin.values.state_dict import Excluded, StateDict
from ptbin.values.tensors import SparseTensor, TensorRef, TypedStorage

MAX_DEPTH = 200
MAX_LOOKS = 2_000_000
"""Records looked through where a name may decide; a part that several share is walked for each of them."""
MAX_ROWS = 10_000
"""Rows of one checkpoint; what lies deeper is put under the path above it."""


def list_left_out(
    checkpoint: Checkpoint, chosen: Sequence[StateDict], findings: Findings, *, explicit: bool
) -> list[Excluded]:
    """Everything that is not selected, in file order.

    Args:
        explicit: the caller named what to take: the rest is `not_selected` where nothing better is known.
    """
    walk = _LeftOutWalk(checkpoint, chosen, findings, explicit)
    walk.descend((), checkpoint.root, None)
    return [*walk.rows, *checkpoint.excluded]


@dataclass(slots=True)
class _LeftOutWalk:
    checkpoint: Checkpoint
    chosen: Sequence[StateDict]
    findings: Findings
    explicit: bool
    rows: list[Excluded] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    looked: int = 0
    names: dict[int, str] = field(default_factory=dict)
    """By record, what a (name, value) pair calls it: in a path it is 1."""
    taken: set[int] = field(init=False)
    candidates: dict[int, Candidate] = field(init=False)

    def __post_init__(self) -> None:
        self.taken = {node for state_dict in self.chosen for node in state_dict.nodes}
        self.candidates = {
            node: candidate
            for candidate in reversed(self.findings.candidates)
            for node in candidate.state_dict.nodes
        }

    def descend(self, steps: tuple[str, ...], node: Any, inherited: str | None) -> None:
        """List what lies below a record. Not recursive: files nest as deep as they like."""
        stack: list[tuple[tuple[str, ...], Any, str | None]] = [(steps, node, inherited)]
        while stack:
            steps, node, inherited = stack.pop()
            if id(node) in self.taken or id(node) in self.seen:
                continue
            self.seen.add(id(node))
            path = ".".join(steps) or "."
            step = steps[-1] if steps else ""
            declared = self.checkpoint.roles.get(path)
            if declared is not None:
                self.add(path, declared, node)
            elif _is_leaf(node):
                self.add(path, role_of_leaf(self.names.get(id(node), step), node, inherited), node)
            elif (content := role_of_content(node)) is not None:
                self.add(path, content, node)
            elif (candidate := self.candidates.get(id(node))) is not None:
                self.add(path, self.role_of_candidate(candidate, step, inherited), node)
            elif is_unreadable_tensor(node):
                self.add(path, inherited, node)
            else:
                named = role_of_name(step) if step else None
                role = named if named not in (None, "averaged_copy") else inherited
                if named == "averaged_copy" and isinstance(node, (list, tuple)):
                    role = named
                if role is not None:
                    below_it = self.below(node, role)
                    if below_it is None:
                        self.add(path, role, node)
                        continue
                    if below_it in ("weights", "taken") or looks_like_weights(_leaf_steps(node)):
                        role = None  # it misleads, or is that of the model and all saved with it
                if len(steps) >= MAX_DEPTH or len(self.rows) > MAX_ROWS:
                    self.add(path, role, node)
                    continue
                if isinstance(node, (list, tuple)) and len(node) == 2 and isinstance(node[0], str):
                    self.names[id(node[1])] = node[0]
                below = [
                    ((*steps, name), child, role) for name, child in named_children(as_mapping(node) or node)
                ]
                if as_mapping(node) is not None:
                    below += [((*steps, name), child, role) for name, child in named_children(node)]
                stack.extend(reversed(below))
                self.values(steps, node)

    def values(self, steps: tuple[str, ...], node: Any) -> None:
        """Plain values next to the selected state dict: nothing is lost with them, but people look for
        them.
        """
        if all(state_dict.path == "." for state_dict in self.chosen):
            return
        depth = len(steps)
        on_the_way = any(state_dict.path.split(".")[:depth] == list(steps) for state_dict in self.chosen)
        mapping = as_mapping(node)
        if mapping is None or not on_the_way:
            return
        for key, value in mapping.by_name().items():
            if not is_branch(value) and not _is_leaf(value):
                role = role_of_name(key) or "value"
                self.rows.append(
                    Excluded(".".join((*steps, key)), role, "not part of the selected state dict")
                )

    def below(self, node: Any, role: str) -> Literal["weights", "taken", "much"] | None:
        """What lies below: what looks like weights or is nothing of that role, or a state dict that is taken.

        `much` where it is too much to look through: then every part is looked at by itself.
        """
        found: Literal["taken"] | None = None
        stack: list[Any] = [node]
        seen: set[int] = set()
        while stack:
            if len(seen) >= MAX_ROWS or self.looked >= MAX_LOOKS:
                return "much"
            part = stack.pop()
            if id(part) in seen:
                continue
            seen.add(id(part))
            self.looked += 1
            if id(part) in self.taken:
                found = "taken"
                continue
            candidate = self.candidates.get(id(part))
            if candidate is not None and looks_like_weights(name for name, _ in candidate.state_dict.entries):
                return "weights"
            below = named_children(as_mapping(part) or part)
            leaves = [(step, child) for step, child in below if _is_leaf(child)]
            if contradicts(role, [leaf for _, leaf in leaves], [step for step, _ in leaves]):
                return "weights"
            for step, child in below:
                if isinstance(child, (TensorRef, SparseTensor, Opaque)):
                    if looks_like_weights((step,)):
                        return "weights"
                elif is_branch(child):
                    stack.append(child)
        return found

    def role_of_candidate(self, candidate: Candidate, step: str, inherited: str | None) -> str | None:
        found = candidate.state_dict
        if any(_same_tensors(found, taken) for taken in self.chosen):
            return "same_weights"
        named = (role_of_name(step) if step else None) or inherited
        tensors = {name: v for name, v in found.entries if isinstance(v, (TensorRef, SparseTensor))}
        if named == "loss_function":
            return named
        if named is not None and contradicts(named, tensors.values(), tensors):
            named = None
        if named not in (None, "averaged_copy") and not looks_like_weights(tensors):
            return named
        for taken in self.chosen:
            if is_same_model(found, taken):
                if candidate.role == AVERAGED:
                    return "averaged_copy"
                if candidate.role == RAW or self.is_average(taken):
                    return "raw_copy"
        return "not_selected" if self.explicit else None

    def is_average(self, taken: StateDict) -> bool:
        return any(c.role == AVERAGED and c.path == taken.path for c in self.findings.candidates)

    def add(self, path: str, role: str | None, node: Any) -> None:
        if role is None and self.explicit:
            role = "not_selected"
        if _is_leaf(node) or self.checkpoint.search.holds(node):
            self.rows.append(Excluded(path, role, node=node))
        elif "." not in path:
            self.rows.append(Excluded(path, role or "value", "not part of the selected state dict"))


def _leaf_steps(node: Any) -> list[str]:
    """Names of the tensors directly below."""
    return [step for step, child in named_children(as_mapping(node) or node) if _is_leaf(child)]


def _is_leaf(node: Any) -> bool:
    return isinstance(node, (TensorRef, SparseTensor, TypedStorage, NdArray, bytes, bytearray))


def _same_tensors(one: StateDict, other: StateDict) -> bool:
    first = {n: v.layout_key() for n, v in one.entries if isinstance(v, TensorRef)}
    second = {n: v.layout_key() for n, v in other.entries if isinstance(v, TensorRef)}
    return bool(first) and first == second
