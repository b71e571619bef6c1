"""Layouts of `torch.distributed.checkpoint` that one process can write, and what reading them costs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat

import ptbin
from ptbin.errors import (
    CorruptArchiveError,
)
from ptbin.reading.containers import read_checkpoint
from ptbin.sources.opening import find_source
from ptbin.stores.joined import JoinedReader
from ptbin.values.nodes import Opaque
from ptbin.values.tensors import TensorRef
from tests.bits import assert_same_tensors
from tests.checkpoints.distributed import save_alone
from tests.distributed_folders import at, by_torch, left_out, model, moments, read, selected, weights_in

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
