"""What is in a model, as labels and digests: what two processes compare. Also an exception in one line.

A label is a tensor's name in the state dict (parts of values that hold several are named as manifests name
them), or says what else it is: a buffer that the state dict leaves out, a tensor in a plain attribute, a tie.
"""

from __future__ import annotations

import ctypes
import hashlib
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
    "other_tensors",
    "registered",
    "ties_of",
]

LANES = 2
"""Threads that hash: SHA-256 gives the interpreter up, and one core is not all there is."""


def digests_of(values: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 over the logical, contiguous bytes of each tensor in the values of a state dict."""
    return {name: text.rpartition(" ")[2] for name, text in facts_of_values(values).items()}


def facts_of_model(model: nn.Module) -> dict[str, str]:
    """Every tensor of a model by its label: type, shape and digest in one text. Ties are labels as well."""
    found = facts_of_values(model.state_dict())
    found |= facts_of_values(dict(other_tensors(model)))
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


def facts_of_values(values: Mapping[str, Any]) -> dict[str, str]:
    """Type, shape and digest of each tensor in the values of a state dict."""
    tensors = dict(iter_loaded_tensors(values))
    with ThreadPoolExecutor(LANES) as pool:
        # Of tensors that are one memory, one is hashed.
        keys = {name: _key(tensor) for name, tensor in tensors.items()}
        by_key = {keys[name]: tensor for name, tensor in tensors.items()}
        digests = dict(zip(by_key, pool.map(_digest, by_key.values()), strict=True))
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {digests[keys[name]]}"
        for name, tensor in tensors.items()
    }


def _key(tensor: torch.Tensor) -> Any:
    if tensor.is_quantized or tensor.device.type != "cpu" or not tensor.numel():
        return id(tensor)
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
