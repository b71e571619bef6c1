"""How far two checkpoints lie apart: torch in float64 is the judge."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin.differences import weights
from ptbin.errors import (
    UsageError,
)
from tests.bits import same_bits
from tests.checkpoints.dtypes import PLAIN_DTYPES, random_bits
from tests.compared import SAMPLE, assert_numbers_as_torch, in_float64, numbers_of, save

NUMERIC = [dtype for dtype in PLAIN_DTYPES if dtype not in (torch.float4_e2m1fn_x2, torch.uint64)]


@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_numbers_are_those_of_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    """Random bits, so that NaNs, infinities and subnormals are among them."""
    a, b = random_bits(dtype, (37, 11), seed=1), random_bits(dtype, (37, 11), seed=2)
    b[20:] = a[20:]
    found = ptbin.diff(save(tmp_path / "a.pt", {"w": a}), save(tmp_path / "b.pt", {"w": b}))
    numbers = numbers_of(found, "w")
    assert numbers.different == sum(
        not same_bits(x, y) for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)
    )
    integers = not (dtype.is_floating_point or dtype.is_complex)
    if not integers:
        finite = torch.isfinite(in_float64(a)) & torch.isfinite(in_float64(b))
        assert numbers.non_finite == int((~finite[: 20 * 11]).sum())
    assert_numbers_as_torch(numbers, a, b)


def test_integers_are_subtracted_exactly(tmp_path: Path) -> None:
    top = (1 << 63) - 1
    states = [
        {
            "i": torch.tensor([low, 5]),
            "near": torch.tensor([top]),
            "u": torch.tensor([high], dtype=torch.uint64),
        }
        for low, high in ((-top - 1, (1 << 64) - 1), (top, 0))
    ]
    states[1]["near"] = torch.tensor([top - 1])
    found = ptbin.diff(save(tmp_path / "a.pt", states[0]), save(tmp_path / "b.pt", states[1]))
    assert {name: numbers_of(found, name).max_abs for name in ("i", "near", "u")} == {
        "i": (1 << 64) - 1,
        "near": 1,
        "u": (1 << 64) - 1,
    }


def test_equality_is_by_bits(tmp_path: Path) -> None:
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    a = {"zero": torch.tensor([0.0, 1.0]), "nan": nans[:1], "inf": torch.tensor([math.inf, 1.0, 2.0])}
    b = {"zero": torch.tensor([-0.0, 1.0]), "nan": nans[1:], "inf": torch.tensor([1.0, 1.0, 2.5])}
    first, second = save(tmp_path / "a.pt", a), save(tmp_path / "b.pt", b)
    assert ptbin.diff(first, first).equal
    found = ptbin.diff(first, second)
    assert [tensor.what for tensor in found.tensors] == [("bytes",)] * 3
    zero, nan, inf = (numbers_of(found, name) for name in ("zero", "nan", "inf"))
    assert (zero.different, zero.max_abs, zero.index, zero.non_finite) == (1, 0, None, 0)
    assert (nan.different, nan.max_abs, nan.cosine, nan.non_finite) == (1, None, None, 1)
    assert (inf.different, inf.max_abs, inf.index, inf.non_finite) == (2, 0.5, (2,), 1)
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.complex64], ids=str)
@pytest.mark.parametrize(("rtol", "atol"), [(1e-2, 0.0), (0.0, 0.5), (1e-3, 1e-3)])
def test_tolerance_is_that_of_isclose(dtype: torch.dtype, rtol: float, atol: float, tmp_path: Path) -> None:
    torch.manual_seed(3)
    wide = torch.randn(64, dtype=torch.complex64 if dtype.is_complex else torch.float32) * 50
    a = wide.to(dtype)
    b = (wide + torch.randn_like(wide) * torch.logspace(-6, 1, 64)).to(dtype)
    if dtype.is_floating_point:
        a[0] = b[0] = math.inf
        a[1], b[1] = math.inf, -math.inf
        a[2], b[2] = math.nan, 1.0
        a[3], b[3] = math.nan, -math.nan
    paths = save(tmp_path / "a.pt", {"w": a}), save(tmp_path / "b.pt", {"w": b})
    wanted = ~torch.isclose(in_float64(a), in_float64(b), rtol=rtol, atol=atol, equal_nan=True)
    found = ptbin.diff(*paths, rtol=rtol, atol=atol)
    assert numbers_of(found, "w").beyond_tolerance == int(wanted.sum()) > 0
    assert not found.equal
    loose = ptbin.diff(*paths, rtol=1e9, atol=1e9)
    only_infinities = 2 if dtype.is_floating_point else 0
    assert numbers_of(loose, "w").beyond_tolerance == only_infinities
    assert loose.equal == (not only_infinities)
    assert [tensor.name for tensor in loose.tensors] == ["w"]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none(value: float, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", SAMPLE)
    with pytest.raises(UsageError, match="atol"):
        ptbin.diff(path, path, atol=value)


def test_types_that_differ_are_compared_by_value(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = torch.randn(40, 50)
    a = {"w": wide, "i": torch.arange(5), "mask": torch.tensor([True, False])}
    b = {"w": wide.half(), "i": torch.arange(5.0), "mask": torch.tensor([1, 0], dtype=torch.uint8)}
    paths = save(tmp_path / "a.pt", a), save(tmp_path / "b.pt", b)
    found = ptbin.diff(*paths)
    assert {tensor.name: tensor.what for tensor in found.tensors} == {
        "w": ("dtype", "values"),
        "i": ("dtype",),
        "mask": ("dtype",),
    }
    assert_numbers_as_torch(numbers_of(found, "w"), wide, b["w"])
    assert not ptbin.diff(*paths, check_dtype=False).equal
    assert ptbin.diff(*paths, check_dtype=False, atol=1e-2).equal
    del a["w"], b["w"]
    assert ptbin.diff(save(paths[0], a), save(paths[1], b), check_dtype=False).equal


def test_the_numbers_do_not_depend_on_how_the_work_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    a = {f"w{n}": torch.randn(300, 1000) for n in range(3)} | {"t": torch.randn(500, 400).t()}
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["w0"][299, 3] += 1  # after many equal elements
    b["w1"][:, 5] *= 1.5
    b["t"][399, 499] = math.nan
    paths = save(tmp_path / "a.pt", a), save(tmp_path / "b.pt", b)
    found = []
    for cores, group in ((1, 1 << 25), (4, 1 << 18)):
        monkeypatch.setattr(weights, "available_cores", lambda cores=cores: cores)
        monkeypatch.setattr(weights, "GROUP_NBYTES", group)
        found.append(ptbin.diff(*paths))
    one, many = ({tensor.name: tensor.numbers for tensor in each.tensors} for each in found)
    assert one.keys() == many.keys() == {"w0", "w1", "t"}
    for name in ("w0", "w1"):
        for each in (one, many):
            numbers = each[name]
            assert numbers is not None
            assert_numbers_as_torch(numbers, a[name], b[name])
    assert many["t"] == one["t"]
