"""`torch.distributed.checkpoint` folders: every box where it belongs, bit for bit, and lies refused.

The judge is torch's own `dcp_to_torch_save`; the tensors' bytes are taken from the files by means of this
file's own, without ptbin's readers of weights.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import ptbin
from ptbin.errors import (
    ChecksumMismatchError,
    CorruptArchiveError,
    IncompleteCheckpointError,
    LimitExceededError,
    NoStateDictError,
    PtbinError,
    UnsupportedFormatError,
)
from ptbin.options import ConvertOptions, Limits
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.pickle.verdicts import judge_programs
from ptbin.reading.search import find_state_dicts
from ptbin.reading.selected import Selected, select_from
from ptbin.sources.opening import find_source
from ptbin.stores.joined import PART_BITS, JoinedReader
from ptbin.values.nodes import DictNode, Opaque
from ptbin.values.state_dict import StateDict
from ptbin.values.tensors import ByteRange, InMemory, Joined, TensorRef, Tiled
from tests.bits import assert_same_tensors
from tests.checkpoints.distributed import full_tensors, make_distributed, save_alone

pytestmark = pytest.mark.starts_processes

# What the processes write, and the path of the model in it.
FOLDERS = {
    "app": "app.model",
    "async": "model",
    "fsdp1": "model",
    "fsdp2": "model",
    "fsdp_and_tensor_parallel": ".",
    "lightning": "model",
    "mesh": "model",
    "tensor_parallel": "model",
    "tensor_parallel_4": "model",
    "torchtitan": "model",
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_distributed(tmp_path_factory.mktemp("distributed"))


# -- an independent way from a place to a tensor ----------------------------------------------------


class Files:
    """The bytes of a folder, by the offsets of ptbin's one address space."""

    def __init__(self, reader: JoinedReader, folder: Path) -> None:
        self._names = reader.names
        self._folder = folder

    def read(self, place: ByteRange | InMemory) -> bytes:
        if isinstance(place, InMemory):
            return place.data
        name = self._names[place.offset >> PART_BITS]
        with (self._folder / name).open("rb") as file:
            file.seek(place.offset & ((1 << PART_BITS) - 1))
            data = file.read(place.nbytes)
        assert len(data) == place.nbytes
        assert place.crc32 is None or zlib.crc32(data) == place.crc32
        return data

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The tensor in plain row-major order."""
        item = ref.dtype.itemsize
        cells = np.zeros(ref.shape, dtype=f"V{item}")
        place = ref.storage.place
        if isinstance(place, Tiled):
            assert place.shape == ref.shape
            filled = np.zeros(ref.shape, dtype=np.int64)
            for tile in place.tiles:
                box = tuple(slice(a, a + n) for a, n in zip(tile.start, tile.shape, strict=True))
                cells[box] = _strided(self.read(tile.place), item, tile.shape, tile.stride, tile.offset)
                filled[box] += 1
            assert (filled == 1).all()
        else:
            assert isinstance(place, (ByteRange, InMemory, Joined))
            parts = place.parts if isinstance(place, Joined) else (place,)
            data = b"".join(self.read(part) for part in parts)
            assert len(data) == place.nbytes == ref.storage.nbytes
            if ref.numel:
                cells = _strided(data, item, ref.shape, ref.stride, ref.storage_offset * item)
        flat = torch.frombuffer(
            bytearray(cells.tobytes() or b"\0" * item), dtype=getattr(torch, ref.dtype.name)
        )
        return flat[: math.prod(ref.shape)].reshape(ref.shape)


def _strided(
    data: bytes, item: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> np.ndarray[Any, Any]:
    return np.ndarray(shape, f"V{item}", data, offset, tuple(item * step for step in stride))


def read(folder: Path, limits: Limits | None = None) -> tuple[Checkpoint, Files]:
    with find_source(str(folder)).open() as reader:
        assert isinstance(reader, JoinedReader)
        checkpoint = read_checkpoint(reader, limits)
        assert checkpoint.container == "torch_dcp"
        return checkpoint, Files(reader, folder)


def selection(checkpoint: Checkpoint) -> Selected:
    return select_from(checkpoint, judge_programs(checkpoint.programs), ptbin.ConvertOptions())


def selected(checkpoint: Checkpoint) -> StateDict:
    return selection(checkpoint).state_dict


def left_out(checkpoint: Checkpoint) -> dict[str, int]:
    return {item.path: item.nbytes for item in selection(checkpoint).accounting.left_out}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint, files = read(folder)
    entries = selected(checkpoint).entries
    return {name: files.tensor(value) for name, value in entries if isinstance(value, TensorRef)}


def by_torch(folder: Path, work: Path) -> Any:
    target = work / "oracle.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, target)
    return torch.load(target, weights_only=False)


def at(root: Any, path: str) -> Any:
    for step in [] if path == "." else path.split("."):
        root = root.get(step) if isinstance(root, DictNode) else root[step]
    return root


# -- what torch writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_every_weight_is_where_it_is_said_to_be(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    whole = by_torch(folders[name], tmp_path)
    # torchtitan's has the model's names flat beside the rest; they are found under a name of their own
    model = whole if name == "torchtitan" else at(whole, FOLDERS[name])
    expected = {key: value for key, value in model.items() if isinstance(value, torch.Tensor)}
    assert_same_tensors(weights_in(folders[name]), expected)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_model_is_chosen(name: str, folders: dict[str, Path]) -> None:
    checkpoint, _ = read(folders[name])
    assert selected(checkpoint).path == FOLDERS[name]


@pytest.mark.parametrize("name", FOLDERS)
def test_what_torch_writes_is_safe(name: str, folders: dict[str, Path]) -> None:
    report = judge_programs(read(folders[name])[0].programs)
    assert report.verdict == "safe", [g for g in report.globals if g.verdict != "safe"]


@pytest.mark.parametrize("name", ["tensor_parallel", "tensor_parallel_4", "mesh"])
def test_the_numbers_are_those_given_to_the_ranks(name: str, folders: dict[str, Path]) -> None:
    found = weights_in(folders[name])
    expected = full_tensors()
    assert_same_tensors({key: found[key] for key in expected}, expected)


def test_the_optimizer_comes_with_the_tree(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, files = read(folders["fsdp2"])
    expected = by_torch(folders["fsdp2"], tmp_path)["optim"]
    found = at(checkpoint.root, "optim")
    for name, moments in expected["state"].items():
        for key, tensor in moments.items():
            assert_same_tensors({key: files.tensor(found.get("state").get(name).get(key))}, {key: tensor})
    (group,) = found.get("param_groups")
    assert group.by_name() == expected["param_groups"][0]


def test_plain_values_are_read(folders: dict[str, Path]) -> None:
    checkpoint, _ = read(folders["torchtitan"])
    assert checkpoint.root.get("lr_scheduler").get("last_epoch") == 4
    assert checkpoint.root.get("train_state").get("losses") == [1.0, 2.0]
    assert checkpoint.root.get("dataloader").get("dp_rank_1").get("position") == 1
    assert read(folders["tensor_parallel"])[0].root.get("step") == 3


def test_what_stays_behind_is_named(folders: dict[str, Path]) -> None:
    left = left_out(read(folders["torchtitan"])[0])
    assert left.keys() == {"optimizer", "lr_scheduler", "train_state.step", "dataloader"}
    assert left["optimizer"] > 0
    assert left_out(read(folders["lightning"])[0]).keys() == {
        "optimizer_0",
        "meta.pt",
    }


def test_rows_are_joined_and_columns_tiled(folders: dict[str, Path]) -> None:
    checkpoint, _ = read(folders["tensor_parallel"])
    model = checkpoint.root.get("model")
    kinds = {name: type(ref.storage.place) for name, ref in model.pairs}
    assert kinds["rows"] is kinds["uneven_rows"] is kinds["one_row"] is Joined
    assert kinds["columns"] is kinds["middle"] is Tiled
    assert kinds["replicated"] is kinds["plain"] is kinds["scalar"] is ByteRange
    assert all(part.crc32 is not None for part in model.get("rows").storage.place.parts)


def test_ranks_without_a_share_leave_nothing(folders: dict[str, Path]) -> None:
    checkpoint, _ = read(folders["tensor_parallel_4"])
    place = checkpoint.root.get("model").get("fewer_rows_than_ranks").storage.place
    assert isinstance(place, Joined)
    assert len(place.parts) == 3


def test_the_order_is_the_state_dicts_own(folders: dict[str, Path]) -> None:
    assert list(weights_in(folders["fsdp2"])) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
        "2.weight",
        "2.bias",
    ]


# -- layouts that one process can write -------------------------------------------------------------


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    return {
        "conv.weight": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conv.bias": torch.randn(3, dtype=torch.float64),
        "fp8": torch.randn(6).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(5).to(torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "slice": torch.arange(100.0)[10:20:2],
        "scalar": torch.tensor(2, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


def moments() -> dict[str, Any]:
    return {"state": {"conv.bias": {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


LAYOUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a flat model": (model, "."),
    "model and optimizer": (lambda: {"model": model(), "optim": moments(), "epoch": 2}, "model"),
    "state_dict and optimizer_states": (
        lambda: {"state_dict": model(), "optimizer_states": [moments()], "loss": torch.tensor(0.5)},
        "state_dict",
    ),
    "an application": (lambda: {"app": {"model": model(), "optim": moments()}}, "app.model"),
    "flat names beside the rest": (
        lambda: {
            **model(),
            "optimizer": {"state.conv.bias.exp_avg": torch.ones(3)},
            "lr_scheduler": {"n": 1},
        },
        "model",
    ),
    "flat names beside plain mappings": (lambda: {**model(), "args": {"lr": 0.1}, "step": 3}, "model"),
    "flat names of both": (
        lambda: {
            **{f"model.{name}": value for name, value in model().items()},
            **{f"optimizer.state.{name}.exp_avg": value for name, value in model().items()},
        },
        "model",
    ),
    "random states at the top": (
        lambda: {
            "model": model(),
            "optim": moments(),
            "rng": torch.get_rng_state(),
            "loss": torch.tensor(1.0),
        },
        "model",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_among_other_states(layout: str, tmp_path: Path) -> None:
    make, path = LAYOUTS[layout]
    folder = save_alone(tmp_path / "saved", make())
    checkpoint, files = read(folder)
    state_dict = selected(checkpoint)
    assert state_dict.path == path
    found = {
        name.removeprefix("model."): files.tensor(value)
        for name, value in state_dict.entries
        if isinstance(value, TensorRef)
    }
    expected = model()
    assert_same_tensors({name: found[name] for name in expected}, by_model(layout, folder, tmp_path))
    assert found.keys() == expected.keys()


def by_model(layout: str, folder: Path, work: Path) -> dict[str, torch.Tensor]:
    """The model as torch reads it back."""
    whole = by_torch(folder, work)
    flat = {name.removeprefix("model."): value for name, value in whole.items()}
    names = model().keys()
    path = LAYOUTS[layout][1]
    return {name: flat[name] if name in flat else at(whole, path)[name] for name in names}


def test_nothing_is_nested_without_paths(tmp_path: Path) -> None:
    """A planner that does not flatten pickles what is nested, tensors and all."""
    folder = save_alone(
        tmp_path / "saved",
        {"model": model(), "optim": moments()},
        planner=DefaultSavePlanner(flatten_state_dict=False),
    )
    assert_same_tensors(weights_in(folder), model())


def test_a_module_named_like_an_optimizer_is_the_models(tmp_path: Path) -> None:
    names = ("opt", "optim", "optimal_transport", "optim_head.step_net", "lr_sched_net")
    weights = {f"{name}.{part}": torch.randn(3) for name in names for part in ("weight", "bias")}
    weights["fc.weight"] = torch.randn(2, 2)
    beside: dict[str, Any] = {
        "optim.state.fc.weight.exp_avg": torch.ones(2, 2),
        "optim.state.fc.weight.step": torch.tensor(3.0),
        "optim.param_groups.fc.weight.lr": 0.1,
    }
    states: list[dict[str, Any]] = [{**weights}, {**weights, **beside}]
    for number, state in enumerate(states):
        folder = save_alone(tmp_path / str(number), state)
        ptbin.convert(str(folder), str(tmp_path / "x.bin"))
        assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), weights)


def test_flat_names_without_paths_leave_the_optimizer_out(tmp_path: Path) -> None:
    state = {
        **{f"model.{name}": value for name, value in model().items()},
        "optim.state.0.exp_avg": torch.ones(3),
        "optim.param_groups": [{"lr": 0.1}],
    }
    folder = save_alone(tmp_path / "saved", state, planner=DefaultSavePlanner(flatten_state_dict=False))
    assert weights_in(folder).keys() == {f"model.{name}" for name in model()}


def test_extra_state_is_kept_where_it_is_plain(tmp_path: Path) -> None:
    state = {**model(), "layer._extra_state": {"scale": 2.0}, "other._extra_state": Unknown()}
    folder = save_alone(tmp_path / "saved", {"model": state}, planner=None)
    checkpoint, _ = read(folder)
    state_dict = selected(checkpoint)
    assert dict(state_dict.entries)["layer._extra_state"].by_name() == {"scale": 2.0}
    assert list(left_out(checkpoint)) == ["model.other._extra_state"]


class Unknown:
    """A class of nobody's table."""


