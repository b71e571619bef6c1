"""The state dict of a pickled module, without its class.

Walks what `torch.nn.Module.state_dict` walks (torch/nn/modules/module.py, `_save_to_state_dict`):
`_parameters`, then `_buffers` less the non-persistent ones, then `_modules`, names joined by dots; a module
that `torch.compile` wrapped is one with a child `_orig_mod`, as torch names it. A child that pickles itself
with custom code (`__reduce__`, a tuple for a state) and weights that a quantized layer keeps packed cannot
be read without that code: they become `Opaque` entries, which no conversion takes or passes over. TorchScript
modules keep flat attributes instead; there the lists in the archive's code say which are parameters and
buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError
from ptbin.reading.tree import iter_data
from ptbin.values.nodes import DictNode, Instance, Opaque, SetNode
from ptbin.values.state_dict import StateDict
from ptbin.values.tensors import TensorRef

MAX_DEPTH = 200

# A module may be reached over many paths, and each counts: sixteen kilobytes of pickle can hold 2^60 of them.
MAX_MODULES = 200_000
MAX_ENTRIES = 500_000
MAX_NAME_NBYTES = 32 << 20
MAX_NAMED = 3
"""Modules with hooks that a note names."""


# Layers whose own code turns packed weights into entries of a state dict (torch/ao/nn/quantized/modules).
_QUANTIZED = (
    "torch.ao.nn.quantized.",
    "torch.ao.nn.intrinsic.quantized.",
    "torch.nn.quantized.",
    "torch.nn.intrinsic.quantized.",
    "torch.ao.nn.sparse.quantized.",
)
# torch/nn/modules/module.py, `Module.state_dict`: they may change what it returns
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
_MODULE_ATTRIBUTES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

# torch/_dynamo/eval_frame.py, `OptimizedModule.__reduce__`: the class, called with the module and its context
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_COMPILED_CHILD = "_orig_mod"


def is_module(node: Any) -> bool:
    """A pickled `nn.Module`: an instance whose attributes hold parameters and submodules."""
    if not isinstance(node, Instance):
        return False
    if _compiled_inside(node) is not None:
        return True
    attributes = node.attributes()
    if attributes is None:
        return False
    return isinstance(attributes.get("_parameters"), (DictNode, Instance)) and isinstance(
        attributes.get("_modules"), (DictNode, Instance)
    )


def _compiled_inside(node: Instance) -> Instance | None:
    """The module that `torch.compile` wrapped, where it did."""
    if node.class_path != _COMPILED or not isinstance(node.args, tuple) or not node.args:
        return None
    inner = node.args[0]
    return inner if isinstance(inner, Instance) and is_module(inner) else None


def _pairs(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, (DictNode, Instance)):
        return list({k: v for k, v in node.pairs if isinstance(k, str)}.items())
    return []


def module_state_dict(root: Instance, path: str) -> StateDict:
    """What `root.state_dict()` would return.

    Raises:
        CorruptArchiveError: modules nested without end.
    """
    found = StateDict(path, "module", "OrderedDict", [], None)
    entries = found.entries
    # Of all attributes together: modules share configurations, and each is walked once.
    seen: set[int] = set()
    hooked: list[str] = []

    def own(module: Instance, prefix: str) -> Iterator[tuple[str, Any]]:
        inner = _compiled_inside(module)
        if inner is not None:
            yield prefix + _COMPILED_CHILD, inner
            return
        attributes = module.attributes()
        assert attributes is not None
        if any(_changes_names(attributes.get(name)) for name in _HOOKS):
            hooked.append(prefix.rstrip(".") or "the module itself")
        skipped = attributes.get("_non_persistent_buffers_set")
        transient = set()
        if isinstance(skipped, SetNode):
            transient = {name for name in skipped.items if isinstance(name, str)}
        entries.extend(
            (prefix + name, value)
            for name, value in _pairs(attributes.get("_parameters"))
            if value is not None
        )
        for name, value in _pairs(attributes.get("_buffers")):
            if value is None:
                continue
            if name in transient:
                found.leave_out(prefix + name, "non_persistent_buffer", node=value)
            else:
                entries.append((prefix + name, value))
        children = _pairs(attributes.get("_modules"))
        packed = module.class_path.startswith(_QUANTIZED)
        for name, value in attributes.by_name().items():
            if name in _MODULE_ATTRIBUTES or next(iter_data(value, seen), None) is None:
                continue
            if packed or (isinstance(value, Instance) and value.class_path == "torch.ScriptObject"):
                entries.append((prefix + name, _packed_weights(module, value)))
            else:
                found.leave_out(prefix + name, "attribute", node=value)
        for name, child in children:
            if is_module(child):
                yield prefix + name, child
            elif child is not None:
                entries.append((prefix + name, _own_pickling(child)))

    _walk(root, own, found)
    if hooked:
        more = f" and {len(hooked) - MAX_NAMED} more" if len(hooked) > MAX_NAMED else ""
        found.notes.append(
            f"hooks on state_dict() of {', '.join(hooked[:MAX_NAMED])}{more} were not run, because they are "
            "code: the names and values are those of the parameters and buffers"
        )
    return found


def _changes_names(hooks: Any) -> bool:
    """Whether there are hooks other than those of torch's own utilities, which add to metadata alone."""
    return isinstance(hooks, (DictNode, Instance)) and any(
        not (isinstance(hook, Instance) and hook.class_path.startswith("torch.nn.utils."))
        for _, hook in hooks.pairs
    )


