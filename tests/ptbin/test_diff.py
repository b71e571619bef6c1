"""`ptbin.diff`: what differs and how far, with torch as the judge; digests alone where there are digests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

import ptbin
from ptbin import ConvertOptions
from ptbin.errors import (
    AmbiguousStateDictError,
    ChecksumMismatchError,
    NotFoundInStoreError,
    OutputCollisionError,
    PtbinError,
    SourceChangedError,
    UnsafePickleError,
    UnsupportedTensorError,
    UsageError,
)
from tests.bits import same_bits
from tests.checkpoints import FACTORIES, Factory, MadeOnce, factories
from tests.checkpoints.dtypes import random_bits
from tests.compared import SAMPLE, assert_numbers_as_torch, changed, numbers_of, save
from tests.servers.endpoint import S3Endpoint
from tests.strategies import state_dicts

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
