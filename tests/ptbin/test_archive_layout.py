"""Where bytes lie: torch's framing predicted from the directory, runs kept whole, CRC-32s combined."""

from __future__ import annotations

import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptbin.options import ConvertOptions, Limits
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.source import SourceFile
from ptbin.reading.containers.zip_directory import read_zip_directory
from ptbin.reading.selected import read_selected
from ptbin.splice.moves import coalesce
from ptbin.stores import RangeReader, open_store
from ptbin.values.crc32 import combine_crc32
from ptbin.values.framing import descriptor, implied_data_offset, local_header, uses_zip64
from ptbin.values.segments import Copy, FilePlan, Literal
from ptbin.values.tensors import ByteRange
from ptbin.writing.outputs import plan_outputs
from tests.checkpoints import Checkpoint

Make = Callable[[str], Checkpoint]


def opened(path: Path) -> RangeReader:
    store, inside = open_store(str(path))
    return store.open_reader(inside)


def planned(reader: RangeReader) -> FilePlan:
    selected = read_selected(reader, ConvertOptions())
    root = selected.checkpoint.archive_root
    return plan_outputs(selected.state_dicts, "x.bin", archive_root=root).files[0]


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_combined_crc_is_the_crc_of_the_whole(a: bytes, b: bytes) -> None:
    assert combine_crc32(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_crcs_combine_over_gigabytes() -> None:
    block = random.Random(1).randbytes(1 << 20)
    whole, crc = zlib.crc32(block), zlib.crc32(block)
    nbytes = len(block)
    for _ in range(12):  # doubling: 4 GiB without reading them
        crc = combine_crc32(crc, crc, nbytes)
        nbytes *= 2
    expected = whole
    for _ in range(15):
        expected = zlib.crc32(block, expected)
    sixteen = whole
    for _ in range(15):
        sixteen = combine_crc32(sixteen, whole, len(block))
    assert sixteen == expected
    assert nbytes == 1 << 32
    assert 0 <= crc < 1 << 32


def test_torchs_framing_is_predicted_to_the_byte(make_checkpoint: Make) -> None:
    made = make_checkpoint("tied")
    data = made.path.read_bytes()
    with zipfile.ZipFile(made.path) as archive:
        for info in archive.infolist():
            name = info.filename.encode()
            n, e = struct.unpack_from("<HH", data, info.header_offset + 26)
            data_offset = info.header_offset + 30 + n + e
            assert implied_data_offset(info.header_offset, len(name), info.file_size) == data_offset
            header = local_header(name, info.file_size, info.header_offset)
            assert data[info.header_offset : data_offset] == header
            end = data_offset + info.file_size
            zip64 = uses_zip64(info.header_offset, info.file_size)
            framing = descriptor(info.CRC, info.file_size, zip64=zip64)
            assert data[end : end + len(framing)] == framing


def test_framing_beyond_4_gib_is_as_torch_wrote_it() -> None:
    """Read off a file of torch 2.13 with a record of 4 GiB + 100 bytes at byte 924 and one behind it."""
    large = local_header(b"z64/data/1", (1 << 32) + 100, 924)
    assert large[30 + 10 :][:20] == struct.pack("<HHQQ", 1, 16, (1 << 32) + 100, (1 << 32) + 100)
    behind = local_header(b"z64/data/2", 20, 4294968444)
    assert behind[30 + 10 :][:12] == struct.pack("<HHQ", 1, 8, 4294968444)
    assert len(behind) == 30 + 10 + 28
    moved = local_header(b"z64/data/2", 20, 64 * 5 - 4, declared_offset=4294968444)
    assert moved[: 30 + 10 + 12] == behind[: 30 + 10 + 12]
    assert len(descriptor(1, 20, zip64=True)) == 24


def test_every_member_of_torchs_own_archives_closes(tmp_path: Path) -> None:
    """So that a remote archive is indexed without reading a single local header."""
    torch.save({"a": torch.ones(1000), "b": torch.ones(0), "c": torch.ones(7)}, tmp_path / "s.pt")
    with opened(tmp_path / "s.pt") as reader:
        directory = read_zip_directory(SourceFile(reader), Limits())
    assert directory is not None
    assert all(member.closed for member in directory.members.values())


def test_the_weights_of_a_training_checkpoint_are_one_run(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(20)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 32)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s.pt")
    with opened(tmp_path / "s.pt") as reader:
        plan = planned(reader).plan
        pieces = coalesce(plan.pieces, reader)
    copies = [piece for piece in pieces if isinstance(piece, Copy)]
    assert len([p for p in plan.pieces if isinstance(p, Copy)]) == 40
    assert len(copies) == 1
    new_bytes = sum(piece.nbytes for piece in pieces if isinstance(piece, Literal))
    assert copies[0].nbytes + new_bytes == plan.size
    assert sum(p.nbytes for p in pieces) == sum(p.nbytes for p in plan.pieces)


def test_a_long_run_keeps_its_place_within_pages(tmp_path: Path) -> None:
    """The kernel then copies page by page, and filesystems that share blocks may share them."""
    import ptbin

    state = {"pad": torch.ones(333), **{f"w{i}": torch.full((300, 300), float(i)) for i in range(5)}}
    torch.save({"first": {"x": torch.ones(77)}, "model": state}, tmp_path / "s.pt")
    ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "a.bin"), ptbin.ConvertOptions(select="model"))
    with opened(tmp_path / "s.pt") as source, opened(tmp_path / "a.bin") as output:
        wanted = {key: s.place for key, s in read_checkpoint(source).storages.items()}
        for key, storage in read_checkpoint(output).storages.items():
            place = wanted[key]
            assert isinstance(place, ByteRange)
            assert isinstance(storage.place, ByteRange)
            assert storage.place.offset % 4096 == place.offset % 4096
    ptbin.convert(str(tmp_path / "a.bin"), str(tmp_path / "b.bin"))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_whole_blocks_are_copied_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XFS and btrfs share those between the two files, and refuse to share a range with a part of one."""
    import ptbin

    asked: list[tuple[int, int, int]] = []
    real = os.copy_file_range

    def noted(source: int, dest: int, nbytes: int, offset: int) -> int:
        asked.append((offset, os.lseek(dest, 0, os.SEEK_CUR), nbytes))
        return real(source, dest, nbytes, offset)

    torch.save({"first": torch.ones(77), "model": {"w": torch.ones(999, 2001)}}, tmp_path / "s.pt")
    monkeypatch.setattr(os, "copy_file_range", noted)
    ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "a.bin"), ptbin.ConvertOptions(select="model"))
    whole = [n for source, dest, n in asked if not (source % 4096 or dest % 4096 or n % 4096)]
    assert sum(whole) > 999 * 2001 * 4 - 2 * 4096
    assert torch.equal(torch.load(tmp_path / "a.bin")["w"], torch.ones(999, 2001))


def test_foreign_framing_is_written_anew(tmp_path: Path) -> None:
    """A single odd byte in a padding field breaks the run there, and does not go along."""
    torch.save({f"w{i}": torch.full((50,), float(i)) for i in range(4)}, tmp_path / "s.pt")
    data = bytearray((tmp_path / "s.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "s.pt") as archive:
        header = archive.getinfo("s/data/2").header_offset
    padding = data.index(b"ZZ", header)
    data[padding] = ord("!")
    (tmp_path / "odd.pt").write_bytes(data)
    with opened(tmp_path / "odd.pt") as reader:
        plan = planned(reader).plan
        pieces = coalesce(plan.pieces, reader)
    assert len([piece for piece in pieces if isinstance(piece, Copy)]) == 2
    literals = b"".join(piece.data for piece in pieces if isinstance(piece, Literal))
    assert b"!" not in literals.replace(b"data.pkl", b"")


@pytest.mark.parametrize("name", ["tied", "deflated_members", "unaligned_storages", "views_of_one_storage"])
def test_outputs_are_aligned_and_checked_by_other_zip_readers(
    name: str, make_checkpoint: Make, tmp_path: Path
) -> None:
    import ptbin

    made = make_checkpoint(name)
    ptbin.convert(str(made.path), str(tmp_path / "o.bin"), ptbin.ConvertOptions(**made.options))
    data = (tmp_path / "o.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "o.bin") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            n, e = struct.unpack_from("<HH", data, info.header_offset + 26)
            assert (info.header_offset + 30 + n + e) % 64 == 0
            assert info.compress_type == zipfile.ZIP_STORED


class Recorder:
    """A remote file as far as indexing sees it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.uri = "mem"
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, nbytes: int) -> bytes:
        self.reads.append((offset, nbytes))
        return self.data[offset : offset + nbytes]


def test_indexing_a_remote_archive_takes_three_reads_at_most(tmp_path: Path) -> None:
    """Tail, directory where it is larger than the tail, magic bytes with the pickle: no read per record."""
    torch.save({f"layer{i}.weight": torch.ones(64, 64) for i in range(2000)}, tmp_path / "s.pt")
    recorder = Recorder((tmp_path / "s.pt").read_bytes())
    read_checkpoint(recorder)
    assert len(recorder.reads) <= 4
    assert sum(nbytes for _, nbytes in recorder.reads) < 1_000_000
