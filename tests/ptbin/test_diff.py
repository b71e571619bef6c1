"""`ptbin.diff`: what differs and how far, with torch as the judge; digests alone where there are digests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

import ptbin
from ptbin import ConvertOptions
from ptbin.differences import weights
from ptbin.differences.values import Numbers
from ptbin.errors import (
    AmbiguousStateDictError,
    ChecksumMismatchError,
    CorruptArchiveError,
    NotFoundInStoreError,
    OutputCollisionError,
    PtbinError,
    SourceChangedError,
    UnsafePickleError,
    UnsupportedTensorError,
    UsageError,
    VerificationError,
)
from tests.bits import same_bits
from tests.checkpoints import FACTORIES, Factory, MadeOnce, factories
from tests.checkpoints.dtypes import PLAIN_DTYPES, random_bits
from tests.fakes import CountingStore, registered
from tests.servers.endpoint import S3Endpoint
from tests.strategies import state_dicts

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


# -- how far: torch in float64 is the judge ------------------------------------------------------


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


# -- what differs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (torch.tensor([2**53 + 1, 3]), torch.tensor([2.0**53, 3], dtype=torch.float64), False),
        (torch.tensor([2**63 - 1]), torch.tensor([2.0**63], dtype=torch.float64), False),
        (torch.tensor([2**53, -(2**62)]), torch.tensor([2.0**53, -(2.0**62)], dtype=torch.float64), True),
        (torch.tensor([2**24 + 1]), torch.tensor([2.0**24]), False),
        (torch.tensor([2**60], dtype=torch.uint64), torch.tensor([2.0**60]), True),
        (torch.tensor([2**60]), torch.tensor([2.0**60 + 0j]), True),
        (torch.tensor([2**53 + 1], dtype=torch.uint64), torch.tensor([2**53 + 1]), True),
        (torch.tensor([2**53 + 1], dtype=torch.uint64), torch.tensor([2**53]), False),
        (torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([2.0**64]), False),
    ],
)
def test_an_integer_that_a_float_rounds_to_is_not_its_equal(
    a: torch.Tensor, b: torch.Tensor, equal: bool, tmp_path: Path
) -> None:
    torch.save({"w": a}, tmp_path / "a.pt")
    torch.save({"w": b}, tmp_path / "b.pt")
    assert ptbin.diff(tmp_path / "a.pt", tmp_path / "b.pt", check_dtype=False).equal is equal
    assert ptbin.diff(tmp_path / "b.pt", tmp_path / "a.pt", check_dtype=False, rtol=1e-6).equal


def test_names_shapes_and_order(tmp_path: Path) -> None:
    a = {**SAMPLE, "gone": torch.ones(2), "grown": torch.ones(2, 3), "far": torch.zeros(3)}
    b = {**changed(SAMPLE), "new": torch.ones(4), "grown": torch.ones(3, 3), "far": torch.full((3,), 9.0)}
    found = ptbin.diff(save(tmp_path / "a.pt", a), save(tmp_path / "b.pt", b))
    assert [tensor.name for tensor in found.only_in_a] == ["gone"]
    assert [(tensor.name, tensor.shape) for tensor in found.only_in_b] == [("new", (4,))]
    assert [(tensor.name, tensor.what) for tensor in found.tensors] == [
        ("grown", ("shape",)),
        ("far", ("bytes",)),  # the largest difference first
        ("embed.weight", ("bytes",)),
    ]
    counts = found.to_json()["counts"]
    assert (counts["common"], counts["equal"], counts["different"]) == (5, 2, 3)


def test_ties(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tied = {"embed": whole, "head": whole, "view": whole[:6], "q": torch.ones(3)}
    loose = {name: tensor.clone() for name, tensor in tied.items()}
    a, b = save(tmp_path / "a.pt", tied), save(tmp_path / "b.pt", loose)
    found = ptbin.diff(a, b)
    assert not found.equal
    assert found.tensors == ()
    assert found.ties_only_in_a == (("embed", "head", "view"),)
    assert found.ties_only_in_b == ()
    assert ptbin.diff(b, a).ties_only_in_b == (("embed", "head", "view"),)
    assert ptbin.diff(a, b, check_ties=False).equal
    # neighbours in one storage share no byte
    both = torch.arange(6.0)
    split = save(tmp_path / "c.pt", {"x": both[:3], "y": both[3:]})
    apart = save(tmp_path / "d.pt", {"x": both[:3].clone(), "y": both[3:].clone()})
    assert ptbin.diff(split, apart).equal


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_by_their_integers_and_their_scales(tmp_path: Path) -> None:
    values = torch.linspace(-1, 1, 12).reshape(3, 4)
    a = torch.quantize_per_tensor(values, 0.05, 3, torch.qint8)
    coarse = torch._make_per_tensor_quantized_tensor(a.int_repr(), 0.5, 3)
    other = torch._make_per_tensor_quantized_tensor(a.int_repr() + 2, 0.05, 3)
    paths = [save(tmp_path / f"{n}.pt", {"w": tensor}) for n, tensor in enumerate((a, coarse, other))]
    (scale,) = ptbin.diff(paths[0], paths[1]).tensors
    assert scale.what == ("quantizer",)
    (integers,) = ptbin.diff(paths[0], paths[2]).tensors
    assert integers.what == ("bytes",)
    assert integers.numbers is not None
    assert integers.numbers.max_abs == 2
    # digests say nothing of scales: the outputs' indices do
    manifests = []
    for path in paths:
        ptbin.convert(str(path), f"{path}.bin")
        manifests.append(f"{path}.bin.manifest.json")
    assert ptbin.diff(manifests[0], manifests[0]).equal
    assert [t.what for t in ptbin.diff(manifests[0], manifests[1]).tensors] == [("quantizer",)]
    (tmp_path / "0.pt.bin").unlink()
    with pytest.raises(NotFoundInStoreError):
        ptbin.diff(manifests[0], manifests[1])


@pytest.mark.parametrize("name", ["sparse_coo", "sparse_csr"])
def test_sparse_tensors_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    path = FACTORIES[name].make(tmp_path).path
    ptbin.convert(str(path), str(tmp_path / "out.bin"))
    for uri in (path, tmp_path / "out.bin", tmp_path / "out.bin.manifest.json"):
        with pytest.raises(UnsupportedTensorError, match=r"'s' is sparse.*--drop"):
            ptbin.diff(uri, uri)
        assert ptbin.diff(uri, uri, options=ConvertOptions(drop=("^s$", "^s#"))).common == 1


def test_types_without_numbers_are_compared_by_bits(tmp_path: Path) -> None:
    a, b = (random_bits(torch.float4_e2m1fn_x2, (64,), seed=seed) for seed in (1, 2))
    found = ptbin.diff(save(tmp_path / "a.pt", {"w": a}), save(tmp_path / "b.pt", {"w": b}))
    numbers = numbers_of(found, "w")
    assert numbers.different == int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
    assert (numbers.max_abs, numbers.max_rel, numbers.cosine) == (None, None, None)


def test_lazy_conjugates_are_compared_as_torch_shows_them(tmp_path: Path) -> None:
    z, other = torch.randn(4, 5, dtype=torch.complex64), torch.randn(4, 5, dtype=torch.float64)
    negative = torch._neg_view(other)
    lazy = save(tmp_path / "a.pt", {"conj": z.conj(), "neg": negative})
    plain = save(tmp_path / "b.pt", {"conj": z.conj().resolve_conj(), "neg": negative.resolve_neg()})
    assert ptbin.diff(lazy, plain).equal
    flipped = save(tmp_path / "c.pt", {"conj": z.clone(), "neg": -other})
    found = ptbin.diff(lazy, flipped)
    assert [tensor.name for tensor in found.tensors] == ["conj"]
    assert_numbers_as_torch(numbers_of(found, "conj"), z.conj().resolve_conj(), z)


# -- any containers ------------------------------------------------------------------------------

ROOMS = [
    *(f for room in ("layouts", "modules") for f in factories(room=room, refused=False)),
    *(factory for factory in factories(room="dtypes", refused=False) if "sparse" not in factory.name),
]


@pytest.mark.parametrize("factory", ROOMS, ids=str)
def test_a_checkpoint_and_its_output_are_equal_however_they_are_read(
    factory: Factory, made_once: MadeOnce, tmp_path: Path
) -> None:
    made = made_once(factory)
    options = ConvertOptions(**made.options)
    output = tmp_path / "out.bin"
    ptbin.convert(str(made.path), str(output), options)
    whole = ConvertOptions(select=".")
    assert ptbin.diff(made.path, output, options=options, options_b=whole).equal
    manifest = f"{output}.manifest.json"
    assert ptbin.diff(made.path, manifest, options=options, options_b=ConvertOptions()).equal
    assert ptbin.diff(manifest, output, options_b=whole).equal


def every_container(folder: Path, state: Mapping[str, torch.Tensor]) -> list[Path]:
    """The same tensors, every way that ptbin reads."""
    source = save(folder / "zip.pt", state)
    save(folder / "legacy.pt", state, _use_new_zipfile_serialization=False)
    save_dcp(dict(state), checkpoint_id=folder / "dcp", no_dist=True)
    made = [source, folder / "legacy.pt", folder / "dcp"]
    for name, options in {
        "out.bin": ConvertOptions(),
        "out.safetensors": ConvertOptions(format="safetensors"),
        "raw.bin": ConvertOptions(format="raw"),
        "shards.bin": ConvertOptions(max_shard_size=1000),
    }.items():
        ptbin.convert(str(source), str(folder / name), options)
        sharded = options.max_shard_size is not None
        made += [folder / (f"{name}.index.json" if sharded else name), folder / f"{name}.manifest.json"]
    return made


@pytest.mark.filterwarnings("ignore")
def test_any_container_with_any_other(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    left = every_container(tmp_path / "a", SAMPLE)
    right = every_container(tmp_path / "b", changed(SAMPLE))
    for number, a in enumerate(left):
        assert ptbin.diff(a, left[(number + 3) % len(left)]).equal, a
        b = right[(number * 4 + 1) % len(right)]
        found = ptbin.diff(a, b)
        assert [(tensor.name, tensor.what) for tensor in found.tensors] == [("embed.weight", ("bytes",))]
        both_manifests = str(a).endswith("manifest.json") and str(b).endswith("manifest.json")
        if not both_manifests:
            numbers = numbers_of(found, "embed.weight")
            assert (numbers.different, numbers.index, numbers.max_abs) == (1, (3, 4), 0.5)


def test_prefixes_and_selections(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in SAMPLE.items()}
    a = save(tmp_path / "a.pt", {"net": wrapped, "other": {"w": torch.ones(3)}})
    b = save(tmp_path / "b.pt", SAMPLE)
    with pytest.raises(AmbiguousStateDictError):
        ptbin.diff(a, b)
    net = ConvertOptions(select="net")
    found = ptbin.diff(a, b, options=net, options_b=ConvertOptions())
    assert (found.common, found.equal) == (0, False)
    assert found.notes == ("3 names would match with --strip-prefix auto",)
    stripped = ConvertOptions(strip_prefix="auto")
    assert ptbin.diff(a, b, options=stripped.replace(select="net"), options_b=stripped).equal
    renamed = ConvertOptions(rename=((r"^module\.", ""),))
    assert ptbin.diff(a, b, options=renamed.replace(select="net"), options_b=renamed).equal
    ptbin.convert(str(a), str(tmp_path / "a.bin"), net)
    assert ptbin.diff(tmp_path / "a.bin.manifest.json", b, options=stripped).equal
    with pytest.raises(UsageError, match="nothing to select"):
        ptbin.diff(tmp_path / "a.bin.manifest.json", b, options=net)
    with pytest.raises(OutputCollisionError):
        ptbin.diff(tmp_path / "a.bin.manifest.json", b, options=ConvertOptions(rename=((".*", "x"),)))
    prefixed = save(tmp_path / "c.pt", {f"model.net.{name}": tensor for name, tensor in SAMPLE.items()})
    assert ptbin.diff(prefixed, b).notes == ("3 names would match with --strip-prefix model.net.",)


# -- manifests -----------------------------------------------------------------------------------


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[Path, Path]:
    """Two outputs with manifests; one tensor differs."""
    made = []
    for name, state in (("a", SAMPLE), ("b", changed(SAMPLE))):
        ptbin.convert(str(save(tmp_path / f"{name}.pt", state)), str(tmp_path / f"{name}.bin"))
        made.append(tmp_path / f"{name}.bin")
    return made[0], made[1]


def manifest_of(output: Path) -> Path:
    return Path(f"{output}.manifest.json")


def test_two_manifests_need_no_outputs_and_no_requests_for_them(outputs: tuple[Path, Path]) -> None:
    for output in outputs:
        output.unlink()
    from ptbin.stores.local import LocalStore

    with registered("file", CountingStore(LocalStore())) as store:
        found = ptbin.diff(*map(manifest_of, outputs))
    assert [(tensor.name, tensor.what, tensor.numbers) for tensor in found.tensors] == [
        ("embed.weight", ("bytes",), None)
    ]
    assert (found.by_digest, found.weight_bytes_read) == (3, 0)
    assert {Path(call.path).suffix for call in store.calls} == {".json"}


def test_a_tolerance_reads_only_what_digests_tell_apart(outputs: tuple[Path, Path]) -> None:
    manifests = tuple(map(manifest_of, outputs))
    assert ptbin.diff(*manifests, atol=0.6).equal
    found = ptbin.diff(*manifests, atol=0.4)
    assert not found.equal
    assert numbers_of(found, "embed.weight").max_abs == 0.5
    assert found.weight_bytes_read == 2 * SAMPLE["embed.weight"].nbytes
    outputs[1].unlink()
    with pytest.raises(NotFoundInStoreError):
        ptbin.diff(*manifests, atol=0.4)


def test_a_manifest_and_a_checkpoint(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    manifest, other = manifest_of(outputs[0]), tmp_path / "b.pt"
    for found in (ptbin.diff(manifest, other), ptbin.diff(other, manifest)):
        assert numbers_of(found, "embed.weight").index == (3, 4)
    outputs[0].unlink()
    found = ptbin.diff(manifest, other)
    assert [(t.name, t.what, t.numbers) for t in found.tensors] == [("embed.weight", ("bytes",), None)]
    assert "no numbers" in found.notes[0]
    assert ptbin.diff(manifest, tmp_path / "a.pt").equal


def test_manifests_without_digests_read_the_outputs(tmp_path: Path) -> None:
    unproven = ConvertOptions(verify="none")
    for name, state in (("a", SAMPLE), ("b", changed(SAMPLE))):
        ptbin.convert(str(save(tmp_path / f"{name}.pt", state)), str(tmp_path / f"{name}.bin"), unproven)
    found = ptbin.diff(tmp_path / "a.bin.manifest.json", tmp_path / "b.bin.manifest.json")
    assert found.by_digest == 0
    assert numbers_of(found, "embed.weight").different == 1
    with (tmp_path / "b.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptArchiveError, match="truncated"):
        ptbin.diff(tmp_path / "a.bin.manifest.json", tmp_path / "b.bin.manifest.json")


def test_manifests_of_split_outputs_compare_file_by_file(tmp_path: Path) -> None:
    parts = {"enc": {"w": torch.ones(3)}, "dec": {"w": torch.zeros(3)}}
    for folder, value in (("x", 0.0), ("y", 2.0)):
        parts["dec"]["w"].fill_(value)
        path = save(tmp_path / f"{folder}.pt", parts)
        (tmp_path / folder).mkdir()
        ptbin.convert(str(path), str(tmp_path / folder / "g.bin"), ConvertOptions(split=True))
    found = ptbin.diff(*(tmp_path / folder / "g.bin.manifest.json" for folder in ("x", "y")))
    assert found.common == 2
    assert [tensor.name for tensor in found.tensors] == ["g.dec.bin: w"]


def break_row(row: dict[str, Any], key: str, value: object) -> None:
    if value is None:
        del row[key]
    else:
        row[key] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 7),
        ("name", None),
        ("dtype", ["float32"]),
        ("dtype", "float31"),
        ("shape", [1 << 61, 1 << 61]),
        ("shape", "ab"),
        ("shape", [-1]),
        ("nbytes", 3),
        ("offset", True),
        ("file", ["a.bin"]),
        ("file", "../../etc/passwd"),
        ("sha256", 12),
        ("sha256", "abc"),
        ("stride", [1]),
        ("stride", [1, "x"]),
        ("lazy", 5),
        ("lazy", ["run"]),
    ],
)
def test_a_manifest_that_is_not_consistent(key: str, value: object, outputs: tuple[Path, Path]) -> None:
    path = manifest_of(outputs[0])
    manifest = json.loads(path.read_text())
    break_row(manifest["tensors"][0], key, value)
    path.write_text(json.dumps(manifest))
    with pytest.raises((VerificationError, CorruptArchiveError)):
        ptbin.diff(path, manifest_of(outputs[1]))


def test_a_manifest_that_points_out_of_its_file_or_claims_too_much(outputs: tuple[Path, Path]) -> None:
    path = manifest_of(outputs[0])
    for changes in ({"offset": 1 << 40}, {"shape": [1 << 40, 30], "stride": [0, 1], "nbytes": 120 << 40}):
        manifest = json.loads(path.read_text())
        for row in manifest["tensors"]:
            row["sha256"] = None
        manifest["tensors"][0].update(changes)
        broken = path.with_name("broken.manifest.json")
        broken.write_text(json.dumps(manifest))
        with pytest.raises((VerificationError, CorruptArchiveError)):
            ptbin.diff(broken, broken)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', "[" * 100_000, "\x00"])
def test_what_is_not_a_manifest(text: str, outputs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(VerificationError):
        ptbin.diff(tmp_path / "x.json", outputs[0])


# -- damage, change, hostility -------------------------------------------------------------------


def test_a_damaged_tensor_is_reported_as_damaged_and_not_as_different(tmp_path: Path) -> None:
    good = save(tmp_path / "good.pt", SAMPLE)
    raw = bytearray(good.read_bytes())
    at = raw.index(SAMPLE["embed.weight"].numpy().tobytes())
    raw[at + 100] ^= 1
    (tmp_path / "bad.pt").write_bytes(raw)
    for pair in ((good, tmp_path / "bad.pt"), (tmp_path / "bad.pt", good)):
        with pytest.raises(ChecksumMismatchError, match=r"bad\.pt.*data/0.*damaged"):
            ptbin.diff(*pair)


@pytest.mark.parametrize("name", ["out.safetensors", "zip.pt", "legacy.pt"])
def test_every_truncation_has_a_reason(name: str, tmp_path: Path) -> None:
    good = save(tmp_path / "zip.pt", SAMPLE)
    save(tmp_path / "legacy.pt", SAMPLE, _use_new_zipfile_serialization=False)
    ptbin.convert(str(good), str(tmp_path / "out.safetensors"), ConvertOptions(format="safetensors"))
    whole = (tmp_path / name).read_bytes()
    for end in range(0, len(whole), len(whole) // 12):
        (tmp_path / "cut").write_bytes(whole[:end])
        with pytest.raises(PtbinError):
            ptbin.diff(good, tmp_path / "cut")


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path) -> None:
    good = save(tmp_path / "good.pt", SAMPLE)
    made = next(f for f in factories(room="hostile", refused=True) if f.reason == "unsafe_pickle").make(
        tmp_path
    )
    with pytest.raises(UnsafePickleError):
        ptbin.diff(good, made.path)
    assert made.canary is not None
    assert not made.canary.exists()


def test_a_file_replaced_meanwhile(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.pt", SAMPLE), save(tmp_path / "b.pt", changed(SAMPLE))

    def replace(nbytes: int) -> None:
        save(a, changed(SAMPLE))

    with pytest.raises(SourceChangedError):
        ptbin.diff(a, b, progress=replace)


# -- threads, memory, stores ---------------------------------------------------------------------


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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=state_dicts(), data=st.data())
def test_exactly_the_tensors_whose_bits_changed_are_found(
    state: dict[str, torch.Tensor], data: st.DataObject, tmp_path: Path
) -> None:
    """The judge of bits is torch's memory (`tests.bits`); ties are left as they are by the copy."""
    path = save(tmp_path / "a.pt", state)
    other = torch.load(path, weights_only=True)
    for name in data.draw(st.lists(st.sampled_from(sorted(other)), max_size=2)):
        tensor = other[name]
        if tensor.numel() and 0 not in tensor.stride():
            flat = tensor.untyped_storage()
            at = tensor.storage_offset() * tensor.element_size()
            flat[at] = 1 - flat[at] if tensor.dtype == torch.bool else flat[at] ^ 1
    second = save(tmp_path / "b.pt", other)
    wanted = {name for name in state if not same_bits(state[name], other[name])}
    found = ptbin.diff(path, second, options=ConvertOptions(select="."))
    assert {tensor.name for tensor in found.tensors} == wanted
    assert found.equal == (not wanted)
    assert not found.ties_differ


def test_stores(tmp_path: Path, moto_s3: S3Endpoint) -> None:
    options = moto_s3.storage_options
    bucket = moto_s3.make_bucket()
    a, b = save(tmp_path / "a.pt", SAMPLE), save(tmp_path / "b.pt", changed(SAMPLE))
    for name in ("shards.bin", "same.bin"):
        shards = ConvertOptions(max_shard_size=1000 if name == "shards.bin" else None)
        ptbin.convert(str(a), f"s3://{bucket}/{name}", shards, dest_options=options)
    index, whole = f"s3://{bucket}/shards.bin.index.json", f"s3://{bucket}/same.bin"
    assert ptbin.diff(index, whole, storage_options=options).equal
    assert ptbin.diff(index, a, storage_options=options).equal
    assert ptbin.diff(a, f"{whole}.manifest.json", storage_options={}, storage_options_b=options).equal
    found = ptbin.diff(b, index, storage_options={}, storage_options_b=options)
    assert numbers_of(found, "embed.weight").index == (3, 4)
    with pytest.raises(NotFoundInStoreError):
        ptbin.diff(f"s3://{bucket}/nothing.bin", whole, storage_options=options)