class Verbatim(DefaultSavePlanner):
    """A planner that stores bytes as they are, as `SavePlanner.resolve_data` may."""

    def transform_object(self, write_item: Any, value: Any) -> Any:
        if isinstance(value, bytes):
            return io.BytesIO(value)
        return super().transform_object(write_item, value)


@pytest.mark.parametrize("content", [b"hello", b"", b"\x1f\x8b gzip", b"{}" * 5000])
def test_bytes_that_are_no_archive_are_left_out(content: bytes, tmp_path: Path) -> None:
    folder = save_alone(tmp_path / "saved", {"model": model(), "note": content}, planner=Verbatim())
    checkpoint, _ = read(folder)
    note = checkpoint.root.get("note")
    assert isinstance(note, Opaque)
    assert not note.has_data
    assert list(left_out(checkpoint)) == ["note"]


def test_safetensors_inside_distcp(tmp_path: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in model().items() if name != "complex"}
    writer = FileSystemWriter(
        tmp_path / "saved", serialization_format=SerializationFormat.SAFETENSORS, sync_files=False
    )
    save_alone(tmp_path / "saved", {"model": contiguous, "step": 3}, storage_writer=writer)
    assert_same_tensors(weights_in(tmp_path / "saved"), contiguous)


def test_one_file_a_tensor_and_several_threads(tmp_path: Path) -> None:
    for arguments in ({"single_file_per_rank": False}, {"thread_count": 3}):
        folder = tmp_path / next(iter(arguments))
        save_alone(folder, {"model": model()}, storage_writer=FileSystemWriter(folder, **arguments))
        assert len(list(folder.glob("*.distcp"))) > 1
        assert_same_tensors(weights_in(folder), model())


