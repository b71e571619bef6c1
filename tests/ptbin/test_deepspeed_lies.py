"""DeepSpeed's folders that lie, or are not whole: each is refused with a reason."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ptbin.errors import (
    CheckpointError,
    ChecksumMismatchError,
    CorruptArchiveError,
    IncompleteCheckpointError,
    LimitExceededError,
    UnsupportedFormatError,
    UnsupportedTensorError,
)
from ptbin.options import Limits
from tests.checkpoints.deepspeed_zero import by_hand
from tests.deepspeed_folders import BUFFERS, folder_of, randoms, read, with_flats, with_model


def _optim(**changes: Any) -> Any:
    def change(name: str, states: dict[str, Any]) -> None:
        if "optim" in name:
            for key, value in changes.items():
                states["optimizer_state_dict"][key] = value

    return change


def _drop(key: str) -> Any:
    def change(name: str, states: dict[str, Any]) -> None:
        states.pop(key, None)
        states.get("optimizer_state_dict", {}).pop(key, None)

    return change


def _shape(name: str, *shape: int) -> Any:
    def change(_: str, states: dict[str, Any]) -> None:
        for group in states.get("param_shapes", ()):
            if name in group:
                group[name] = torch.Size(shape)

    return change


def _gapped(flats: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.stack([flat, flat], 1)[:, 0] for flat in flats]


def _on_rank_1(change: Any) -> Any:
    def changed(name: str, states: dict[str, Any]) -> None:
        if "rank_1_mp" in name:
            change(name, states)

    return changed


def _first_fragment_cut(name: str, states: dict[str, Any]) -> None:
    if "model_states" in name:
        fragments = states["frozen_param_fragments"]
        fragments["old.weight"] = fragments["old.weight"].reshape(-1)[:1]


LIES: tuple[tuple[int, Any, type[CheckpointError], str], ...] = (
    (
        2,
        _optim(partition_count=[3, 3]),
        IncompleteCheckpointError,
        "zero_pp_rank_2_mp_rank_00_optim_states.pt is missing",
    ),
    (
        3,
        _optim(partition_count=3),
        IncompleteCheckpointError,
        "zero_pp_rank_2_mp_rank_00_optim_states.pt is missing",
    ),
    (3, _optim(partition_count=10**18), IncompleteCheckpointError, "zero_pp_rank_2_mp_rank_00"),
    (3, _optim(partition_count=1), CorruptArchiveError, "optimizer states of 2 ranks, the files say 1"),
    (3, _optim(partition_count=0), CorruptArchiveError, "partition_count"),
    (3, _optim(partition_count=True), CorruptArchiveError, "partition_count"),
    (2, _optim(partition_count="two"), CorruptArchiveError, "partition_count"),
    (2, _optim(partition_count=[2, 1]), UnsupportedFormatError, "ds_to_universal"),
    (2, _drop("partition_count"), CorruptArchiveError, "partition_count"),
    (2, _drop("zero_stage"), UnsupportedFormatError, "not written by ZeRO"),
    (2, _optim(zero_stage=4), UnsupportedFormatError, "ZeRO stage 4"),
    (2, _optim(zero_stage=3), CorruptArchiveError, "fp32_flat_groups"),
    (2, _drop("single_partition_of_fp32_groups"), CorruptArchiveError, "not a list of tensors"),
    (2, _drop("param_shapes"), UnsupportedFormatError, "pipeline parallel"),
    (2, _drop("buffer_names"), CorruptArchiveError, "buffer_names"),
    (2, with_model(module=None), UnsupportedFormatError, "pipeline parallel"),
    (2, with_model(mp_world_size=2), IncompleteCheckpointError, "tensor, pipeline or expert parallel"),
    (
        2,
        with_model(checkpoint_parallel_dimensions={"tp_degree": 1, "pp_degree": 4}),
        IncompleteCheckpointError,
        "parallel",
    ),
    (2, with_model(ds_autoep_layers=[{}]), UnsupportedFormatError, "AutoEP"),
    (2, with_model(param_shapes=[{"a": torch.Size([2])}]), CorruptArchiveError, "1 groups, the optimizer 2"),
    (
        2,
        with_model(param_shapes=[{"a": torch.Size([2])}] * 2),
        CorruptArchiveError,
        "names 'a' in two groups",
    ),
    (2, with_model(param_shapes=[{"a": (-1,)}, {}]), CorruptArchiveError, "with shape"),
    (2, with_model(param_shapes=[{"a": (2**70, 2)}, {}]), CorruptArchiveError, "with shape"),
    (2, with_model(param_shapes=[{"a": (1,) * 65}, {}]), CorruptArchiveError, "with shape"),
    (2, with_model(param_shapes=[{3: (1,)}, {}]), CorruptArchiveError, "with shape"),
    (2, with_model(param_shapes=7), CorruptArchiveError, "param_shapes"),
    (2, _shape("embedding", 50, 7), CorruptArchiveError, "begins at element 0 of partitions that have 54"),
    (2, _shape("body.weight", 2**40, 2**40), CorruptArchiveError, "begins at element 35"),
    (2, _shape("embedding", 2, 7), CorruptArchiveError, "take 33 elements, its partitions have 54"),
    (3, _shape("embedding", 50, 7), CorruptArchiveError, "begins at element"),
    (3, _shape("embedding", 2, 7), CorruptArchiveError, "elements of each rank"),
    (2, with_flats(2, _gapped), UnsupportedTensorError, "contiguous"),
    (
        2,
        with_flats(2, lambda flats: [flat.reshape(1, -1) for flat in flats]),
        UnsupportedTensorError,
        "dimension",
    ),
    (
        2,
        with_flats(2, lambda flats: [flat.view(torch.int32) for flat in flats]),
        UnsupportedTensorError,
        "int32",
    ),
    (3, with_flats(3, lambda flats: [flats[0], flats[1].double()]), UnsupportedTensorError, "float64"),
    (3, with_flats(3, lambda flats: [flats[0]] * 2), CorruptArchiveError, "same bytes"),
    (3, with_flats(3, lambda flats: [*flats, "x"]), CorruptArchiveError, "not a list of tensors"),
    (2, _first_fragment_cut, CorruptArchiveError, "frozen 'old.weight' has shape"),
    (3, _first_fragment_cut, CorruptArchiveError, "frozen 'old.weight'"),
    (3, with_model(frozen_param_fragments=None), CorruptArchiveError, "no fragment of frozen"),
    (
        2,
        _optim(param_alignment_paddings=[[0], [0]]),
        CorruptArchiveError,
        "3 parameters and alignment paddings for 1",
    ),
    (2, _optim(param_alignment_paddings=[[0, 0, -1], [0, 0]]), CorruptArchiveError, "alignment_paddings"),
    (2, _optim(param_alignment_paddings=[[0, 9, 0], [0, 0]]), CorruptArchiveError, "begins at element"),
    (2, _on_rank_1(_optim(zero_stage=1)), CorruptArchiveError, "of stage 2 with 2 partitions"),
    (2, _on_rank_1(_optim(partition_count=4)), CorruptArchiveError, "of stage 2 with 2 partitions"),
    (
        2,
        _on_rank_1(with_flats(2, lambda flats: flats[:1])),
        CorruptArchiveError,
        "of stage 2 with 2 partitions",
    ),
    (
        3,
        _on_rank_1(with_flats(3, lambda flats: [flats[0], flats[1][:1]])),
        CorruptArchiveError,
        "has 29 elements",
    ),
    (
        3,
        _on_rank_1(with_flats(3, lambda flats: [f.half() for f in flats])),
        CorruptArchiveError,
        "of float16",
    ),
    (3, _optim(ds_zero_partition_groups=[]), UnsupportedFormatError, "ds_to_universal"),
)


@pytest.mark.parametrize(
    ("stage", "change", "error", "message"),
    LIES,
    ids=lambda value: getattr(value, "__qualname__", str(value))[:40],
)
def test_lies_are_found(
    tmp_path: Path, stage: int, change: Any, error: type[CheckpointError], message: str
) -> None:
    tag = folder_of(tmp_path, stage, 2, change=change)
    with pytest.raises(error, match=message.replace("[", r"\[")):
        read(tag)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (2, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (2, "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (2, "mp_rank_00_model_states.pt"),
        (3, "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (3, "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        (3, "zero_pp_rank_2_mp_rank_00_model_states.pt"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, stage: int, name: str) -> None:
    tag = folder_of(tmp_path, stage, 3)
    (tag / name).unlink()
    with pytest.raises(IncompleteCheckpointError, match=f"{name} is missing"):
        read(tag)


@pytest.mark.parametrize(
    ("source", "copy", "error"),
    [
        (
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "zero_pp_rank_0_mp_rank_01_optim_states.pt",
            "mp_rank_01_optim_states.pt holds the very tensors of zero_pp_rank_0_mp_rank_00",
        ),
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", "mp_rank_01_optim_states.pt is missing"),
        (
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "zero_pp_rank_2_mp_rank_00_optim_states.pt",
            "earlier save",
        ),
        (
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "zero_pp_rank_00_mp_rank_00_optim_states.pt",
            "one rank",
        ),
        (
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
            "precision",
        ),
    ],
)
def test_a_file_too_many_is_refused(tmp_path: Path, source: str, copy: str, error: str) -> None:
    tag = folder_of(tmp_path, 2, 2)
    shutil.copy(tag / source, tag / copy)
    with pytest.raises((CorruptArchiveError, IncompleteCheckpointError, UnsupportedFormatError), match=error):
        read(tag)


def _repacked(path: Path, method: int, byteorder: bytes = b"little") -> None:
    """The same archive with members packed by `method`, claiming a byte order."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, byteorder if name.endswith("/byteorder") else data)


