"""`torch.distributed.checkpoint` folders that lie: each is refused with a reason, and nothing runs."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import ptbin
from ptbin.errors import (
    ChecksumMismatchError,
    CorruptArchiveError,
    IncompleteCheckpointError,
    LimitExceededError,
    PtbinError,
    UnsupportedFormatError,
)
from ptbin.options import Limits
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.pickle.verdicts import judge_programs
from ptbin.sources.opening import find_source
from ptbin.stores.joined import PART_BITS, JoinedReader
from ptbin.values.tensors import ByteRange, Joined, TensorRef, Tiled
from tests.checkpoints.distributed import save_alone
from tests.distributed_folders import model, read

pytestmark = pytest.mark.starts_processes


class Lie:
    """A folder whose `.metadata` may be changed before it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / ".metadata").open("rb") as file:
            self.metadata: Metadata = pickle.load(file)

    def info(self, name: str, offset: tuple[int, ...] | None = None) -> Any:
        return self.metadata.storage_data[MetadataIndex(name, offset)]

    def tell(self) -> Checkpoint:
        (self.folder / ".metadata").write_bytes(pickle.dumps(self.metadata))
        return read(self.folder)[0]


@pytest.fixture
def lie(dcp_folders: dict[str, Path], tmp_path: Path) -> Lie:
    """A copy of the folder of two ranks: `model.rows` lies in two chunks of (4, 3)."""
    shutil.copytree(dcp_folders["tensor_parallel"], tmp_path / "lie")
    return Lie(tmp_path / "lie")


def test_the_honest_copy_is_read(lie: Lie) -> None:
    lie.tell()


@pytest.mark.parametrize(
    "path",
    ["../outside.distcp", "/etc/passwd", "__9_0.distcp", "..", "", ".metadata", "a/../__0_0.distcp", 7],
)
def test_no_name_leads_out_of_the_folder(path: Any, lie: Lie) -> None:
    shutil.copy(lie.folder / "__0_0.distcp", lie.folder.parent / "outside.distcp")
    lie.info("model.rows", (0, 0)).relative_path = path
    error = IncompleteCheckpointError if path == "__9_0.distcp" else CorruptArchiveError
    with pytest.raises(error, match="no file of this folder"):
        lie.tell()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", 1 << 40),
        ("offset", -1),
        ("length", 1 << 40),
        ("length", -5),
        ("offset", 1.5),
        ("length", None),
    ],
)
def test_chunks_outside_of_their_file(field: str, value: Any, lie: Lie) -> None:
    setattr(lie.info("model.rows", (0, 0)), field, value)
    with pytest.raises(CorruptArchiveError, match="should lie at byte"):
        lie.tell()


@pytest.mark.parametrize(
    ("field", "shift"), [("offset", -64), ("offset", -1), ("offset", 1), ("length", -64), ("length", -1)]
)
def test_chunks_cut_elsewhere(field: str, shift: int, lie: Lie) -> None:
    info = lie.info("model.uneven_columns", (0, 0))
    setattr(info, field, getattr(info, field) + shift)
    with pytest.raises(CorruptArchiveError):
        lie.tell()


@pytest.mark.parametrize("more", [1, 64, 700, 1577])
def test_chunks_that_run_into_the_next(more: int, lie: Lie) -> None:
    """Bytes behind an archive's end are not its own: the same place, or an error."""
    honest = lie.tell().root.get("model").get("uneven_columns").storage.place
    lie.info("model.uneven_columns", (0, 0)).length += more
    try:
        found = lie.tell().root.get("model").get("uneven_columns").storage.place
    except CorruptArchiveError:
        return
    assert found == honest


def chunks_of(lie: Lie, name: str) -> list[ChunkStorageMetadata]:
    found: list[ChunkStorageMetadata] = lie.metadata.state_dict_metadata[name].chunks  # type: ignore[union-attr]
    return found


