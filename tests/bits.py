"""When two tensors are the same: every bit, dtype and shape, whatever their layout in memory.

`torch.equal` will not do: it says no to equal NaNs and yes to 0.0 and -0.0. Knows nothing of ptbin, so
that it can be the judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["assert_same_tensors", "same_bits"]


def _bytes_of(tensor: torch.Tensor) -> bytes:
    resolved = tensor.detach().resolve_conj().resolve_neg()
    plain = resolved.clone(
        memory_format=torch.contiguous_format
    )  # `contiguous()` keeps odd strides of length 1
    if plain.numel() == 0:
        return b""
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _sparse_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def _quantized_parts(tensor: torch.Tensor) -> list[Any]:
    scheme = tensor.qscheme()
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale: list[Any] = [tensor.q_scale(), tensor.q_zero_point()]
    else:
        scale = [
            tensor.q_per_channel_scales(),
            tensor.q_per_channel_zero_points(),
            tensor.q_per_channel_axis(),
        ]
    return [scheme, *scale]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape, layout and every bit agree; strides and storages may differ."""
    if (left.dtype, left.shape, left.layout, left.device.type) != (
        right.dtype,
        right.shape,
        right.layout,
        right.device.type,
    ):
        return False
    if left.device.type == "meta":
        return True
    if left.layout is not torch.strided:
        return all(same_bits(a, b) for a, b in zip(_sparse_parts(left), _sparse_parts(right), strict=True))
    if left.is_quantized:
        pairs = zip(_quantized_parts(left), _quantized_parts(right), strict=True)
        return _same_storage(left, right) and all(
            same_bits(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs
        )
    return _bytes_of(left) == _bytes_of(right)


def _same_storage(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bytes(left.contiguous().untyped_storage().tolist()) == bytes(
        right.contiguous().untyped_storage().tolist()
    )


def assert_same_tensors(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    """Exactly the expected tensors, in any order; values that are no tensors are not looked at."""
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    assert sorted(tensors) == sorted(expected)
    for name, tensor in expected.items():
        assert same_bits(tensors[name], tensor), f"{name!r}: {tensors[name]!r} is not {tensor!r}"