def test_compressed_partitions_are_refused(tmp_path: Path) -> None:
    tag = folder_of(tmp_path, 2, 2)
    _repacked(tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt", zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedTensorError, match="compressed"):
        read(tag)


def test_big_endian_partitions_are_refused(tmp_path: Path) -> None:
    tag = folder_of(tmp_path, 2, 2)
    _repacked(tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt", zipfile.ZIP_STORED, b"big")
    with pytest.raises(UnsupportedTensorError, match="big-endian"):
        read(tag)


def test_big_endian_buffers_are_cast(tmp_path: Path) -> None:
    tag = folder_of(tmp_path, 2, 2)
    _repacked(tag / "mp_rank_00_model_states.pt", zipfile.ZIP_STORED, b"big")
    found = read(tag).root.get("fp32").get("mean16").storage.place
    swapped = BUFFERS["mean16"].numpy().byteswap()
    assert found.data == swapped.astype("<f4").tobytes()


def test_a_damaged_buffer_is_found_when_it_is_cast(tmp_path: Path) -> None:
    tag = by_hand(
        tmp_path,
        [{"w": randoms(3)}],
        stage=2,
        world_size=1,
        buffers={"b": torch.tensor([0x1234] * 40, dtype=torch.int16).view(torch.bfloat16)},
    )
    path = tag / "mp_rank_00_model_states.pt"
    data = path.read_bytes()
    assert data.count(b"\x34\x12" * 40) == 1
    path.write_bytes(data.replace(b"\x34\x12" * 40, b"\x35\x12" + b"\x34\x12" * 39))
    with pytest.raises(ChecksumMismatchError, match="CRC-32"):
        read(tag)


def test_pieces_are_bounded(tmp_path: Path) -> None:
    tag = folder_of(tmp_path, 3, 11)
    with pytest.raises(LimitExceededError, match="tensors"):
        read(tag, Limits(tensors=30))  # no file has as many


def _truncations(size: int) -> Iterator[int]:
    yield from range(0, size, max(size // 12, 1))


@pytest.mark.parametrize(
    "name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"]
)
def test_every_truncation_is_a_clear_error(tmp_path: Path, name: str) -> None:
    tag = folder_of(tmp_path, 3, 2)
    data = (tag / name).read_bytes()
    for size in _truncations(len(data)):
        (tag / name).write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read(tag)
