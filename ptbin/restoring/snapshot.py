"""What is in a model, as labels and digests: what two processes compare. Also an exception in one line.

A label is a tensor's name in the state dict (parts of values that hold several are named as manifests name
them), or says what else it is: a buffer that the state dict leaves out, a tensor in a plain attribute, a tie.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from ptbin.proof.load import iter_loaded_tensors

__all__ = [
    "digests_of",
    "error_text",
    "facts_of_model",
    "facts_of_values",
    "mapped_views",
    "other_tensors",
    "own_tensors",
    "registered",
    "ties_of",
]

LANES = 2
"""Threads that hash: SHA-256 gives the interpreter up, and one core is not all there is."""


Known = dict[Any, str]
"""Digests by memory, type and layout, for calls between which nothing is written to that memory."""


def digests_of(values: Mapping[str, Any], known: Known | None = None) -> dict[str, str]:
    """SHA-256 over the logical, contiguous bytes of each tensor in the values of a state dict."""
    return {name: text.rpartition(" ")[2] for name, text in facts_of_values(values, known).items()}


def facts_of_model(model: nn.Module, known: Known | None = None) -> dict[str, str]:
    """Every tensor of a model by its label: type, shape and digest in one text. Ties are labels as well."""
    known = {} if known is None else known
    found = facts_of_values(model.state_dict(), known)
    found |= facts_of_values(dict(other_tensors(model)), known)
    for names in ties_of(model):
        found["tie of " + ", ".join(names)] = ""
    return found


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

    A state dict may have other names for them, by hooks of its own.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        hidden = module._non_persistent_buffers_set  # noqa: SLF001 - no public way to tell these
        found |= {dot + name: tensor for name, tensor in registered(module) if name not in hidden}
    return found


def mapped_views(values: Mapping[str, Any], path: str) -> dict[str, list[Any]]:
    """What each tensor is of a file that it is mapped from: where its storage lies there, and the view of it.

    By `/proc/self/maps` (proc(5)); tensors that are not mapped from the file are not in the answer.
    """
    real, regions = os.path.realpath(path), []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] == real:
                start, end = (int(text, 16) for text in fields[0].split("-"))
                regions.append((start, end, int(fields[2], 16)))
    found = {}
    for name, tensor in iter_loaded_tensors(values):
        if tensor.layout is not torch.strided or not tensor.numel():
            continue
        first = tensor.untyped_storage().data_ptr()
        for start, end, offset in regions:
            if start <= first < end:
                shape, stride = list(tensor.shape), list(tensor.stride())
                dtype = str(tensor.dtype).removeprefix("torch.")
                found[name] = [first - start + offset, tensor.storage_offset(), shape, stride, dtype]
    return found


def ties_of(model: nn.Module) -> list[list[str]]:
    """Names that are one and the same tensor, where they are more than one."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, tensor in registered(module):
            names.setdefault(id(tensor), []).append(dot + name)
    return sorted(sorted(set(group)) for group in names.values() if len(set(group)) > 1)


def error_text(error: BaseException | None) -> str:
    """An exception and where it was raised."""
    what = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__ if error is not None else None)
    return f"{what} (raised in {frames[-1].filename}, line {frames[-1].lineno})" if frames else what


def facts_of_values(values: Mapping[str, Any], known: Known | None = None) -> dict[str, str]:
    """Type, shape and digest of each tensor in the values of a state dict."""
    known = {} if known is None else known
    tensors = dict(iter_loaded_tensors(values))
    keys = {name: _key(tensor) for name, tensor in tensors.items()}
    # Of tensors that are one memory, one is hashed.
    new = {keys[name]: tensor for name, tensor in tensors.items() if keys[name] not in known}
    with ThreadPoolExecutor(LANES) as pool:
        known |= dict(zip(new, pool.map(_digest, new.values()), strict=True))
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {known[keys[name]]}"
        for name, tensor in tensors.items()
    }


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
    packed = plain.resolve_conj().resolve_neg().cpu().contiguous()
    nbytes = packed.numel() * packed.element_size()
    digest = hashlib.sha256()
    if nbytes:
        # The raw memory, because several types have no numpy view.
        digest.update((ctypes.c_char * nbytes).from_address(packed.data_ptr()))
    return digest.hexdigest()
