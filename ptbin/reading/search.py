"""The search for state dicts: what in a checkpoint could be a model, and what was rejected. Pure.

A candidate is a pickled module, or a mapping of strings whose values are tensors and plain values. States of
optimizers, schedulers and random generators are not candidates, nor is anything inside a tensor that cannot
be read. A mapping that holds tensors and cannot be taken as it is, because more of it lies in mappings below,
say, is *rejected*: what lies below it is offered for `--select` and never chosen, or a piece of a model
would pass for the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import LimitExceededError
from ptbin.options import Limits
from ptbin.reading.averages import (
    RAW,
    copies_inside,
    is_of_mmcv,
    named_by_order,
    role_of,
    roles_by_producer,
    swapped_copy,
)
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.contents import role_of_content
from ptbin.reading.modules import is_module, module_state_dict, script_state_dict
from ptbin.reading.roles import looks_like_weights, role_of_leaf, role_of_name
from ptbin.reading.tree import (
    DataSearch,
    as_mapping,
    holds_data,
    is_branch,
    is_unreadable_tensor,
    named_children,
    names_below,
)
from ptbin.values.nodes import DictNode, Global, Instance, NdArray, Opaque
from ptbin.values.state_dict import StateDict, iter_tensors
from ptbin.values.tensors import SparseTensor, TensorRef

MAX_SEARCH_DEPTH = 10

# Places whose name speaks of metrics and that are looked into all the same, and records looked at in each.
MAX_LOOKS = 2_000
LOOK_NODES = 1_000

# Names under which frameworks keep the one model (PyTorch's own tutorials, Lightning, timm, mmcv, fairseq,
# detectron2, DeepSpeed).
PRIMARY_NAMES = tuple(
    "state_dict model_state_dict model module net network weights params model_state".split()
)
EXTRA_STATE = "_extra_state"


@dataclass(slots=True)
class Candidate:
    """A place that could be the state dict.

    Attributes:
        auxiliary: found below something that is saved next to a model, or below a mapping that was rejected;
            never chosen automatically.
        role: `ema` of an averaged copy of a model's weights, `raw` of the raw weights next to an average.
    """

    path: str
    state_dict: StateDict
    tensors: int
    nbytes: int
    auxiliary: bool
    role: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "tensors": self.tensors, "nbytes": self.nbytes, "role": self.role}


@dataclass(frozen=True, slots=True)
class Rejected:
    """A mapping that holds tensors and is not a state dict as it stands: why, and which tensors directly."""

    path: str
    why: str
    tensors: tuple[str, ...] = ()


@dataclass(slots=True)
class Findings:
    """What the search found, in file order."""

    candidates: list[Candidate] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    too_deep: bool = False
    """Whether tensors lie deeper than is looked for state dicts."""


def find_state_dicts(checkpoint: Checkpoint, limits: Limits) -> Findings:
    """Every candidate in the checkpoint.

    Raises:
        LimitExceededError: a graph of more than `limits.tree_nodes` records.
    """
    found = Findings()
    roles = roles_by_producer(checkpoint.root)
    seen: set[int] = set()
    stack: list[tuple[tuple[str, ...], Any, bool, bool]] = [((), checkpoint.root, False, False)]
    visited, looks = 0, MAX_LOOKS
    while stack:
        steps, node, auxiliary, inside = stack.pop()
        if len(steps) > MAX_SEARCH_DEPTH:
            if not found.too_deep and looks > 0:
                looks -= 1
                found.too_deep = bool(names_below(node, limit=LOOK_NODES))
            continue
        if id(node) in seen or is_unreadable_tensor(node):
            continue
        seen.add(id(node))
        visited += 1
        if visited > limits.tree_nodes:
            raise LimitExceededError(
                f"{checkpoint.uri}: more than {limits.tree_nodes} records", limit="tree_nodes"
            )
        path = ".".join(steps) or "."
        if not auxiliary and steps:
            auxiliary, looks = _is_auxiliary(steps[-1], node, looks)
        content = role_of_content(node)
        if content == "loss_function":
            auxiliary = True
        elif content is not None:
            continue
        answer = as_state_dict(checkpoint, node, path, name=steps[-1] if steps else None, inside=inside)
        if isinstance(answer, StateDict):
            role = roles.get(path, role_of(path))
            found.candidates.append(_measured(answer, auxiliary or role == RAW, role))
            continue
        if isinstance(answer, Rejected):
            found.rejected.append(answer)
            auxiliary = True
        inside = inside or (isinstance(node, Instance) and as_mapping(node) is None)
        for step, child in reversed(named_children(as_mapping(node) or node)):
            # Extra state belongs to the state dict that it stands in, whatever its shape: never the model.
            if is_branch(child) and not step.endswith(EXTRA_STATE):
                stack.append(((*steps, step), child, auxiliary, inside))
    found.candidates += _averaged_copies(checkpoint, found.candidates)
    return found


def _is_auxiliary(step: str, node: Any, looks: int) -> tuple[bool, int]:
    """Whether a name says that something is saved next to a model, and how many looks below are left.

    `best_state` may well be the model.
    """
    role = role_of_name(step)
    if role in (None, "averaged_copy"):
        return False, looks
    if role != "metrics" or not looks:
        return True, looks
    return not looks_like_weights(names_below(node, limit=LOOK_NODES)), looks - 1


def _averaged_copies(checkpoint: Checkpoint, candidates: list[Candidate]) -> list[Candidate]:
    """Averages inside other state dicts; offered, never chosen."""
    main = [c.state_dict for c in candidates if not c.auxiliary]
    copies = [copies_inside(state_dict) for state_dict in main]
    if is_of_mmcv(checkpoint.root):
        copies += [swapped_copy(state_dict) for state_dict in main]
    copies.append(named_by_order(checkpoint.root, main))
    return [_measured(copy, True, role_of(copy.path)) for copy in copies if copy is not None]


def _measured(state_dict: StateDict, auxiliary: bool, role: str | None) -> Candidate:
    tensors = [tensor for _, tensor in iter_tensors(state_dict.entries)]
    count, storages = len(tensors), {id(tensor.storage): tensor.storage for tensor in tensors}
    nbytes = sum(storage.nbytes for storage in storages.values())
    return Candidate(state_dict.path, state_dict, count, nbytes, auxiliary, role)


def as_state_dict(
    checkpoint: Checkpoint,
    node: Any,
    path: str,
    *,
    name: str | None = None,
    inside: bool = False,
    named_by_user: bool = False,
) -> StateDict | Rejected | None:
    """The node as a state dict; why it is not one although it holds tensors; or None.

    Args:
        name: the last step of its path, None at the top.
        inside: it is an attribute of an object, where not every mapping of tensors is a model.
        named_by_user: take any mapping with a tensor in it, as `torch.load` gives it.
    """
    if isinstance(node, Instance):
        found = None
        if is_module(node):
            found = module_state_dict(node, path)
        elif checkpoint.script_classes and node.class_path.startswith("__torch__"):
            found = script_state_dict(node, path, checkpoint.script_classes)
        if found is not None:
            found.nodes = frozenset([id(node)])
            return found if any(_is_tensor(value) for _, value in found.entries) else None
    mapping = as_mapping(node)
    if mapping is None:
        return None
    if named_by_user:
        return _named_mapping(checkpoint, node, mapping, path)
    return _strict_mapping(checkpoint, node, mapping, path, name, inside=inside)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (TensorRef, SparseTensor, Opaque)) or is_unreadable_tensor(value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, Opaque) and not value.has_data


def _strict_mapping(
    checkpoint: Checkpoint, node: Any, mapping: DictNode, path: str, name: str | None, *, inside: bool
) -> StateDict | Rejected | None:
    """A mapping that can hardly be anything but a state dict."""
    named = mapping.by_name()
    tensors = {key: value for key, value in named.items() if _is_tensor(value) and not _is_empty(value)}
    if not tensors and any(isinstance(value, Opaque) for value in named.values()):
        # meta tensors alone, which are refused by what they are; no model if there is one next to them
        return _state_dict_of(node, path, mapping, list(named.items())) if not holds_data(mapping) else None
    if not tensors:
        arrays = _of_arrays(checkpoint, named) if len(named) == len(mapping.pairs) else None
        if arrays is not None:
            return _state_dict_of(node, path, mapping, list(arrays.items()))
        if any(_is_tensor(value) for key, value in mapping.pairs if type(key) is not str):
            return Rejected(path, "its keys are not names")
        return None
    roles: set[str | None] = set()
    for key, value in tensors.items():
        roles.add(role_of_leaf(key, value, None))
        if None in roles:
            break  # a weight, which settles it
    is_main = name is None or name in PRIMARY_NAMES
    tables = roles == {"index_table"}
    whole = is_main and (tables or len(tensors) == len(mapping.pairs))
    if None not in roles and not whole:
        return None  # counters and metrics, with or without something else next to them
    nested = _nested(mapping, checkpoint.search)
    if nested is not None:
        # indices next to a model, which lies below
        return None if tables else Rejected(path, nested, tuple(tensors))
    if not is_main and inside and not looks_like_weights(tensors):
        return None
    return _state_dict_of(node, path, mapping, list(named.items()))


def _nested(mapping: DictNode, search: DataSearch) -> str | None:
    """What of a mapping with tensors lies deeper, or has no name; None where all of it can be taken."""
    for key, value in mapping.pairs:
        if type(key) is not str:
            if search.holds(value):
                return "some of its keys are not names"
            continue
        if isinstance(value, NdArray) and not value.scalar and value.data:
            continue  # refused by its name, if this mapping is the one that is taken
        if not is_branch(value) or is_unreadable_tensor(value) or key.endswith(EXTRA_STATE):
            continue
        if is_packed(value):
            continue
        if search.holds(value):
            return f"{key[:100]!r} holds tensors as well"
    return None


def is_packed(value: Any) -> bool:
    """(quantized weight, bias), as quantized layers save `_packed_params` (torch/ao/nn/quantized)."""
    parts = value if isinstance(value, (tuple, list)) else ()
    return any(isinstance(part, TensorRef) and part.quantizer is not None for part in parts)


def _of_arrays(checkpoint: Checkpoint, named: dict[str, Any]) -> dict[str, TensorRef] | None:
    """A mapping of numpy arrays alone as tensors: some model zoos (detectron2's, say) hold such."""
    if not named or not all(isinstance(v, NdArray) and not v.scalar for v in named.values()):
        return None
    try:
        return {name: checkpoint.vocabulary.array_as_tensor(array) for name, array in named.items()}
    except ValueError:
        return None


def _named_mapping(
    checkpoint: Checkpoint, node: Any, mapping: DictNode, path: str
) -> StateDict | Rejected | None:
    """A mapping that the caller named, as `torch.load` gives it: what cannot be kept is an `Opaque`."""
    named = mapping.by_name()
    arrays = _of_arrays(checkpoint, named) if len(named) == len(mapping.pairs) else None
    if arrays is not None:
        return _state_dict_of(node, path, mapping, list(arrays.items()))
    if not any(_is_tensor(value) for _, value in mapping.pairs):
        return Rejected(path, "its tensors lie in mappings below") if holds_data(mapping) else None
    entries: list[tuple[str, Any]] = list(named.items())
    for key, value in mapping.pairs:
        if type(key) is not str and checkpoint.search.holds(value):
            label = str(key) if type(key) is int and abs(key) < 1 << 63 else f"a {type(key).__name__}"
            what = Opaque(
                f"tensor whose key is not text ({label})", "--flatten gives it a name", contents=value
            )
            entries.append((label, what))
    return _state_dict_of(node, path, mapping, entries)


def _state_dict_of(node: Any, path: str, mapping: DictNode, entries: list[tuple[str, Any]]) -> StateDict:
    state = mapping.state if isinstance(mapping.state, DictNode) else None
    kind = "OrderedDict" if mapping.kind == "OrderedDict" else "dict"
    entries = [(name, readable(value)) for name, value in entries]
    metadata = state.get("_metadata") if state is not None else None
    return StateDict(path, "mapping", kind, entries, metadata, nodes=frozenset([id(node)]))


def readable(value: Any) -> Any:
    """The value, or an `Opaque` where it is a tensor that only foreign code rebuilds."""
    if not is_unreadable_tensor(value):
        return value
    callee = value.cls if isinstance(value.cls, Global) else None
    if callee is None and isinstance(value.cls, Instance) and value.cls.args:
        first = value.cls.args[0] if isinstance(value.cls.args, tuple) else None
        callee = first if isinstance(first, Global) else None
    what = callee.path if callee is not None else "a function"
    library = callee.module.partition(".")[0] if callee is not None else "its library"
    return Opaque(
        f"tensor that only {what} can rebuild",
        f"load the checkpoint where {library} is installed and save plain tensors "
        "(`tensor.detach().cpu().as_subclass(torch.Tensor).clone()`)",
        contents=value,
    )
