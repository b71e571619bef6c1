"""Tensors in what torch has loaded, named as manifests name them. Knows neither files nor manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ptbin.values.state_dict import key_label


def iter_loaded_tensors(loaded: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, plain tensor) pairs, named and ordered as `state_dict.tensors_of` does."""
    import torch

    for entry, root in loaded.items():
        seen: set[int] = set()
        stack: list[tuple[str, Any]] = [(str(entry), root)]
        while stack:
            name, value = stack.pop()
            if isinstance(value, torch.Tensor):
                yield from _parts(name, value)
                continue
            if id(value) in seen:
                continue  # containers may share parts without end; each is walked once
            seen.add(id(value))
            if isinstance(value, Mapping):
                stack.extend(reversed([(f"{name}.{key_label(key)}", v) for key, v in value.items()]))
            elif isinstance(value, (list, tuple)):
                stack.extend(reversed([(f"{name}.{index}", v) for index, v in enumerate(value)]))


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    import torch

    if tensor.layout is torch.sparse_coo:
        yield f"{name}#indices", tensor._indices()  # noqa: SLF001 - indices() refuses uncoalesced tensors
        yield f"{name}#values", tensor._values()  # noqa: SLF001 - as above
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield f"{name}#crow_indices", tensor.crow_indices()
        yield f"{name}#col_indices", tensor.col_indices()
        yield f"{name}#values", tensor.values()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield f"{name}#ccol_indices", tensor.ccol_indices()
        yield f"{name}#row_indices", tensor.row_indices()
        yield f"{name}#values", tensor.values()
    else:
        yield name, tensor
        if tensor.is_quantized and tensor.qscheme() in (
            torch.per_channel_affine,
            torch.per_channel_affine_float_qparams,
        ):
            yield f"{name}#scales", tensor.q_per_channel_scales()
            yield f"{name}#zero_points", tensor.q_per_channel_zero_points()
