"""`file_digest="none"`: no SHA-256 of a whole file; what is stated instead proves every byte just as well."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import fsspec
import jsonschema
import pytest
import torch

import ptbin
from ptbin.catalog.comparing import find_unchanged
from ptbin.options import ConvertOptions
from ptbin.proof.verification import verify

OPTIONS = ConvertOptions(file_digest="none", force=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "net.pt"
    whole = torch.randn(300, 500)
    state = {
        "a.weight": torch.randn(700, 800),
        "view": whole.t(),  # its elements lie apart: no digest but the file's own covers bytes between them
        "tied": whole,
        "part": whole[10:20],
        "none": torch.zeros(0),
        "b.bias": torch.randn(17).to(torch.bfloat16),
    }
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}}, place)
    return place


def convert(source: Path, dest: Path, **wishes: Any) -> dict[str, Any]:
    return ptbin.convert(str(source), str(dest), OPTIONS.replace(**wishes))


@pytest.mark.parametrize("form", ["torch", "safetensors", "raw"])
def test_the_manifest_states_the_bytes_between_tensors(form: str, source: Path, tmp_path: Path) -> None:
    suffix = {"torch": "bin"}.get(form, form)
    manifest = convert(source, tmp_path / f"out.{suffix}", format=form)
    (output, *_) = manifest["outputs"]
    data = (tmp_path / output["path"]).read_bytes()
    left = bytearray(b"\1") * len(data)
    for row in manifest["tensors"]:
        if row.get("stride") is None:
            left[row["offset"] : row["offset"] + row["nbytes"]] = bytes(row["nbytes"])
    between = bytes(byte for byte, kept in zip(data, left, strict=True) if kept)
    assert output["sha256"] is None
    assert output["gaps_sha256"] == hashlib.sha256(between).hexdigest()
    assert output["crc32"] == f"{zlib.crc32(data):08x}"
    schema = json.loads((Path(ptbin.__file__).parent / "manifest.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    assert manifest["verification"]["status"] == "verified"


def test_all_but_the_file_s_own_digest_is_as_ever(source: Path, tmp_path: Path) -> None:
    short = convert(source, tmp_path / "short.bin")
    usual = convert(source, tmp_path / "usual.bin", file_digest="sha256")
    assert (tmp_path / "short.bin").read_bytes() == (tmp_path / "usual.bin").read_bytes()
    assert short["options_fingerprint"] == usual["options_fingerprint"]
    assert [row["sha256"] for row in short["tensors"]] == [row["sha256"] for row in usual["tensors"]]


def test_every_flipped_byte_is_found(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    manifest = convert(source, out)
    place = f"{out}.manifest.json"
    assert verify(place) == []
    data = out.read_bytes()
    rows = [row for row in manifest["tensors"] if row["nbytes"]]
    inside = [row["offset"] + row["nbytes"] // 2 for row in rows]
    for at in (0, 70, *inside, *(row["offset"] - 1 for row in rows), len(data) - 1):
        out.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
        (issue,) = verify(place)
        assert issue.reason == "checksum_mismatch"
    assert "CRC-32" in issue.detail or "between tensors" in issue.detail


def test_a_byte_between_tensors_is_found_though_the_crc_is_right(source: Path, tmp_path: Path) -> None:
    """CRC-32 is no match for someone who means it: the SHA-256 between tensors is."""
    out = tmp_path / "out.bin"
    convert(source, out)
    data = bytearray(out.read_bytes())
    place = tmp_path / "out.bin.manifest.json"
    manifest = json.loads(place.read_text())
    data[len(data) - 1] ^= 8
    out.write_bytes(data)
    manifest["outputs"][0]["crc32"] = f"{zlib.crc32(data):08x}"
    place.write_text(json.dumps(manifest))
    (issue,) = verify(str(place))
    assert "SHA-256 between tensors" in issue.detail


def test_a_source_that_was_touched_leaves_the_output_as_it_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    convert(source, out)
    os.utime(source, ns=(1, 1))
    found = find_unchanged(str(source), str(out), OPTIONS)
    assert found is not None
    assert found.manifest["source"]["identity"]["value"].startswith("1-")
    state = torch.load(source)
    state["model"]["a.weight"][3, 3] += 1
    torch.save(state, source)
    assert find_unchanged(str(source), str(out), OPTIONS) is None


def test_subjects_of_a_statement_are_the_tensors(source: Path, tmp_path: Path) -> None:
    manifest = convert(source, tmp_path / "out.bin", provenance=True)
    statement = json.loads((tmp_path / "out.bin.intoto.json").read_text())
    assert statement["subject"] == [
        {"name": f"out.bin#{row['name']}", "digest": {"sha256": row["sha256"]}} for row in manifest["tensors"]
    ]
    assert verify(str(tmp_path / "out.bin.manifest.json")) == []


def test_shards_have_theirs_each_and_the_index_a_plain_one(source: Path, tmp_path: Path) -> None:
    manifest = convert(source, tmp_path / "out.bin", max_shard_size=1 << 20)
    shards = [output for output in manifest["outputs"] if not output["path"].endswith(".json")]
    assert len(shards) > 1
    assert all(output["sha256"] is None and output["gaps_sha256"] for output in shards)
    (index,) = [output for output in manifest["outputs"] if output["path"].endswith(".json")]
    assert index["sha256"] == hashlib.sha256((tmp_path / index["path"]).read_bytes()).hexdigest()
    assert verify(str(tmp_path / "out.bin.manifest.json")) == []


def test_a_remote_output_has_the_same_digests(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out.bin")
    ptbin.convert(str(source), "memory://digests/out.bin", OPTIONS)
    local = json.loads((tmp_path / "out.bin.manifest.json").read_text())
    with fsspec.open("memory://digests/out.bin.manifest.json") as file:
        remote = json.load(file)
    assert remote["outputs"] == local["outputs"]
    assert verify("memory://digests/out.bin.manifest.json") == []
