"""Finding the state dict in a checkpoint, or saying why there is no single answer.

A candidate is a pickled module, or a mapping of strings whose values are tensors and plain values.
Mappings inside optimizer states are none, nor are saved random generators. One candidate is the
answer; several are an `AmbiguousStateDictError` that lists them, unless they are the same weights or
all but one are marginal. Pure: walks records in memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ptbin.errors import AmbiguousStateDictError, LimitExceededError, NoStateDictError
from ptbin.nodes import DictNode, Instance, NdArray, Opaque, iter_nodes
from ptbin.options import Limits
from ptbin.reading.averages import COPY_SUFFIX, copies_inside, named_by_order, role_of
from ptbin.reading.checkpoint import Checkpoint
from ptbin.reading.modules import is_module, module_state_dict, script_state_dict
from ptbin.state_dict import LeftOut, StateDict, storages_of, tensors_of
from ptbin.tensors import SparseTensor, Storage, TensorRef

__all__ = ["Candidate", "find_candidates", "select_state_dict", "why_chosen"]

MAX_SEARCH_DEPTH = 10

AVERAGED = "ema"
"""What `--select` takes for the averaged copy, wherever it is."""

# Records inside values that are no tensors (`_extra_state`, say), over all entries of one mapping: each entry
# is walked for itself, and a thousand entries may share one large value.
MAX_VALUE_NODES = 1_000_000

# Names under which frameworks keep the one model (PyTorch's own tutorials, Lightning, timm, mmcv, fairseq,
# detectron2, DeepSpeed): the preferred one where the rest is marginal.
PRIMARY_NAMES = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "model_state",
)

# What trainers save beside the model. Mappings below these are offered for --select, never chosen.
_BESIDE = re.compile(
    r"^(optim|opt$|opt_|lr_sched|sched|rng|random|cuda_rng|scaler|grad_scaler|loops?$|callbacks?$|hyper_param|hparams"
    r"|args$|config$|cfg$|amp$|dataloader|sampler|criterion|loss|history|metrics|stats|last_optimizer)",
    re.IGNORECASE,
)

# Bytes of the Mersenne Twister state torch.get_rng_state() returns (at::CPUGeneratorImpl, legacy layout).
_RNG_NBYTES = (5056, 5048)


@dataclass(slots=True)
class Candidate:
    """A place that could be the state dict.

    Attributes:
        beside: found below something that is saved beside a model; never chosen automatically.
    """

    path: str
    state_dict: StateDict
    tensors: int
    nbytes: int
    beside: bool

    @property
    def role(self) -> str | None:
        """`ema` where it is an averaged copy of a model's weights, by its name."""
        return role_of(self.path)

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "tensors": self.tensors, "nbytes": self.nbytes, "role": self.role}


def find_candidates(checkpoint: Checkpoint, limits: Limits) -> list[Candidate]:
    """Every candidate in the checkpoint, in file order.

    Raises:
        LimitExceededError: a graph of more than `limits.tree_nodes` records.
    """
    candidates: list[Candidate] = []
    seen: set[int] = set()
    stack: list[tuple[tuple[str, ...], Any, bool, bool]] = [((), checkpoint.root, False, False)]
    visited = 0
    while stack:
        path, node, beside, inside = stack.pop()
        if id(node) in seen or len(path) > MAX_SEARCH_DEPTH:
            continue
        seen.add(id(node))
        visited += 1
        if visited > limits.tree_nodes:
            raise LimitExceededError(f"{checkpoint.uri}: more than {limits.tree_nodes} records")
        found = _as_state_dict(checkpoint, node, ".".join(path) or ".", strict=True)
        # An object's own attributes are no weights by being tensors: modules and well-known names are.
        if found is not None and path and path[-1] not in PRIMARY_NAMES and not _has_weight_like(found):
            continue
        if found is not None and (
            not inside or found.kind != "mapping" or (path and path[-1] in PRIMARY_NAMES)
        ):
            candidates.append(_measured(found, beside))
            continue
        below = _below(node)
        for name, child in reversed(below):
            stack.append(
                (
                    (*path, name),
                    child,
                    beside or bool(_BESIDE.match(name)),
                    inside or (isinstance(node, Instance) and not node.pairs),
                )
            )
    return candidates + _averaged_copies(checkpoint, candidates)


