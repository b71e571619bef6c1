"""Checkpoints inside archives: found by content, read in place, refused with a command that works."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ptbin
from ptbin import ConvertOptions, Limits
from ptbin.errors import (
    LimitExceededError,
    NotACheckpointError,
    PtbinError,
    UnsupportedFormatError,
)
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.source import MemoryReader, SourceFile
from ptbin.reading.containers.tar import MAX_INDEX_READS, TarMember, iter_tar
from ptbin.stores.local import LocalStore
from ptbin.values.tensors import ByteRange
from tests.bits import assert_same_tensors
from tests.checkpoints import FACTORIES
from tests.checkpoints.archives import saved_bytes, tar_bytes, zip_bytes
from tests.fakes import CountingStore, registered


class CountingReader(MemoryReader):
    def __init__(self, data: bytes) -> None:
        super().__init__(data, "memory://archive")
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, nbytes: int) -> bytes:
        self.reads.append((offset, nbytes))
        return super().read(offset, nbytes)


def names_of(data: bytes) -> list[TarMember]:
    return list(iter_tar(SourceFile(MemoryReader(data, "memory://x.tar"))))


name_parts = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=60
)
member_names = st.lists(name_parts.filter(lambda p: p not in (".", "..")), min_size=1, max_size=6).map(
    "/".join
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(member_names, st.binary(max_size=2000), min_size=1, max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_tar_is_walked_as_tarfile_walks_it(members: dict[str, bytes], form: int) -> None:
    data = tar_bytes(members, form=form)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive.getmembers()]
    found = [(member.name, member.offset, member.nbytes) for member in names_of(data)]
    assert found == expected
    assert [data[offset : offset + nbytes] for _, offset, nbytes in found] == list(members.values())


def test_what_stands_beside_the_checkpoint_is_listed() -> None:
    data = tar_bytes({"./a.yaml": b"x" * 100, "./sub/w.pt": saved_bytes({"w": torch.ones(2)}), "b": b""})
    checkpoint = read_checkpoint(MemoryReader(data, "memory://x.tar"))
    assert checkpoint.container == "tar"
    assert sorted(checkpoint.other_members) == [("a.yaml", 100), ("b", 0)]


@pytest.mark.parametrize("pack", [tar_bytes, zip_bytes])
def test_places_are_those_of_the_whole_file(pack: Callable[[dict[str, bytes]], bytes]) -> None:
    tensor = torch.arange(1000.0)
    data = pack({"first.txt": b"x" * 1234, "w.pt": saved_bytes({"w": tensor, "v": tensor + 1})})
    (first, second) = read_checkpoint(MemoryReader(data, "memory://x")).storages.values()
    for storage, expected in ((first, tensor), (second, tensor + 1)):
        assert isinstance(storage.place, ByteRange)
        assert storage.place.record_offset is None, "framing counts from the archive's own beginning"
        assert data[storage.place.offset :][: storage.place.nbytes] == expected.numpy().tobytes()


def test_indexing_a_remote_nemo_costs_few_reads() -> None:
    state = {f"layer.{i}": torch.ones(2000) for i in range(200)}
    members = {"config.yaml": b"x" * 500, "a.model": bytes(400_000), "b.model": bytes(400_000)}
    data = tar_bytes({**members, "model_weights.ckpt": saved_bytes(state), "vocab.txt": b"y" * 300_000})
    reader = CountingReader(data)
    alone = CountingReader(saved_bytes(state))
    read_checkpoint(alone)
    assert len(read_checkpoint(reader).storages) == 200
    # the head of the file, one for each large member and for the end, and what the checkpoint costs alone
    assert len(reader.reads) <= 1 + 4 + 1 + len(alone.reads)
    assert sum(nbytes for _, nbytes in reader.reads) < 600_000


def test_indexing_a_tar_of_old_torch_costs_a_read_for_each_storage(tmp_path: Path) -> None:
    made = FACTORIES["tar_of_torch_0_1_9"].make(tmp_path)
    small = made.path.read_bytes()
    parts = {m.name: small[m.offset : m.offset + m.nbytes] for m in names_of(small)}
    members = {"about.bin": bytes(100_000), **parts}
    reader = CountingReader(tar_bytes(members))  # its head does not reach the parts
    assert read_checkpoint(reader).container == "torch_tar"
    # head; headers and end behind the large member; the count, two storages and the views; tensors; pickle
    assert len(reader.reads) <= 1 + 2 + 4 + 1 + 1


def test_a_conversion_reads_the_weights_once_and_little_else(tmp_path: Path) -> None:
    state = {"w": torch.arange(500_000.0)}
    (tmp_path / "m.nemo").write_bytes(
        tar_bytes({"big.bin": bytes(3_000_000), "model_weights.ckpt": saved_bytes(state)})
    )
    with registered("counted", CountingStore(LocalStore())) as store:
        options = ConvertOptions(verify="none")
        ptbin.convert(f"counted://{tmp_path}/m.nemo", str(tmp_path / "o.bin"), options)
        assert store.nbytes("read", "m.nemo") < 2_000_000 + 300_000
    assert_same_tensors(torch.load(tmp_path / "o.bin"), state)


def test_a_tar_of_many_files_is_given_up_after_a_bounded_number_of_reads() -> None:
    header = tar_bytes({"picture.jpg": b""})[:512]
    raw = bytearray(header)
    raw[124:136] = b"%011o\0" % (1 << 20)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    step = 512 + (1 << 20)

    class Pictures:
        uri = "memory://pictures.tar"
        size = step * 5000
        reads = 0

        def read(self, offset: int, nbytes: int) -> bytes:
            self.reads += 1
            block = bytearray(nbytes)
            for start in range(offset // step * step, offset + nbytes, step):
                for at in range(max(start, offset), min(start + 512, offset + nbytes)):
                    block[at - offset] = raw[at - start]
            return bytes(block)

    reader = Pictures()
    with pytest.raises(NotACheckpointError):
        read_checkpoint(reader)
    assert reader.reads <= MAX_INDEX_READS + 3


def test_a_checkpoint_among_too_many_files_is_not_passed_over() -> None:
    small = {f"{i}": b"" for i in range(3)}
    data = tar_bytes({"w.pt": saved_bytes({"w": torch.ones(2)}), **small})
    members = {f"{i}.bin": bytes(20_000) for i in range(MAX_INDEX_READS + 10)}
    data = tar_bytes({"w.pt": saved_bytes({"w": torch.ones(2)}), **members})
    with pytest.raises(LimitExceededError):
        read_checkpoint(MemoryReader(data, "memory://x.tar"))


COMMAND = re.compile(r"`([^`]+)`")


@pytest.mark.starts_processes
@pytest.mark.parametrize(
    ("name", "unpacked"),
    [
        ("nemo_in_gzip", "model_weights.ckpt"),
        ("checkpoint_in_gzip", "checkpoint_in_gzip.pt.unpacked"),
        ("zip_of_a_deflated_checkpoint", "policy.pth"),
        ("tar_of_one_shard", "m/pytorch_model-00001-of-00002.bin"),
    ],
)
def test_the_command_in_the_refusal_works(name: str, unpacked: str, tmp_path: Path) -> None:
    made = FACTORIES[name].make(tmp_path)
    with pytest.raises(UnsupportedFormatError) as caught:
        ptbin.convert(str(made.path), str(tmp_path / "o.bin"))
    (command,) = COMMAND.findall(str(caught.value))
    if command.startswith("unzip ") and subprocess.run(["which", "unzip"], check=False).returncode:
        _, archive, member = command.split()
        with zipfile.ZipFile(tmp_path / archive) as file:
            file.extract(member, tmp_path)
    else:
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    # what lay in an archive as one shard is one shard still
    options = ptbin.ConvertOptions(parts=name == "tar_of_one_shard")
    ptbin.convert(str(tmp_path / unpacked), str(tmp_path / "o.bin"), options)
    assert torch.load(tmp_path / "o.bin")


@pytest.mark.starts_processes
def test_a_name_with_quotes_and_line_breaks_stays_one_word_of_the_command(tmp_path: Path) -> None:
    name = "a'; touch fired\n#.pt"
    path = tmp_path / "x.zip"
    path.write_bytes(zip_bytes({name: saved_bytes({"w": torch.ones(2)})}, deflated=(name,)))
    with pytest.raises(UnsupportedFormatError) as caught:
        ptbin.convert(str(path), str(tmp_path / "o.bin"))
    assert len(str(caught.value).splitlines()) == 1
    (command,) = COMMAND.findall(str(caught.value))
    subprocess.run(command, shell=True, check=False, cwd=tmp_path, capture_output=True)
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("select", ["g.pt", "d.pt.state_dict", "d.pt"])
def test_select_takes_a_member_and_what_is_in_it(select: str, tmp_path: Path) -> None:
    g, d = {"g": torch.rand(300)}, {"d": torch.rand(400)}
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes({"g.pt": saved_bytes(g), "d.pt": saved_bytes({"state_dict": d, "epoch": 1})}))
    if select == "d.pt":
        with pytest.raises(PtbinError):
            ptbin.convert(str(path), str(tmp_path / "o.bin"), ConvertOptions(select=select))
        return
    ptbin.convert(str(path), str(tmp_path / "o.bin"), ConvertOptions(select=select))
    assert_same_tensors(torch.load(tmp_path / "o.bin"), g if select == "g.pt" else d)


SMALL = {"w": torch.arange(4.0), "v": torch.arange(3)}
SUBJECTS = {
    "tar": lambda: tar_bytes({"a.txt": b"abc" * 20, "w.pt": saved_bytes(SMALL)}, form=tarfile.PAX_FORMAT),
    "zip": lambda: zip_bytes({"a.txt": b"abc" * 20, "w.pt": saved_bytes(SMALL)}),
}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(path, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [*SUBJECTS, "torch_tar"])
def test_every_truncation_and_every_flipped_byte_is_an_error_or_changes_nothing(
    kind: str, tmp_path: Path
) -> None:
    path, out = tmp_path / "x.tar", tmp_path / "o.bin"
    if kind == "torch_tar":
        made = FACTORIES["tar_of_torch_0_1_9"].make(tmp_path)
        data, expected = made.path.read_bytes(), dict(made.expected or {})
    else:
        data, expected = SUBJECTS[kind](), SMALL
    kept = 0
    cuts = [data[:n] for n in range(0, len(data), 37)]
    flips = [data[:n] + bytes([data[n] ^ 0x40]) + data[n + 1 :] for n in range(0, len(data), 11)]
    for broken in [*cuts, *flips]:
        path.write_bytes(broken)
        try:
            ptbin.convert(str(path), str(out), ConvertOptions(force=True))
        except PtbinError:
            continue
        kept += 1
        if kind != "torch_tar":  # that format has no checksums: a flipped weight is a weight
            assert_same_tensors(_tensors(out), expected)
    assert kept, "nothing but errors: the test has no subject"


@pytest.mark.parametrize("limit", ["members", "directory_nbytes", "pickle_nbytes", "opcodes", "tensors"])
def test_a_limit_says_how_to_raise_it(tmp_path: Path, limit: str) -> None:
    torch.save({"w": torch.zeros(1).expand(8), "v": torch.ones(2)}, tmp_path / "a.pt")
    for most in (1, 10_000):
        options = ConvertOptions(limits=Limits(**{limit: most}))
        if most == 1:
            with pytest.raises(LimitExceededError, match=rf"Limits\({limit}=\.\.\.\)"):
                ptbin.convert(tmp_path / "a.pt", tmp_path / "a.bin", options)
        else:
            ptbin.convert(tmp_path / "a.pt", tmp_path / "a.bin", options)


def test_what_a_view_unfolds_is_limited_and_says_how_to_raise_it(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(8)}, tmp_path / "a.pt")
    with pytest.raises(LimitExceededError, match=r"Limits\(expanded_nbytes=\.\.\.\)"):
        ptbin.convert(
            tmp_path / "a.pt", tmp_path / "a.bin", ConvertOptions(limits=Limits(expanded_nbytes=27))
        )
    ptbin.convert(tmp_path / "a.pt", tmp_path / "a.bin", ConvertOptions(limits=Limits(expanded_nbytes=28)))
