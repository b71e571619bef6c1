"""Manifests compared without their outputs, and with them where digests do not tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin import ConvertOptions
from ptbin.errors import (
    CorruptArchiveError,
    NotFoundInStoreError,
    VerificationError,
)
from tests.compared import SAMPLE, changed, numbers_of, save
from tests.fakes import CountingStore, registered


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