def _averaged_copies(checkpoint: Checkpoint, candidates: list[Candidate]) -> list[Candidate]:
    """Averages that are no state dict of their own; offered, never chosen."""
    copies = [copies_inside(c.state_dict) for c in candidates if not c.beside]
    copies.append(named_by_order(checkpoint.root, [c.state_dict for c in candidates if not c.beside]))
    return [_measured(copy, beside=True) for copy in copies if copy is not None]


def select_state_dict(checkpoint: Checkpoint, select: str | None, limits: Limits) -> StateDict:
    """The state dict to convert.

    Args:
        select: path as `Candidate.path` gives it, or None to choose.

    Raises:
        NoStateDictError: nothing there, or nothing at `select`.
        AmbiguousStateDictError: several, with the candidates.
    """
    candidates = find_candidates(checkpoint, limits)
    if select is not None:
        chosen = next((c.state_dict for c in candidates if c.path == select), None)
        if chosen is None:
            chosen = _as_state_dict(checkpoint, _resolve(checkpoint.root, select), select, strict=False)
        if chosen is None and select == AVERAGED:
            chosen = _the_average(checkpoint, candidates)
        if chosen is None:
            offered = ", ".join(c.path for c in candidates[:20]) or "none"
            raise NoStateDictError(f"{checkpoint.uri}: no state dict at {select!r}; found: {offered}")
    else:
        chosen = choose_candidate(checkpoint, candidates).state_dict
    whole = chosen.path.removesuffix(COPY_SUFFIX)
    if whole != chosen.path:
        raw = next(c for c in candidates if c.path == whole).state_dict
        copied = {id(value) for _, value in chosen.entries}
        nbytes = sum(v.nbytes for _, v in raw.entries if isinstance(v, TensorRef) and id(v) not in copied)
        chosen.left_out.append(LeftOut(whole, nbytes, "raw weights; their averaged copy is selected"))
        return chosen
    chosen.left_out.extend(_unselected(checkpoint, chosen))
    return chosen


def _the_average(checkpoint: Checkpoint, candidates: list[Candidate]) -> StateDict:
    averages = [c for c in candidates if c.role == AVERAGED]
    if len(averages) == 1:
        return averages[0].state_dict
    listed = ", ".join(c.path for c in (averages or candidates)[:20])
    if averages:
        raise AmbiguousStateDictError(
            f"{checkpoint.uri}: {len(averages)} averaged copies, choose one with --select: {listed}",
            tuple(c.path for c in averages),
        )
    raise NoStateDictError(f"{checkpoint.uri}: no averaged copy; found: {listed or 'none'}")


def why_chosen(chosen: Candidate, candidates: list[Candidate], preferred: str | None) -> str:
    """One sentence: why this one and none of the others."""
    others = [c for c in candidates if c is not chosen]
    if not others:
        return "the only state dict there is"
    if chosen.path == preferred:
        return "what this container is meant to hold"
    if all(c.beside for c in others):
        return "the only one that is not saved beside a model"
    return f"the others are the same weights, or marginal beside {chosen.path!r}"


def choose_candidate(checkpoint: Checkpoint, candidates: list[Candidate]) -> Candidate:
    """The one candidate that is the answer.

    Raises:
        NoStateDictError, AmbiguousStateDictError: as `select_state_dict`.
    """
    main = _without_twins([c for c in candidates if not c.beside])
    if len(main) == 1:
        return main[0]
    preferred = next((c for c in main if c.path == checkpoint.preferred), None)
    if preferred is not None:
        return preferred
    if main:
        named = [c for c in main if c.path in PRIMARY_NAMES]
        if len(named) == 1 and sum(c.nbytes for c in main) - named[0].nbytes <= named[0].nbytes // 100:
            return named[0]
        paths = tuple(c.path for c in main)
        listed = ", ".join(
            f"{c.path} ({c.tensors} tensors, {c.nbytes} bytes{', ema' if c.role else ''})" for c in main[:20]
        )
        raise AmbiguousStateDictError(
            f"{checkpoint.uri}: {len(main)} state dicts, choose one with --select: {listed}", paths
        )
    raise NoStateDictError(f"{checkpoint.uri}: {_why_none(checkpoint, candidates)}")


