"""Every truncation and every flipped byte: the right weights or a clear refusal, never anything else.

All positions of small checkpoints, not a sample. With the default proof level; the verdict on what came
out is torch's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin.errors import ChecksumMismatchError, PtbinError
from tests.bits import same_bits

pytestmark = pytest.mark.thorough


def small_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    weight = torch.randn(3, 5)
    return {"fc.weight": weight, "fc.bias": torch.randn(3), "tied": weight, "steps": torch.tensor(7)}


def convert_damaged(data: bytes, folder: Path) -> dict[str, torch.Tensor] | str:
    """What torch reads from the output, or the reason of the refusal."""
    source, output = folder / "s.pt", folder / "o.bin"
    source.write_bytes(data)
    try:
        ptbin.convert(str(source), str(output))
    except PtbinError as error:
        assert not output.exists()
        assert not (folder / "o.bin.manifest.json").exists()
        return error.reason
    loaded = torch.load(output, weights_only=True)
    output.unlink()
    (folder / "o.bin.manifest.json").unlink()
    assert isinstance(loaded, dict)
    return loaded


def saved(folder: Path, *, legacy: bool = False) -> bytes:
    path = folder / "intact.pt"
    torch.save({"epoch": 1, "model": small_state()}, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


def assert_right_weights(
    loaded: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str
) -> None:
    """Each name that is there has its very tensor; a damaged name may be another name, as in any reader."""
    assert len(loaded) == len(wanted), where
    for (name, tensor), (right, expected) in zip(loaded.items(), wanted.items(), strict=True):
        assert same_bits(tensor, expected), f"{where}: {name!r} ({right!r})"


@pytest.mark.parametrize("part", range(12))
def test_every_flipped_byte_of_a_zip_checkpoint(part: int, tmp_path: Path) -> None:
    intact = saved(tmp_path)
    wanted = small_state()
    refused = 0
    for position in range(part, len(intact), 12):
        mask = 0xFF if position // 12 % 2 else 1 << (position % 8)
        damaged = bytearray(intact)
        damaged[position] ^= mask
        outcome = convert_damaged(bytes(damaged), tmp_path)
        if isinstance(outcome, str):
            refused += 1
            continue
        # The pickle lies under a CRC-32, so even the names must be the very ones.
        assert list(outcome) == list(wanted), position
        assert_right_weights(outcome, wanted, f"byte {position} ^ {mask:#04x}")
    assert refused > 0


@pytest.mark.parametrize("position", [100_000, 1_500_000, 3_900_000])
def test_damage_found_while_the_copy_is_under_way_leaves_the_good_output(
    position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with files of gigabytes, which are read back as they are written."""
    monkeypatch.setattr("ptbin.proof.written.FOLLOWED_NBYTES", 1)
    monkeypatch.setattr("ptbin.proof.growing.FOLLOWED_NBYTES", 1)
    source, output = tmp_path / "s.pt", tmp_path / "o.bin"
    torch.save({"a": torch.arange(500_000), "b": torch.ones(1000)}, source)
    manifest = ptbin.convert(str(source), str(output))
    good = output.read_bytes()
    (digest,) = [one["sha256"] for one in manifest["outputs"]]
    assert digest == hashlib.sha256(good).hexdigest()
    damaged = bytearray(source.read_bytes())
    damaged[position] ^= 1
    source.write_bytes(damaged)
    with pytest.raises(ChecksumMismatchError):
        ptbin.convert(str(source), str(output))
    assert output.read_bytes() == good
    assert ptbin.verify(f"{output}.manifest.json") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.bin", "o.bin.manifest.json", "s.pt"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_truncation(legacy: bool, tmp_path: Path) -> None:
    intact = saved(tmp_path, legacy=legacy)
    for length in range(len(intact)):
        outcome = convert_damaged(intact[:length], tmp_path)
        assert isinstance(outcome, str), f"{length} of {len(intact)} bytes gave an output"
        assert outcome in {"corrupt_archive", "unsupported_format"}, length


def test_a_legacy_file_has_no_checksums_but_every_flip_outside_its_weights_is_survived(
    tmp_path: Path,
) -> None:
    """Flips in the pickles may rename or be refused; no flip may end in a crash or in fewer tensors."""
    intact = saved(tmp_path, legacy=True)
    wanted = small_state()
    for position in range(0, len(intact), 3):
        damaged = bytearray(intact)
        damaged[position] ^= 0x10
        outcome = convert_damaged(bytes(damaged), tmp_path)
        if not isinstance(outcome, str):
            assert 1 <= len(outcome) <= len(wanted), position


@pytest.mark.parametrize("part", range(4))
def test_every_flipped_byte_of_an_output_is_found(part: int, tmp_path: Path) -> None:
    source, output = tmp_path / "s.pt", tmp_path / "o.bin"
    source.write_bytes(saved(tmp_path))
    ptbin.convert(str(source), str(output))
    intact = output.read_bytes()
    manifest = f"{output}.manifest.json"
    assert ptbin.verify(manifest) == []
    for position in range(part, len(intact), 4):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << (position % 8)
        output.write_bytes(damaged)
        issues = ptbin.verify(manifest)
        assert [issue.reason for issue in issues] == ["checksum_mismatch"], position


def test_verify_names_the_tensors_that_are_hit(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100), "b": torch.zeros(100)}, tmp_path / "s.pt")
    manifest = ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"))
    row = next(row for row in manifest["tensors"] if row["name"] == "b")
    data = bytearray((tmp_path / "o.bin").read_bytes())
    data[row["offset"] + 3] ^= 4
    (tmp_path / "o.bin").write_bytes(data)
    (issue,) = ptbin.verify(str(tmp_path / "o.bin.manifest.json"))
    assert "tensors b" in issue.detail


def test_verify_finds_missing_short_and_unexplained_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "s.pt")
    manifest = str(tmp_path / "o.bin.manifest.json")
    ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"))
    whole = (tmp_path / "o.bin").read_bytes()
    (tmp_path / "o.bin").write_bytes(whole[:-1])
    assert [i.reason for i in ptbin.verify(manifest)] == ["size_mismatch"]
    (tmp_path / "o.bin").unlink()
    assert [i.reason for i in ptbin.verify(manifest)] == ["missing_output"]
    Path(manifest).write_text("{}")
    assert [i.reason for i in ptbin.verify(manifest)] == ["bad_manifest"]
    Path(manifest).unlink()
    assert [i.reason for i in ptbin.verify(manifest)] == ["no_manifest"]


def test_verify_without_digests_still_checks_the_file(tmp_path: Path) -> None:
    """An output made with --verify none carries the CRC-32 that follows from the source's."""
    torch.save({"a": torch.ones(100)}, tmp_path / "s.pt")
    ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"), ptbin.ConvertOptions(verify="none"))
    manifest = str(tmp_path / "o.bin.manifest.json")
    assert ptbin.verify(manifest) == []
    data = bytearray((tmp_path / "o.bin").read_bytes())
    data[-5] ^= 1
    (tmp_path / "o.bin").write_bytes(data)
    assert [i.reason for i in ptbin.verify(manifest)] == ["checksum_mismatch"]
