"""What both child processes need: digests of tensors in memory, and an exception in one line."""

from __future__ import annotations

import ctypes
import hashlib
import traceback
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["digests_of", "said_by"]


def digests_of(tensors: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 over the logical, contiguous bytes; sparse and quantized tensors are passed over."""
    return {
        name: _digest(tensor)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_quantized
    }


def said_by(error: BaseException | None) -> str:
    """An exception and where it was raised."""
    what = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__ if error is not None else None)
    return f"{what} (raised in {frames[-1].filename}, line {frames[-1].lineno})" if frames else what


def _digest(tensor: torch.Tensor) -> str:
    packed = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    nbytes = packed.numel() * packed.element_size()
    digest = hashlib.sha256()
    if nbytes:
        # The raw memory, because several types have no numpy view.
        digest.update((ctypes.c_char * nbytes).from_address(packed.data_ptr()))
    return digest.hexdigest()