def _why_none(checkpoint: Checkpoint, beside: list[Candidate]) -> str:
    root = checkpoint.root
    if beside:
        return "no state dict of a model; --select takes one of " + ", ".join(c.path for c in beside[:10])
    if (
        isinstance(root, (list, tuple))
        and root
        and all(isinstance(v, (TensorRef, SparseTensor)) for v in root)
    ):
        return f"a list of {len(root)} tensors without names; a state dict needs a name for each"
    if isinstance(root, (TensorRef, SparseTensor)):
        return "a single tensor without a name"
    what = root.class_path if isinstance(root, Instance) else getattr(root, "kind", type(root).__name__)
    return f"no mapping of names to tensors, and no module, in what it holds ({what})"


def _without_twins(candidates: list[Candidate]) -> list[Candidate]:
    """Drop candidates that show the very same weights under the same names as an earlier one."""
    kept: dict[tuple[Any, ...], Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: c.path not in PRIMARY_NAMES):
        key = tuple(
            sorted(
                (n, t.layout_key())
                for name, value in candidate.state_dict.entries
                for n, t in tensors_of(name, value)
            )
        )
        kept.setdefault(key, candidate)
    return [c for c in candidates if c in kept.values()]


def _measured(state_dict: StateDict, beside: bool) -> Candidate:
    count = sum(len(tensors_of(name, value)) for name, value in state_dict.entries)
    nbytes = sum(storage.nbytes for storage in storages_of(state_dict.entries).values())
    return Candidate(state_dict.path, state_dict, count, nbytes, beside)


def _below(node: Any) -> list[tuple[str, Any]]:
    """Named children worth searching; optimizer states hold none."""
    if isinstance(node, DictNode):
        named = node.by_name()
        if "state" in named and "param_groups" in named:
            return []
        return [(str(k), v) for k, v in node.pairs if isinstance(k, (str, int)) and _is_branch(v)]
    if isinstance(node, (list, tuple)):
        return [(str(index), v) for index, v in enumerate(node[:1000]) if _is_branch(v)]
    if isinstance(node, Instance):
        attributes = node.attributes()
        pairs = [*node.pairs, *(attributes.pairs if attributes is not None else [])]
        found = [(str(k), v) for k, v in pairs if isinstance(k, (str, int)) and _is_branch(v)]
        if isinstance(node.args, tuple):
            # torch.compile's wrapper is pickled as a call with the module as an argument
            found.extend((str(index), arg) for index, arg in enumerate(node.args) if is_module(arg))
        return found
    return []


def _is_branch(value: Any) -> bool:
    return isinstance(value, (DictNode, Instance, list, tuple))


def _as_state_dict(checkpoint: Checkpoint, node: Any, path: str, *, strict: bool) -> StateDict | None:
    """The node as a state dict, or None.

    `strict` asks for a mapping that can hardly be anything else; a place the user named needs only a tensor.
    """
    if isinstance(node, Instance):
        if is_module(node):
            found = module_state_dict(node, path)
        elif checkpoint.script_classes and node.class_path.startswith("__torch__"):
            found = script_state_dict(node, path, checkpoint.script_classes)
        elif node.pairs:
            return _mapping(checkpoint, DictNode("dict", node.pairs), path, node.attributes(), strict=strict)
        else:
            return None
        return (
            found if any(isinstance(v, (TensorRef, SparseTensor, Opaque)) for _, v in found.entries) else None
        )
    if isinstance(node, DictNode):
        state = node.state if isinstance(node.state, DictNode) else None
        return _mapping(checkpoint, node, path, state, strict=strict)
    return None


