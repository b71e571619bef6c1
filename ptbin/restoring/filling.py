"""Weights into a model, as torch loads them, without undoing what the model is.

`load_state_dict(assign=True)` does the loading: its hooks, versions, parametrizations and extra state are
torch's. It gives every name a new tensor, of the weights' type. Afterwards each tensor that the model had
gets its new content and its old identity back, so that ties, lists and attributes that name it still do.
Runs in the child process; knows neither files nor formats.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptbin.restoring.snapshot import other_tensors, registered


@dataclass(slots=True)
class Filled:
    """How loading went.

    Attributes:
        missing: names that the model asks for and the weights lack, as torch reports them.
        unexpected: names of the weights that the model does not know.
        errors: what else torch reported (shapes, mostly), a line each.
        conflicts: names that are one tensor in the model, for which the weights have several values.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)


def unwrapped(model: nn.Module, names: Mapping[str, Any]) -> nn.Module:
    """The module that the names are of: inside `torch.compile`, `DataParallel` where they lack its prefix."""
    while True:
        for attribute in ("_orig_mod", "module"):
            inner = model._modules.get(attribute)  # noqa: SLF001 - a plain attribute may be anything
            wraps = inner is not None and len(model._modules) == 1  # noqa: SLF001 - as above
            if wraps and not any(name.startswith(f"{attribute}.") for name in names) and _is_wrapper(model):
                assert inner is not None
                model = inner
                break
        else:
            return model


def _is_wrapper(model: nn.Module) -> bool:
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__}" in {
        "torch._dynamo.eval_frame.OptimizedModule",
        "torch.nn.parallel.data_parallel.DataParallel",
        "torch.nn.parallel.distributed.DistributedDataParallel",
    }


def fill(model: nn.Module, weights: Mapping[str, Any]) -> Filled:
    """Load the weights and keep the model's own tensors; what does not fit is reported, not raised."""
    before = _Tensors(model)
    filled = Filled()

    def note(_module: nn.Module, keys: Any) -> None:
        # Called last, after every other hook had its say about these lists.
        filled.missing, filled.unexpected = list(keys.missing_keys), list(keys.unexpected_keys)

    hook = model.register_load_state_dict_post_hook(note)  # type: ignore[no-untyped-call]
    accepted = inspect.signature(model.load_state_dict).parameters
    assign = {"assign": True} if "assign" in accepted or "kwargs" in accepted else {}
    try:
        with torch.no_grad():
            model.load_state_dict(weights, strict=False, **assign)
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        filled.errors = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        return filled
    finally:
        hook.remove()
    filled.conflicts = before.keep_identities()
    loaded = before.loaded_names()
    filled.missing = [name for name in filled.missing if name not in loaded]
    return filled


def empty_tensors(model: nn.Module) -> list[str]:
    """Names of tensors on the meta device: they have a shape and no content."""
    found = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    found += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    others = [
        label for label, tensor in other_tensors(model) if tensor.is_meta and label.endswith("(attribute)")
    ]
    return sorted(found) + sorted(others)


@dataclass(slots=True)
class _Owner:
    module: nn.Module
    leaf: str
    name: str

    def current(self) -> torch.Tensor | None:
        module = self.module
        found = module._parameters.get(self.leaf)  # noqa: SLF001 - `getattr` would run parametrizations
        return found if found is not None else module._buffers.get(self.leaf)  # noqa: SLF001 - as above

    def put(self, tensor: torch.Tensor) -> None:
        if self.current() is not tensor:
            setattr(self.module, self.leaf, tensor)


class _Tensors:
    """The parameters and buffers of a model as they were, and who owns each."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors: dict[int, torch.Tensor] = {}
        self._owners: dict[int, list[_Owner]] = {}
        self._loaded: set[str] = set()
        for prefix, module in model.named_modules():
            dot = f"{prefix}." if prefix else ""
            for leaf, tensor in registered(module):
                self._tensors[id(tensor)] = tensor
                self._owners.setdefault(id(tensor), []).append(_Owner(module, leaf, dot + leaf))
        self._sharing = self._find_sharing()

    def _find_sharing(self) -> set[int]:
        """Those whose memory others use as well without being the same tensor: views of one storage."""
        by_storage: dict[int, list[int]] = {}
        for number, tensor in self._tensors.items():
            if tensor.is_meta or tensor.layout is not torch.strided or isinstance(tensor, _LAZY):
                continue
            if tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(number)
        return {number for group in by_storage.values() if len(group) > 1 for number in group}

    def loaded_names(self) -> set[str]:
        """Names under which some owner of a tensor was loaded."""
        return self._loaded

    def keep_identities(self) -> list[list[str]]:
        """Give the old tensors the new content; ties with several values, each with its names."""
        conflicts = []
        replaced: dict[int, torch.Tensor] = {}
        for number, owners in self._owners.items():
            old = self._tensors[number]
            fresh = [
                (owner, new) for owner in owners if (new := owner.current()) is not None and new is not old
            ]
            if not fresh:
                continue
            self._loaded.update(owner.name for owner in owners)
            new = fresh[0][1]
            if any(not _same_bits(new, other) for _, other in fresh[1:]):
                conflicts.append([owner.name for owner, _ in fresh])
                continue
            kept = self._refilled(number, old, new)
            if kept is not old:
                replaced[number] = kept
            for owner in owners:
                owner.put(kept)
        self._replace_in_attributes(replaced)
        return conflicts

    def _refilled(self, number: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`old` with the content of `new`; `new` itself where torch cannot do that (meta, subclasses)."""
        if old.is_meta or type(old) is not type(new) or old.layout is not new.layout:
            vars(new).update(vars(old))
            return new
        with torch.no_grad():
            if number in self._sharing and old.dtype == new.dtype and old.shape == new.shape:
                old.copy_(new)
                return old
            try:
                old.data = new.data
            except RuntimeError:
                vars(new).update(vars(old))
                return new
        return old

    def _replace_in_attributes(self, replaced: dict[int, torch.Tensor]) -> None:
        """Attributes, lists, tuples and dicts of a module that name a tensor which had to be replaced."""
        if not replaced:
            return
        for module in self._model.modules():
            for name, value in list(vars(module).items()):
                if name in {"_parameters", "_buffers", "_modules"}:
                    continue
                changed = _with_replaced(value, replaced)
                if changed is not value:
                    vars(module)[name] = changed


_LAZY = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)


def _with_replaced(value: Any, replaced: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return replaced.get(id(value), value)
    if type(value) in {list, tuple} and any(id(item) in replaced for item in value):
        return type(value)(replaced.get(id(item), item) for item in value)
    if type(value) is dict and any(id(item) in replaced for item in value.values()):
        return {key: replaced.get(id(item), item) for key, item in value.items()}
    return value


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape, one.is_meta) != (other.dtype, other.shape, other.is_meta):
        return False
    if one.is_quantized or one.layout is not torch.strided or one.is_meta:
        return bool(torch.equal(one, other))
    return all(bool(torch.equal(a, b)) for a, b in zip(_bytes(one), _bytes(other), strict=True))


def _bytes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """As bytes, so that NaNs equal themselves."""
    yield tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
