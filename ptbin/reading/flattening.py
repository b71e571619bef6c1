"""One state dict of nested mappings: `{"enc": {"w": T}, "dec": {"w": T}}` as `enc.w`, `dec.w`. Pure.

Modules, mappings and sequences are followed; keys that are numbers become text. What has another role that is
known (an optimizer's state, say) stays out, and so do counters and metrics at the top of a file. Objects of
other classes are not looked into: what they hold stays unaccounted for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import LimitExceededError, NoStateDictError
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.contents import role_of_content
from ptbin.reading.modules import MAX_ENTRIES, is_module, module_state_dict
from ptbin.reading.roles import looks_like_weights, role_of_leaf, role_of_name
from ptbin.reading.search import EXTRA_STATE, is_packed, readable
from ptbin.reading.tree import as_mapping, holds_data, is_branch, is_unreadable_tensor, names_below
from ptbin.values.nodes import DictNode, Instance, NdArray, Opaque
from ptbin.values.state_dict import Excluded, StateDict
from ptbin.values.tensors import SparseTensor, TensorRef

MAX_DEPTH = 64
_STAYS_OUT = ("metrics", "random_state")


def flattened(checkpoint: Checkpoint, path: str, node: Any) -> StateDict:
    """Everything below `node`, named relative to it.

    Raises:
        NoStateDictError: no tensor below. LimitExceededError: more entries than any model has.
    """
    walk = _Walk(checkpoint, path)
    walk.container("", node, at_top=path == ".", above=())
    if not any(isinstance(value, (TensorRef, SparseTensor, Opaque)) for _, value in walk.entries):
        raise NoStateDictError(f"{checkpoint.uri}: no tensor below {path!r}")
    names = dict(walk.entries)
    return StateDict(
        path,
        "flattened",
        "OrderedDict",
        list(names.items()),
        None,
        walk.excluded,
        nodes=frozenset([id(node)]),
    )


@dataclass(slots=True)
class _Walk:
    checkpoint: Checkpoint
    path: str
    entries: list[tuple[str, Any]] = field(default_factory=list)
    excluded: list[Excluded] = field(default_factory=list)
    steps: int = 0

    def container(self, prefix: str, node: Any, *, at_top: bool, above: tuple[int, ...]) -> None:
        self.steps += 1
        if self.steps + len(self.entries) > MAX_ENTRIES:
            raise LimitExceededError(f"{self.checkpoint.uri}: more than {MAX_ENTRIES} entries to flatten")
        if id(node) in above or len(above) > MAX_DEPTH:
            self.leave_out(prefix, None, node)
            return
        if isinstance(node, Instance) and is_module(node):
            found = module_state_dict(node, self.place(prefix.rstrip(".")) if prefix else self.path)
            self.entries.extend((prefix + name, value) for name, value in found.entries)
            self.excluded.extend(found.excluded)
            return
        mapping = as_mapping(node)
        if mapping is None and not isinstance(node, (list, tuple)):
            self.leave_out(prefix, None, node)
            return
        pairs = _pairs(mapping if mapping is not None else node)
        keeps_values = mapping is not None and _is_plain_state_dict(pairs)
        # a state dict may have a parameter `step`
        at_top = at_top and not keeps_values and not looks_like_weights(_tensor_names(pairs))
        for key, value in pairs:
            if isinstance(key, str) or type(key) is int:
                self.entry(prefix, str(key), value, at_top, keeps_values, (*above, id(node)))
            elif holds_data(value):
                self.leave_out(f"{prefix}?", None, value)  # it has no name

    def entry(
        self, prefix: str, step: str, value: Any, at_top: bool, keeps_values: bool, above: tuple[int, ...]
    ) -> None:
        name = prefix + step
        if isinstance(value, (TensorRef, SparseTensor, Opaque)) or is_unreadable_tensor(value):
            role = _role_at_top(step, value) if at_top else None
            if role in _STAYS_OUT:
                self.leave_out(name, role, value)
            else:
                self.entries.append((name, readable(value)))
        elif isinstance(value, NdArray) and not value.scalar and value.data:
            self.array(name, step, value, at_top)
        elif not is_branch(value) or not holds_data(value):
            if keeps_values:
                self.entries.append((name, value))
            elif holds_data(value):
                self.leave_out(name, None, value)
        elif step.endswith(EXTRA_STATE) or is_packed(value):
            self.entries.append((name, value))
        elif (role := _other_role(step, value)) is not None:
            self.leave_out(name, role, value)
        else:
            self.container(f"{name}.", value, at_top=False, above=above)

    def array(self, name: str, step: str, value: NdArray, at_top: bool) -> None:
        role = _role_at_top(step, value) if at_top else None
        try:
            tensor = self.checkpoint.vocabulary.array_as_tensor(value)
        except ValueError:
            role = role_of_leaf(step, value, None)
            self.leave_out(name, role, value)
            return
        if role in _STAYS_OUT:
            self.leave_out(name, role, value)
        else:
            self.entries.append((name, tensor))

    def leave_out(self, name: str, role: str | None, node: Any) -> None:
        self.excluded.append(Excluded(self.place(name.rstrip(".")), role, node=node))

    def place(self, name: str) -> str:
        return name if self.path == "." else f"{self.path}.{name}"


def _pairs(node: DictNode | list[Any] | tuple[Any, ...]) -> list[tuple[Any, Any]]:
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else node.pairs


def _tensor_names(pairs: list[tuple[Any, Any]]) -> list[str]:
    return [key for key, value in pairs if isinstance(key, str) and isinstance(value, TensorRef)]


def _is_plain_state_dict(pairs: list[tuple[Any, Any]]) -> bool:
    """Tensors, and values next to them that belong to them (`_packed_params.dtype`)."""
    tensors = [value for _, value in pairs if isinstance(value, (TensorRef, SparseTensor, Opaque))]
    return bool(tensors) and not any(
        is_branch(value) and not str(key).endswith(EXTRA_STATE) and holds_data(value) and not is_packed(value)
        for key, value in pairs
    )


def _role_at_top(step: str, value: Any) -> str | None:
    """The role of a counter or a metric next to modules, by its name: a single number may be a buffer."""
    role = role_of_leaf(step, value, None)
    return None if role == "metrics" and role_of_name(step) not in ("metrics", "loss_function") else role


def _other_role(step: str, value: Any) -> str | None:
    """The role of what is certainly no part of a model."""
    content = role_of_content(value)
    if content is not None:
        return content
    role = role_of_name(step)
    if role is None or role == "averaged_copy":
        return None
    return None if looks_like_weights(names_below(value)) else role