def test_a_missing_chunk(lie: Lie) -> None:
    chunks_of(lie, "model.columns").pop()
    with pytest.raises(CorruptArchiveError, match="overlap or leave gaps"):
        lie.tell()


def test_a_chunk_without_bytes(lie: Lie) -> None:
    del lie.metadata.storage_data[MetadataIndex("model.rows", (0, 0))]
    with pytest.raises(CorruptArchiveError, match="nothing says where"):
        lie.tell()


def test_overlapping_chunks_of_the_right_volume(lie: Lie) -> None:
    second = chunks_of(lie, "model.rows")[1]
    index = MetadataIndex("model.rows", second.offsets)
    second.offsets = torch.Size((3, 0))
    lie.metadata.storage_data[MetadataIndex("model.rows", (3, 0))] = lie.metadata.storage_data[index]
    with pytest.raises(CorruptArchiveError, match="overlap or leave gaps"):
        lie.tell()


def test_a_chunk_beyond_the_tensor(lie: Lie) -> None:
    chunks_of(lie, "model.rows")[1].offsets = torch.Size((5, 0))
    with pytest.raises(CorruptArchiveError, match="reaches beyond"):
        lie.tell()


def test_chunks_of_other_dimensions(lie: Lie) -> None:
    chunks_of(lie, "model.rows")[1].offsets = torch.Size((4,))
    with pytest.raises(CorruptArchiveError, match="other dimensions"):
        lie.tell()


def test_a_chunk_listed_twice_is_taken_once(lie: Lie) -> None:
    chunks_of(lie, "model.rows").append(copy.deepcopy(chunks_of(lie, "model.rows")[0]))
    checkpoint = lie.tell()
    assert len(checkpoint.root.get("model").get("rows").storage.place.parts) == 2


@pytest.mark.parametrize("shape", [(4, 4), (12,), (3, 4)])
def test_shapes_that_the_chunk_has_not(shape: tuple[int, ...], lie: Lie) -> None:
    described: Any = lie.metadata.state_dict_metadata["model.plain"]
    described.size = torch.Size(shape)
    described.chunks = [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))]
    index = MetadataIndex("model.plain", (0, 0))
    lie.metadata.storage_data[MetadataIndex("model.plain", [0] * len(shape))] = lie.metadata.storage_data[
        index
    ]
    with pytest.raises(CorruptArchiveError, match="should be float32"):
        lie.tell()


def test_types_that_the_chunk_has_not(lie: Lie) -> None:
    lie.metadata.state_dict_metadata["model.plain"].properties.dtype = torch.int32  # type: ignore[union-attr]
    with pytest.raises(CorruptArchiveError, match="should be int32"):
        lie.tell()


def test_a_tensor_larger_than_anything(lie: Lie) -> None:
    described: Any = lie.metadata.state_dict_metadata["model.rows"]
    described.size = torch.Size((1 << 40, 1 << 40))
    with pytest.raises(CorruptArchiveError, match="overlap or leave gaps"):
        lie.tell()


def test_compressed_chunks_are_refused_with_a_way_out(lie: Lie) -> None:
    lie.info("model.rows", (0, 0)).transform_descriptors = ["zstd"]
    with pytest.raises(UnsupportedFormatError, match="save it again without"):
        lie.tell()


@pytest.mark.parametrize("path", [(), ("model", 1.5), "model", ("model", "rows", "below")])
def test_paths_that_lead_nowhere(path: Any, lie: Lie) -> None:
    lie.metadata.planner_data["model.plain"] = path
    with pytest.raises(CorruptArchiveError):
        lie.tell()


def test_two_names_at_one_path(lie: Lie) -> None:
    lie.metadata.planner_data["model.plain"] = ("model", "rows")
    with pytest.raises(CorruptArchiveError, match="is taken"):
        lie.tell()


def test_paths_have_an_end(lie: Lie) -> None:
    lie.metadata.planner_data["model.plain"] = ("a",) * 1000
    with pytest.raises(LimitExceededError):
        lie.tell()