def _packed_weights(module: Instance, value: Any) -> Opaque:
    return Opaque(
        f"packed weight of {module.class_path}",
        "only the layer's own code unpacks it; load the model where torch is, and save its state_dict()",
        contents=value,
    )


def _own_pickling(child: Any) -> Opaque:
    path = child.class_path if isinstance(child, Instance) else type(child).__name__
    return Opaque(
        f"module of {path}, which pickles itself with custom code",
        "its parameters have no names in the file; load the model where that class is, and save its "
        "state_dict() instead",
        contents=child,
    )


def script_state_dict(
    root: Instance, path: str, classes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
) -> StateDict:
    """What `torch.jit.load(...).state_dict()` would return."""
    found = StateDict(path, "torchscript", "OrderedDict", [], None)
    entries = found.entries
    # Of all attributes together: modules share configurations, and each is walked once.
    seen: set[int] = set()

    def own(module: Instance, prefix: str) -> Iterator[tuple[str, Any]]:
        attributes = module.attributes()
        if attributes is None:
            packed = (module.state, module.args)
            if next(iter_data(packed, seen), None) is not None:
                found.leave_out(prefix.rstrip("."), "packed", node=packed)
            return
        parameters, buffers = classes.get(module.class_path, ((), ()))
        named = attributes.by_name()
        entries.extend(
            (prefix + name, named[name])
            for name in (*parameters, *buffers)
            if isinstance(named.get(name), (TensorRef, Opaque))
        )
        for name, value in named.items():
            if name in parameters or name in buffers:
                continue
            if isinstance(value, Instance) and value.class_path.startswith("__torch__"):
                yield prefix + name, value
            elif next(iter_data(value, seen), None) is not None:
                found.leave_out(prefix + name, "attribute", node=value)

    _walk(root, own, found)
    return found


def _walk(
    root: Instance, own: Callable[[Instance, str], Iterator[tuple[str, Any]]], found: StateDict
) -> None:
    """Depth first, in order; a module that contains itself is refused, one used twice is walked twice."""
    stack: list[tuple[Instance, str, tuple[int, ...]]] = [(root, "", ())]
    modules = name_nbytes = 0
    while stack:
        module, prefix, above = stack.pop()
        if id(module) in above or len(above) > MAX_DEPTH:
            raise CorruptArchiveError(f"modules nested without end at {prefix[:200]!r}")
        modules += 1
        name_nbytes += len(prefix)
        count = len(found.entries) + len(found.excluded)
        if modules > MAX_MODULES or name_nbytes > MAX_NAME_NBYTES or count > MAX_ENTRIES:
            raise LimitExceededError(f"more modules or parameters than any model has, at {prefix[:200]!r}")
        below = [(child, f"{name}.", (*above, id(module))) for name, child in own(module, prefix)]
        stack.extend(reversed(below))