# -- cost -------------------------------------------------------------------------------------------


def test_a_request_a_chunk_and_two_kib(tmp_path: Path) -> None:
    count = 200
    state = {f"layer.{index}": torch.full((64, 64), float(index)) for index in range(count)}
    folder = save_alone(tmp_path / "saved", state)
    with find_source(str(folder)).open() as reader:
        assert isinstance(reader, JoinedReader)
        read_checkpoint(reader)
        metadata = (folder / ".metadata").stat().st_size
        assert reader.requests == count + 2
        assert reader.bytes_read == metadata + count * 2048


def test_small_chunks_share_their_requests(tmp_path: Path) -> None:
    count = 200
    folder = save_alone(tmp_path / "saved", {f"layer.{index}": torch.ones(3) for index in range(count)})
    with find_source(str(folder)).open() as reader:
        read_checkpoint(reader)
        assert reader.requests == 2


def test_distant_stores_bridge_gaps(tmp_path: Path) -> None:
    """Where a request costs more than the bytes between, a file is one run of large requests."""
    folder = save_alone(tmp_path / "saved", {f"layer.{index}": torch.ones(64, 64) for index in range(200)})
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/dcp/requests", recursive=True)
    try:
        with find_source("memory://dcp/requests").open() as reader:
            checkpoint = read_checkpoint(reader)
            assert reader.requests == 2
            assert len(checkpoint.storages) == 200
    finally:
        store.rm("/dcp", recursive=True)