def test_a_file_that_is_missing(lie: Lie) -> None:
    (lie.folder / "__1_0.distcp").unlink()
    with pytest.raises(IncompleteCheckpointError, match="no file of this folder"):
        lie.tell()


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def test_nothing_runs_and_the_attempt_is_reported(lie: Lie, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    lie.metadata.storage_meta = Evil(canary)  # type: ignore[assignment]
    report = judge_programs(lie.tell().programs)
    assert report.verdict == "unsafe"
    assert not canary.exists()


def test_objects_are_judged_as_well(tmp_path: Path) -> None:
    """torch loads them with `weights_only=False`."""
    canary = tmp_path / "canary"
    folder = save_alone(tmp_path / "saved", {"model": model(), "state": Evil(canary)})
    report = judge_programs(read(folder)[0].programs)
    assert report.verdict == "unsafe"
    assert not canary.exists()
    with pytest.raises(ptbin.errors.UnsafePickleError):
        ptbin.convert(str(folder), str(tmp_path / "out.bin"))


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"not a pickle", b"\x80\x04}q\x00."])
def test_an_index_that_is_none(content: bytes, lie: Lie) -> None:
    (lie.folder / ".metadata").write_bytes(content)
    with pytest.raises(CorruptArchiveError):
        read(lie.folder)


def test_limits_hold(dcp_folders: dict[str, Path]) -> None:
    for limits in (Limits(tensors=5), Limits(pickle_nbytes=100), Limits(opcodes=50)):
        with pytest.raises(LimitExceededError):
            read(dcp_folders["tensor_parallel"], limits)


def test_every_cut_of_the_index_is_noticed(dcp_folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(dcp_folders["fsdp2"], tmp_path / "cut")
    whole = (tmp_path / "cut" / ".metadata").read_bytes()
    for end in range(0, len(whole), 97):
        (tmp_path / "cut" / ".metadata").write_bytes(whole[:end])
        with pytest.raises(CorruptArchiveError):
            read(tmp_path / "cut")


def test_flipped_bytes_of_a_chunk_never_move_weights(tmp_path: Path) -> None:
    """A clear error, or the same places: bytes inside the weights themselves are their CRC-32's business."""
    folder = save_alone(tmp_path / "saved", {"w": torch.arange(16.0)})
    file = folder / "__0_0.distcp"
    honest = read(folder)[0].root.get("w")
    whole = file.read_bytes()
    for at_byte in range(0, len(whole), 3):
        file.write_bytes(whole[:at_byte] + bytes([whole[at_byte] ^ 0x10]) + whole[at_byte + 1 :])
        try:
            found = read(folder)[0].root.get("w")
        except PtbinError:
            continue
        if not isinstance(found, TensorRef):
            continue
        assert (found.shape, found.stride, found.storage_offset) == ((16,), (1,), 0)
        assert isinstance(found.storage.place, ByteRange)
        assert found.storage.place.offset == honest.storage.place.offset


@pytest.mark.parametrize("tensor", ["rows", "columns", "plain"])
def test_a_flipped_weight_is_noticed(tensor: str, lie: Lie, tmp_path: Path) -> None:
    """Whole, joined and tiled tensors all carry the chunks' own CRC-32s."""
    place = lie.tell().root.get("model").get(tensor).storage.place
    if isinstance(place, Tiled):
        place = place.tiles[-1].place
    elif isinstance(place, Joined):
        place = place.parts[-1]
    with find_source(str(lie.folder)).open() as reader:
        assert isinstance(reader, JoinedReader)
        file = lie.folder / reader.names[place.offset >> PART_BITS]
    data = bytearray(file.read_bytes())
    data[(place.offset & ((1 << PART_BITS) - 1)) + place.nbytes // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumMismatchError):
        ptbin.convert(str(lie.folder), str(tmp_path / "out.bin"))
    assert not (tmp_path / "out.bin").exists()
