"""What is in a model, as labels and facts: what two processes compare.

A label is a tensor's name in the state dict (parts of values that hold several are named as manifests name
them), or says what else it is: a buffer that the state dict leaves out, a tensor in a plain attribute, a tie.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from ptbin.proof.loaded import iter_loaded_tensors
from ptbin.restoring.facts import Fact, Facts

LANES = 2
"""Threads that hash: SHA-256 gives the interpreter up, and one core is not all there is."""


class Contents:
    """Facts about tensors, each memory hashed once. For calls between which nothing is written to it.

    With `path`, tensors that are mapped from that file are not hashed while their memory equals the file.
    """

    def __init__(self, path: str | None = None) -> None:
        self._known: dict[Any, Any] = {}
        self._mapped = _MappedFile(path) if path is not None else None

    def of_model(self, model: nn.Module) -> Facts:
        """Every tensor of a model by its label. Ties are labels as well."""
        found = self.of_values(model.state_dict())
        found |= self.of_values(dict(other_tensors(model)))
        for names in ties_of(model):
            found["tie of " + ", ".join(names)] = ["tie", [], ""]
        return found

    def of_values(self, values: Mapping[str, Any]) -> Facts:
        """Every tensor in the values of a state dict."""
        tensors = dict(iter_loaded_tensors(values))
        keys = {name: _key(tensor) for name, tensor in tensors.items()}
        # Of tensors that are one memory, one is hashed.
        new = {keys[name]: tensor for name, tensor in tensors.items() if keys[name] not in self._known}
        lazy = self._mapped is not None
        with ThreadPoolExecutor(LANES) as pool:
            self._known |= dict(zip(new, pool.map(self._content, new.values()), strict=True))
        return {
            name: [_type_of(tensor, lazy=lazy), list(tensor.shape), self._known[keys[name]]]
            for name, tensor in tensors.items()
        }

    def _content(self, tensor: torch.Tensor) -> Any:
        if self._mapped is None:
            return _digest(tensor.resolve_conj().resolve_neg())
        place = self._mapped.place_of(tensor) if self._mapped.is_unchanged else None
        return place if place is not None else _digest(_as_stored(tensor))


def other_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a model that its state dict leaves out: (label, tensor)."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name in sorted(module._non_persistent_buffers_set):  # noqa: SLF001 - no public way to tell these
            buffer = module._buffers.get(name)  # noqa: SLF001 - as above
            if buffer is not None:
                yield f"{dot}{name} (buffer)", buffer
        own = {id(tensor) for _, tensor in registered(module)}
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and id(value) not in own:
                yield f"{dot}{name} (attribute)", value


def registered(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of one module, not of its children."""
    for table in (module._parameters, module._buffers):  # noqa: SLF001 - `named_parameters` hides ties
        yield from ((name, tensor) for name, tensor in table.items() if tensor is not None)


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by the names they have in the model: what programs keep.

    A state dict may have other names for them, by its hooks.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        hidden = module._non_persistent_buffers_set  # noqa: SLF001 - no public way to tell these
        found |= {dot + name: tensor for name, tensor in registered(module) if name not in hidden}
    return found


def mapped_views(values: Mapping[str, Any], path: str) -> Facts:
    """Where the tensors lie in a file that they are mapped from, whatever was written to their memory since.

    Others are not in the answer.
    """
    mapped = _MappedFile(path)
    found: dict[str, Fact] = {}
    for name, tensor in iter_loaded_tensors(values):
        place = mapped.place_of(tensor)
        if place is not None:
            found[name] = [_type_of(tensor, lazy=True), list(tensor.shape), place]
    return found


class _MappedFile:
    """Where this process has mapped a file, by `/proc/self/smaps` (proc(5)).

    `is_unchanged`: no page of a private mapping was written to; the kernel counts those as anonymous.
    """

    def __init__(self, path: str) -> None:
        self._regions: list[tuple[int, int, int]] = []
        self.is_unchanged = False
        own = os.stat(path)
        names = {os.path.realpath(path), os.path.realpath(path) + " (deleted)"}
        device = f"{os.major(own.st_dev):02x}:{os.minor(own.st_dev):02x}"
        inside, copied, counts = False, 0, 0
        with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                if not fields[0].endswith(":"):
                    inside = len(fields) == 6 and (
                        fields[5] in names or (fields[3], fields[4]) == (device, str(own.st_ino))
                    )
                    if inside:
                        start, end = (int(text, 16) for text in fields[0].split("-"))
                        self._regions.append((start, end, int(fields[2], 16)))
                elif inside and fields[0] in {"Anonymous:", "Swap:"}:
                    copied += int(fields[1])
                    counts += fields[0] == "Anonymous:"
        self.is_unchanged = bool(self._regions) and counts == len(self._regions) and not copied

    def place_of(self, tensor: torch.Tensor) -> list[Any] | None:
        """(offset of its storage, offset in it, stride); None where it is not plain bytes of the file."""
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or not tensor.numel():
            return None
        if _is_packed(tensor):
            return None
        storage = tensor.untyped_storage()
        first = storage.data_ptr()
        for start, end, offset in self._regions:
            if start <= first and first + storage.nbytes() <= end:
                return [first - start + offset, tensor.storage_offset(), list(tensor.stride())]
        return None


def _is_packed(tensor: torch.Tensor) -> bool:
    """Several elements in a byte."""
    return tensor.dtype in {torch.quint4x2, torch.quint2x4}


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """Without lazy operations: what its memory says by itself."""
    plain = tensor.detach()
    plain = plain.conj() if plain.is_conj() else plain  # flips the flag
    return torch._neg_view(plain) if plain.is_neg() else plain  # noqa: SLF001 - no public way to flip this flag


def _type_of(tensor: torch.Tensor, *, lazy: bool) -> str:
    """Name of the type; how a tensor is quantized, and with `lazy` what else is to be done to it, follows."""
    name = str(tensor.dtype).removeprefix("torch.")
    if lazy and tensor.is_conj():
        name += " conj"
    if lazy and tensor.is_neg():
        name += " neg"
    if not tensor.is_quantized:
        return name
    scheme = str(tensor.qscheme()).removeprefix("torch.")
    if "per_tensor" in scheme:
        return f"{name} {scheme} {tensor.q_scale()!r} {tensor.q_zero_point()}"
    return f"{name} {scheme} {tensor.q_per_channel_axis()}"


def ties_of(model: nn.Module) -> list[list[str]]:
    """Names that are one and the same tensor, where they are more than one."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, tensor in registered(module):
            names.setdefault(id(tensor), []).append(dot + name)
    return sorted(sorted(set(group)) for group in names.values() if len(set(group)) > 1)


def _key(tensor: torch.Tensor) -> Any:
    if tensor.is_quantized or tensor.device.type != "cpu" or not tensor.numel():
        return object()  # as no other: an address may be used again
    flags = (tensor.is_conj(), tensor.is_neg())
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), flags)


def _digest(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "empty"
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.int_repr()
    packed = plain.cpu().contiguous()
    nbytes = packed.numel() * packed.element_size()
    digest = hashlib.sha256()
    if nbytes:
        # The raw memory, because several types have no numpy view.
        digest.update((ctypes.c_char * nbytes).from_address(packed.data_ptr()))
    return digest.hexdigest()