def _mapping(
    checkpoint: Checkpoint, node: DictNode, path: str, state: DictNode | None, *, strict: bool
) -> StateDict | None:
    named = node.by_name()
    if not named or (strict and any(not isinstance(key, str) for key, _ in node.pairs)):
        return None
    arrays = [v for v in named.values() if isinstance(v, NdArray) and not v.scalar]
    tensors = [
        v
        for v in named.values()
        if isinstance(v, (TensorRef, SparseTensor)) or (isinstance(v, Opaque) and v.has_data)
    ]
    if not tensors and len(arrays) == len(named):
        # Some model zoos (detectron2's, say) hold numpy arrays, which their readers give to from_numpy.
        try:
            named = {name: checkpoint.vocabulary.array_as_tensor(array) for name, array in named.items()}
        except ValueError:
            return None
        tensors = list(named.values())
    if not tensors and not any(isinstance(v, Opaque) for v in named.values()):
        return None
    if strict and (_is_rng(named) or {"state", "param_groups"} <= named.keys()):
        return None
    budget = MAX_VALUE_NODES
    for key, value in named.items():
        if not _is_branch(value):
            continue
        for node_below in iter_nodes(value):
            budget -= 1
            if budget < 0:
                raise LimitExceededError(
                    f"{checkpoint.uri}: more than {MAX_VALUE_NODES} records inside the values of {path!r}"
                )
            if (
                strict
                and isinstance(node_below, (TensorRef, SparseTensor))
                and not key.endswith("_extra_state")
            ):
                return None
    kind = "OrderedDict" if node.kind == "OrderedDict" else "dict"
    return StateDict(
        path, "mapping", kind, list(named.items()), state.get("_metadata") if state is not None else None
    )


def _has_weight_like(state_dict: StateDict) -> bool:
    """Whether any tensor could be a weight: index tables beside a model hold whole numbers only."""
    if state_dict.kind != "mapping":
        return True
    tensors = [t for name, value in state_dict.entries for _, t in tensors_of(name, value)]
    return any(t.dtype.name not in ("int64", "int32", "int16", "bool") for t in tensors)


def _is_rng(named: dict[str, Any]) -> bool:
    tensors = [(k, v) for k, v in named.items() if isinstance(v, TensorRef)]
    return bool(tensors) and all(
        t.dtype.name == "uint8"
        and len(t.shape) == 1
        and (t.nbytes in _RNG_NBYTES or "rng" in k or k in ("cpu", "cuda"))
        for k, t in tensors
    )


def _resolve(root: Any, path: str) -> Any:
    """The node at a dotted path; keys may themselves contain dots, so the longest fitting key wins."""
    node, rest = root, "" if path == "." else path
    while rest:
        children = dict(_below(node))
        fitting = [name for name in children if rest == name or rest.startswith(f"{name}.")]
        if not fitting:
            return None
        name = max(fitting, key=len)
        node, rest = children[name], rest[len(name) + 1 :]
    return node


def _unselected(checkpoint: Checkpoint, chosen: StateDict) -> list[LeftOut]:
    """What lies beside the selected state dict, by path at each level on the way down to it."""
    taken: set[int] = set(storages_of(chosen.entries))
    taken.update(id(s) for _, v in chosen.entries if isinstance(v, TensorRef) for s in (v.storage,))
    left: list[LeftOut] = []
    seen: set[int] = set()
    node, rest, prefix = checkpoint.root, "" if chosen.path == "." else chosen.path, ""
    while rest:
        children = _below(node)
        fitting = [name for name, _ in children if rest == name or rest.startswith(f"{name}.")]
        if not fitting:
            break
        step = max(fitting, key=len)
        following = None
        for name, child in _children_with_leaves(node):
            if name == step:
                following = child
                continue
            nbytes = _claim(child, taken, seen)
            left.append(LeftOut(f"{prefix}{name}", nbytes, "not part of the selected state dict"))
        node, rest, prefix = following, rest[len(step) + 1 :], f"{prefix}{step}."
    return left


def _children_with_leaves(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, DictNode):
        return [(str(k), v) for k, v in node.pairs if isinstance(k, (str, int))]
    if isinstance(node, (list, tuple)):
        return [(str(index), v) for index, v in enumerate(node)]
    if isinstance(node, Instance):
        attributes = node.attributes()
        pairs = [*node.pairs, *(attributes.pairs if attributes is not None else [])]
        return [(str(k), v) for k, v in pairs if isinstance(k, (str, int))]
    return []


def _claim(node: Any, taken: set[int], seen: set[int]) -> int:
    """Bytes of the storages below a node that nothing before it has claimed."""
    total = 0
    for found in iter_nodes(node, seen):
        storages: list[Storage] = []
        if isinstance(found, TensorRef):
            storages = [found.storage]
        elif isinstance(found, SparseTensor):
            storages = [part.storage for _, part in found.parts]
        for storage in storages:
            if id(storage) not in taken:
                taken.add(id(storage))
                total += storage.nbytes
    return total