def test_many_chunks_take_linear_time() -> None:
    """A grid of 90,000 boxes; comparing each pair would take hours."""
    from ptbin.merging.coverage import prove_cover

    boxes = [((i, j), (1, 1)) for i in range(300) for j in range(300)]
    prove_cover("chunks", (300, 300), boxes)
    with pytest.raises(CorruptArchiveError, match="overlap or leave gaps"):
        prove_cover("chunks", (300, 300), [*boxes[:-1], boxes[0]])


# -- lies -------------------------------------------------------------------------------------------


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
def lie(folders: dict[str, Path], tmp_path: Path) -> Lie:
    """A copy of the folder of two ranks: `model.rows` lies in two chunks of (4, 3)."""
    shutil.copytree(folders["tensor_parallel"], tmp_path / "lie")
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


def test_limits_hold(folders: dict[str, Path]) -> None:
    for limits in (Limits(tensors=5), Limits(pickle_nbytes=100), Limits(opcodes=50)):
        with pytest.raises(LimitExceededError):
            read(folders["tensor_parallel"], limits)


def test_every_cut_of_the_index_is_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["fsdp2"], tmp_path / "cut")
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


# -- end to end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_converts(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    ptbin.convert(str(folders[name]), str(tmp_path / "out.bin"), ConvertOptions(verify="load"))
    found = torch.load(tmp_path / "out.bin", weights_only=True)
    tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    assert_same_tensors(tensors, weights_in(folders[name]))


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


def test_a_folder_of_optimizers_only(tmp_path: Path) -> None:
    folder = save_alone(tmp_path / "saved", {"optim": moments()})
    checkpoint, _ = read(folder)
    assert not [c for c in find_state_dicts(checkpoint, Limits()).candidates if not c.auxiliary]
    with pytest.raises(NoStateDictError):
        selected(checkpoint)
