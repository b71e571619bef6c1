"""The state dict of a pickled module, without its class.

Walks what `torch.nn.Module.state_dict` walks (torch/nn/modules/module.py, `_save_to_state_dict`):
`_parameters`, then `_buffers` less the non-persistent ones, then `_modules`, names joined by dots.
What a class would add by its own code (`get_extra_state`, packed weights) cannot be had and is
reported. TorchScript modules keep flat attributes instead; there the lists in the archive's code say
which are parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError
from ptbin.nodes import DictNode, Instance, SetNode, iter_nodes
from ptbin.state_dict import LeftOut, StateDict
from ptbin.tensors import SparseTensor, TensorRef

__all__ = ["is_module", "module_state_dict", "script_state_dict"]

MAX_DEPTH = 200

# A module may be reached over many paths, and each counts: sixteen kilobytes of pickle can hold 2^60 of them.
MAX_MODULES = 200_000
MAX_ENTRIES = 500_000
MAX_NAME_NBYTES = 32 << 20


def is_module(node: Any) -> bool:
    """A pickled `nn.Module`: an instance whose attributes hold parameters and submodules."""
    if not isinstance(node, Instance):
        return False
    attributes = node.attributes()
    if attributes is None:
        return False
    return isinstance(attributes.get("_parameters"), (DictNode, Instance)) and isinstance(
        attributes.get("_modules"), (DictNode, Instance)
    )


def _pairs(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, (DictNode, Instance)):
        return list({k: v for k, v in node.pairs if isinstance(k, str)}.items())
    return []


def module_state_dict(root: Instance, path: str) -> StateDict:
    """What `root.state_dict()` would return.

    Raises:
        CorruptArchiveError: modules nested without end.
    """
    entries: list[tuple[str, Any]] = []
    left_out: list[LeftOut] = []

    def own(module: Instance, prefix: str) -> Iterator[tuple[str, Any]]:
        attributes = module.attributes()
        assert attributes is not None
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
                left_out.append(LeftOut(prefix + name, getattr(value, "nbytes", 0), "non-persistent buffer"))
            else:
                entries.append((prefix + name, value))
        for name, value in attributes.by_name().items():
            # Tensors kept as plain attributes are no part of a state dict; say so where there are any.
            if name.startswith("_") or not isinstance(value, (TensorRef, SparseTensor)):
                continue
            nbytes = value.nbytes if isinstance(value, TensorRef) else 0
            left_out.append(LeftOut(prefix + name, nbytes, "plain attribute, no parameter or buffer"))
        for name, child in _pairs(attributes.get("_modules")):
            if is_module(child):
                yield prefix + name, child

    _walk(root, own, lambda: len(entries) + len(left_out))
    return StateDict(path, "module", "OrderedDict", entries, None, left_out)


def script_state_dict(
    root: Instance, path: str, classes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
) -> StateDict:
    """What `torch.jit.load(...).state_dict()` would return."""
    entries: list[tuple[str, Any]] = []
    left_out: list[LeftOut] = []

    def own(module: Instance, prefix: str) -> Iterator[tuple[str, Any]]:
        attributes = module.attributes()
        if attributes is None:
            packed = sum(
                n.nbytes for n in iter_nodes((module.state, module.args)) if isinstance(n, TensorRef)
            )
            if packed:
                left_out.append(
                    LeftOut(prefix.rstrip("."), packed, "packed by the class itself, outside its state dict")
                )
            return
        parameters, buffers = classes.get(module.class_path, ((), ()))
        named = attributes.by_name()
        entries.extend(
            (prefix + name, named[name])
            for name in (*parameters, *buffers)
            if isinstance(named.get(name), TensorRef)
        )
        for name, value in named.items():
            if name in parameters or name in buffers:
                continue
            if isinstance(value, TensorRef):
                left_out.append(
                    LeftOut(prefix + name, value.nbytes, "plain attribute, no parameter or buffer")
                )
            elif isinstance(value, Instance) and value.class_path.startswith("__torch__"):
                yield prefix + name, value

    _walk(root, own, lambda: len(entries) + len(left_out))
    return StateDict(path, "torchscript", "OrderedDict", entries, None, left_out)


def _walk(
    root: Instance, own: Callable[[Instance, str], Iterator[tuple[str, Any]]], count: Callable[[], int]
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
        if modules > MAX_MODULES or name_nbytes > MAX_NAME_NBYTES or count() > MAX_ENTRIES:
            raise LimitExceededError(f"more modules or parameters than any model has, at {prefix[:200]!r}")
        below = [(child, f"{name}.", (*above, id(module))) for name, child in own(module, prefix)]
        stack.extend(reversed(below))
