"""Formats, casts and shards against torch: what went in comes back, with the same digests in each format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ptbin
from ptbin import ConvertOptions
from ptbin.errors import CheckpointError, CorruptArchiveError, UnsupportedTensorError
from tests.bits import assert_same_tensors, same_bits

FORMATS: tuple[Any, ...] = ("torch", "raw", "safetensors")


def _state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {
        "transposed": torch.randn(300, 70).t(),
        "strided": torch.randn(40, 40)[::2, 1::3],
        "half": torch.randn(5, 6, dtype=torch.bfloat16),
        "counts": torch.arange(10),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "matrix": torch.randn(100, 100),
    }
    made["tied"] = made["matrix"]
    return made


def _convert(folder: Path, state_dict: dict[str, Any], **options: Any) -> tuple[Path, dict[str, Any]]:
    source = folder / "source.pt"
    torch.save(state_dict, source)
    suffix = ".safetensors" if options.get("format") == "safetensors" else ".bin"
    output = folder / "out" / f"weights{suffix}"
    return output, ptbin.convert(str(source), str(output), ConvertOptions(verify="load", **options))


def _handle(output: Path) -> str:
    index = output.with_name(output.name + ".index.json")
    return str(index if not output.exists() else output)


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_comes_back_with_its_ties(form: Any, limit: int | None, tmp_path: Path) -> None:
    output, manifest = _convert(tmp_path, _state_dict(), format=form, max_shard_size=limit)
    assert ptbin.verify(f"{output}.manifest.json", level="load") == []
    back = ptbin.restore(_handle(output), str(tmp_path / "back.pt"))
    loaded = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_tensors(loaded, _state_dict())
    assert loaded["tied"].data_ptr() == loaded["matrix"].data_ptr()
    digests = {row["name"]: row["sha256"] for row in manifest["tensors"]}
    assert digests == {row["name"]: row["sha256"] for row in back["tensors"]}
    with ptbin.load(_handle(output)) as weights:
        for name, tensor in _state_dict().items():
            plain = torch.atleast_1d(tensor.contiguous())
            assert weights[name].tobytes() == plain.view(torch.uint8).numpy().tobytes(), name


def test_digests_are_the_same_across_formats(tmp_path: Path) -> None:
    found = []
    for form in FORMATS:
        (tmp_path / form).mkdir()
        _, manifest = _convert(tmp_path / form, _state_dict(), format=form)
        found.append({row["name"]: row["sha256"] for row in manifest["tensors"]})
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e5m2"])
@pytest.mark.parametrize("form", FORMATS)
def test_casts_are_those_of_torch(form: Any, dtype: str, tmp_path: Path) -> None:
    output, manifest = _convert(tmp_path, _state_dict(), format=form, dtype=dtype)
    ptbin.restore(_handle(output), str(tmp_path / "back.pt"))
    loaded = torch.load(tmp_path / "back.pt", weights_only=True)
    for name, tensor in _state_dict().items():
        wanted = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert same_bits(loaded[name], wanted), name
    rows = {row["name"]: row for row in manifest["tensors"]}
    assert rows["matrix"]["cast_from"] == "float32"
    assert "cast_from" not in rows["counts"]


def test_what_a_cast_makes_infinite_is_reported(tmp_path: Path) -> None:
    state_dict = {"w": torch.tensor([1.0, 1e6, -1e6, float("inf")]), "v": torch.ones(2)}
    _, manifest = _convert(tmp_path, state_dict, dtype="float16")
    rows = {row["name"]: row.get("overflowed") for row in manifest["tensors"]}
    assert rows == {"w": 2, "v": None}


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_shards_have_the_index_of_hugging_face(form: Any, tmp_path: Path) -> None:
    output, manifest = _convert(tmp_path, _state_dict(), format=form, max_shard_size=20_000)
    index = json.loads(Path(f"{output}.index.json").read_text())
    assert index["weight_map"]["tied"] == index["weight_map"]["matrix"]
    assert index["weight_map"].keys() == _state_dict().keys()
    tensors = {name: t for name, t in _state_dict().items() if name != "tied"}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    files = {item["path"] for item in manifest["outputs"]}
    assert files == {*index["weight_map"].values(), f"{output.name}.index.json"}
    assert not output.exists()


def test_shards_of_an_earlier_run_go(tmp_path: Path) -> None:
    output, before = _convert(tmp_path, _state_dict(), max_shard_size=20_000)
    _, after = _convert(tmp_path, _state_dict(), max_shard_size=60_000)
    left = {path.name for path in output.parent.iterdir()} - {f"{output.name}.manifest.json"}
    assert left == {item["path"] for item in after["outputs"]}
    assert left != {item["path"] for item in before["outputs"]}


def test_equal_matrices_are_joined_and_zeros_are_not(tmp_path: Path) -> None:
    matrix = torch.randn(8, 8)
    state_dict = {"a": matrix, "b": matrix.clone(), "c": torch.zeros(8, 8), "d": torch.zeros(8, 8)}
    output, manifest = _convert(tmp_path, state_dict, tie_by_value=True)
    loaded = torch.load(output, weights_only=True)
    assert_same_tensors(loaded, state_dict)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert loaded["c"].data_ptr() != loaded["d"].data_ptr()
    assert [item["path"] for item in manifest["left_out"]] == ["b"]


@pytest.mark.parametrize("form", ["raw", "safetensors"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["sparse", "quantized", "conjugate"])
def test_what_a_format_cannot_hold_is_refused(kind: str, form: Any, tmp_path: Path) -> None:
    tensor = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    }[kind]()
    with pytest.raises(UnsupportedTensorError, match="--format torch"):
        _convert(tmp_path, {"w": tensor, "v": torch.ones(2)}, format=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_flipped_byte_is_found(form: Any, tmp_path: Path) -> None:
    output, manifest = _convert(tmp_path, _state_dict(), format=form)
    row = next(row for row in manifest["tensors"] if row["name"] == "half")
    data = bytearray(output.read_bytes())
    data[row["offset"] + 3] ^= 1
    output.write_bytes(data)
    issues = ptbin.verify(f"{output}.manifest.json")
    assert [issue.reason for issue in issues] == ["checksum_mismatch"]
    assert "half" in issues[0].detail


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.bin", "a/b.bin", "..", "", "x\0.bin"])
def test_an_index_cannot_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
    with pytest.raises(CorruptArchiveError):
        ptbin.convert(str(index), str(tmp_path / "out.bin"))
    assert [path.name for path in tmp_path.iterdir()] == [index.name]


def _safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    {
        "a hole": _safetensors({"a": ROW, "b": {**ROW, "data_offsets": [12, 20]}}, bytes(20)),
        "an overlap": _safetensors({"a": ROW, "b": {**ROW, "data_offsets": [4, 12]}}, bytes(12)),
        "cut short": _safetensors({"a": ROW}, bytes(7)),
        "bytes behind": _safetensors({"a": ROW}, bytes(9)),
        "another size": _safetensors({"a": {**ROW, "shape": [3]}}, bytes(8)),
        "a negative shape": _safetensors({"a": {**ROW, "shape": [-2]}}, bytes(8)),
        "an unknown type": _safetensors({"a": {**ROW, "dtype": "F12"}}, bytes(8)),
        "a header as long as it likes": struct.pack("<Q", 1 << 40) + b"{" + bytes(100),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_lying_safetensors_header_is_refused(content: tuple[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content[1])
    with pytest.raises(CheckpointError):
        ptbin.convert(str(tmp_path / "x.safetensors"), str(tmp_path / "out.bin"))
    assert not (tmp_path / "out.bin").exists()


def test_a_lying_raw_index_is_refused(tmp_path: Path) -> None:
    output, _ = _convert(tmp_path, {"w": torch.ones(4)}, format="raw")
    index = Path(f"{output}.index.json")
    told = json.loads(index.read_text())
    for change in ({"offset": 1 << 40}, {"nbytes": 17}, {"shape": [-4]}, {"dtype": "float12"}):
        index.write_text(json.dumps({**told, "tensors": {"w": {**told["tensors"]["w"], **change}}}))
        with pytest.raises(CorruptArchiveError):
            ptbin.load(str(output))


def test_layout_hf_brings_what_belongs_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "hub" / "last.ckpt")
    for name in ("config.json", "tokenizer.json", "modeling_custom.py", "notes.md"):
        (tmp_path / "hub" / name).write_text("{}")
    output = tmp_path / "out" / "pytorch_model.bin"
    manifest = ptbin.convert(
        str(tmp_path / "hub" / "last.ckpt"), str(output), ConvertOptions(layout="hf", verify="load")
    )
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "config.json",
        "pytorch_model.bin",
        "pytorch_model.bin.manifest.json",
        "tokenizer.json",
    ]
    assert {item["path"] for item in manifest["outputs"]} == {
        "config.json",
        "pytorch_model.bin",
        "tokenizer.json",
    }
    assert ptbin.verify(f"{output}.manifest.json") == []


def test_pairs_of_4_bit_numbers_go_to_safetensors_and_back(tmp_path: Path) -> None:
    """safetensors counts numbers, torch pairs of them: its reader and writer are the oracles."""
    pairs = torch.arange(32, dtype=torch.uint8).view(2, 16).view(torch.float4_e2m1fn_x2)
    torch.save({"a": pairs, "t": pairs.t()}, tmp_path / "x.pt")
    safetensors.torch.save_file({"a": pairs}, tmp_path / "theirs.safetensors")
    ptbin.convert(tmp_path / "x.pt", tmp_path / "ours.safetensors", ConvertOptions(format="safetensors"))
    ptbin.convert(tmp_path / "theirs.safetensors", tmp_path / "back.bin")

    ours = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    for found, want in ((ours["a"], pairs), (ours["t"], pairs.t()), (back["a"], pairs)):
        assert found.dtype == want.dtype
        assert torch.equal(found.view(torch.uint8), want.contiguous().view(torch.uint8))


def test_half_a_pair_is_refused_both_ways(tmp_path: Path) -> None:
    row = {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}
    (tmp_path / "odd.safetensors").write_bytes(_safetensors({"a": row}, bytes(2)))
    torch.save({"a": torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedTensorError, match="odd number"):
        ptbin.convert(tmp_path / "odd.safetensors", tmp_path / "out.bin")
    with pytest.raises(UnsupportedTensorError, match="without a dimension"):
        ptbin.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", ConvertOptions(format="safetensors"))
