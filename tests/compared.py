"""Two state dicts to compare, and what the comparison says, which torch in float64 judges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.differences.values import Numbers

SAMPLE = {
    "embed.weight": torch.linspace(-2, 2, 600).reshape(20, 30),
    "fc.weight": torch.linspace(1, 3, 300).reshape(10, 30).bfloat16(),
    "steps": torch.arange(7),
}


def save(path: Path, state: Mapping[str, Any], **options: Any) -> Path:
    torch.save(dict(state), path, **options)
    return path


def changed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy whose `embed.weight` differs in one place."""
    copied = {name: tensor.clone() for name, tensor in state.items()}
    copied["embed.weight"][3, 4] += 0.5
    return copied


def numbers_of(found: ptbin.Difference, name: str) -> Numbers:
    (numbers,) = (tensor.numbers for tensor in found.tensors if tensor.name == name)
    assert numbers is not None
    return numbers


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).reshape(-1)


def assert_numbers_as_torch(found: Numbers, a: torch.Tensor, b: torch.Tensor) -> None:
    left, right = in_float64(a), in_float64(b)
    finite = torch.isfinite(left) & torch.isfinite(right)
    left, right = left[finite], right[finite]
    distance = (left - right).abs()
    assert found.elements == a.numel()
    assert found.max_abs == pytest.approx(distance.max().item(), rel=1e-15)
    nonzero = right != 0
    assert found.max_rel == pytest.approx((distance / right.abs())[nonzero].max().item(), rel=1e-14)
    assert found.index is not None
    at = in_float64(a).reshape(a.shape)[found.index] - in_float64(b).reshape(a.shape)[found.index]
    assert abs(at.item()) == pytest.approx(found.max_abs, rel=1e-15)
    if left.is_complex():
        left, right = torch.view_as_real(left).reshape(-1), torch.view_as_real(right).reshape(-1)
    if not all(math.isfinite(side.square().sum()) for side in (left, right)):
        assert found.cosine is None  # the squares of float64's largest numbers are too large
        return
    wanted = torch.nn.functional.cosine_similarity(left, right, dim=0, eps=0.0).item()
    assert found.cosine == pytest.approx(wanted, rel=1e-9, abs=1e-12)
