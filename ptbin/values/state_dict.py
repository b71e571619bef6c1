"""The value a selection ends in: names, values, and what stays behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ptbin.values.tensors import SparseTensor, Storage, TensorRef

MAX_DEPTH = 32
"""Containers inside one value; what lies deeper is not looked for tensors (`keep_writable` drops it)."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something of the source that does not go along: where, how many bytes, as what, why."""

    path: str
    nbytes: int
    role: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "nbytes": self.nbytes, "role": self.role, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Excluded:
    """A part of the source that a selection does not take.

    Attributes:
        role: what it is to a model (`reading.roles`); None where nothing says.
        node: the record itself, whose bytes `reading.accounting` counts; None for what has none.
    """

    path: str
    role: str | None
    reason: str = ""
    node: Any = None


@dataclass(slots=True)
class StateDict:
    """Names to values, in order.

    Attributes:
        path: where in the checkpoint, as `--select` takes it (`.` for the top).
        kind: `mapping`, `module`, `torchscript` or `flattened`.
        mapping_kind: class of the mapping to write (`dict` or `OrderedDict`).
        entries: (name, value); values are `TensorRef`s, `SparseTensor`s, plain values, or other
            records until `keys.keep_writable` has sorted them out.
        metadata: the mapping torch keeps as `_metadata`, if any.
        excluded: what lies inside and is not taken.
        source_names: output name to the name in the source, where they differ.
        made_of: output name to names in the source, where a recipe made it.
        nodes: identities of the records it was made of, which nothing else needs to account for.
        base: path below which its names lie, where that is not `path`.
        notes: what a reader of the manifest should know of it.
    """

    path: str
    kind: str
    mapping_kind: str
    entries: list[tuple[str, Any]]
    metadata: Any
    excluded: list[Excluded] = field(default_factory=list)
    source_names: dict[str, str] = field(default_factory=dict)
    nodes: frozenset[int] = frozenset()
    made_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    base: str | None = None
    notes: list[str] = field(default_factory=list)

    def place(self, name: str) -> str:
        """The path from the top of the checkpoint of what lies in it under a name."""
        base = self.path if self.base is None else self.base
        return ".".join(step for step in (base if base != "." else "", name) if step) or "."

    def leave_out(self, name: str, role: str, reason: str = "", node: Any = None) -> None:
        """Note that what lies in it under a name does not go along."""
        self.excluded.append(Excluded(self.place(name), role, reason, node))


def tensors_of(name: str, value: Any) -> list[tuple[str, TensorRef]]:
    """The plain tensors inside one value, named as manifests name them.

    A tensor is itself; the parts of a sparse tensor are `name#indices`, `name#values`; scales of a
    per-channel quantized tensor `name#scales`, `name#zero_points`; tensors inside a plain container
    (an `_extra_state`, say) `name.key`.
    """
    if isinstance(value, TensorRef) and value.quantizer is None:
        return [(name, value)]
    from ptbin.values.nodes import DictNode

    found: list[tuple[str, TensorRef]] = []
    seen: set[int] = set()
    stack: list[tuple[str, Any, int]] = [(name, value, 0)]
    while stack:
        label, node, depth = stack.pop()
        if isinstance(node, TensorRef):
            found.append((label, node))
            if node.quantizer is not None:
                parts = [p for p in node.quantizer if isinstance(p, TensorRef)]
                found.extend(
                    (f"{label}#{part}", p) for part, p in zip(("scales", "zero_points"), parts, strict=False)
                )
        elif isinstance(node, SparseTensor):
            found.extend((f"{label}#{part}", tensor) for part, tensor in node.parts)
        elif isinstance(node, (DictNode, list, tuple)):
            if id(node) in seen or depth > MAX_DEPTH:
                continue
            seen.add(id(node))
            if isinstance(node, DictNode):
                items = [(f"{label}.{key_label(key)}", v, depth + 1) for key, v in node.pairs if _may_hold(v)]
            else:
                items = [(f"{label}.{index}", v, depth + 1) for index, v in enumerate(node) if _may_hold(v)]
            stack.extend(reversed(items))
    return found


def key_label(key: Any) -> str:
    """A key inside a value, as part of a tensor's name in the manifest."""
    if isinstance(key, str):
        return key[:200]
    return str(key) if isinstance(key, int) and abs(key) < 1 << 63 else "?"


def _may_hold(value: Any) -> bool:
    return not isinstance(value, (str, bytes, int, float, type(None)))


def iter_tensors(entries: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, TensorRef]]:
    """The plain tensors of all entries, named as `tensors_of` names them."""
    for name, value in entries:
        yield from tensors_of(name, value)


def storages_of(entries: Iterable[tuple[str, Any]]) -> dict[int, Storage]:
    """Every storage the entries view, by identity."""
    return {id(tensor.storage): tensor.storage for _, tensor in iter_tensors(entries)}
