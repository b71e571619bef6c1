"""DeepSpeed's folders laid out by hand: every layout of them is read as DeepSpeed's own tool does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.reading.containers.deepspeed import models as reading
from ptbin.values.nodes import Opaque
from ptbin.values.tensors import TensorRef
from tests.bits import assert_same_tensors
from tests.checkpoints.deepspeed_zero import by_hand, consolidate, consolidated
from tests.deepspeed_folders import (
    FROZEN,
    GROUPS,
    PADDINGS,
    expected_of,
    folder_of,
    needs_deepspeed,
    randoms,
    read,
    tensors_in,
    with_flats,
    with_model,
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_layout_by_hand(tmp_path: Path, stage: int, world_size: int) -> None:
    tag = folder_of(tmp_path, stage, world_size)
    checkpoint = read(tag)
    assert_same_tensors(tensors_in(checkpoint, tag), expected_of())
    assert (checkpoint.root.get("module") is None) == (stage == 3)


@pytest.mark.starts_processes
def test_layout_by_hand_is_deepspeeds(tmp_path: Path) -> None:
    """What the hand-made folders mean is not only our own opinion."""
    needs_deepspeed()
    tags = [
        folder_of(tmp_path / "2", 2, 3),
        folder_of(tmp_path / "3", 3, 3),
        folder_of(tmp_path / "paddings", 2, 2, paddings=PADDINGS),
    ]
    consolidate(*tags)
    for tag in tags:
        assert_same_tensors(consolidated(tag), expected_of())


@pytest.mark.parametrize("stage", [2, 3])
def test_legacy_files(tmp_path: Path, stage: int) -> None:
    tag = folder_of(tmp_path, stage, 2, legacy=True)
    assert_same_tensors(tensors_in(read(tag), tag), expected_of())


def test_alignment_paddings_between_parameters(tmp_path: Path) -> None:
    tag = folder_of(tmp_path, 2, 2, paddings=PADDINGS)
    assert_same_tensors(tensors_in(read(tag), tag), expected_of())


def test_partitions_keep_their_type(tmp_path: Path) -> None:
    groups = tuple({name: tensor.bfloat16() for name, tensor in group.items()} for group in GROUPS)
    tag = folder_of(tmp_path, 3, 2, groups=groups)
    assert_same_tensors(tensors_in(read(tag), tag), expected_of(groups))


@pytest.mark.parametrize("stage", [2, 3])
def test_converts_by_hand(tmp_path: Path, stage: int) -> None:
    tag = folder_of(tmp_path, stage, 3)
    manifest = ptbin.convert(str(tag), str(tmp_path / "x.bin"), ptbin.ConvertOptions(verify="load"))
    assert manifest["selected"] == "fp32"
    loaded = torch.load(tmp_path / "x.bin", weights_only=True)
    assert_same_tensors(loaded, expected_of())
    assert loaded["head"].data_ptr() == loaded["embedding"].data_ptr()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitions_may_be_views(tmp_path: Path, stage: int) -> None:
    def embed(flats: list[torch.Tensor]) -> list[torch.Tensor]:
        whole = torch.cat([torch.zeros(3), *flats, torch.zeros(2)])
        ends = torch.tensor([len(flat) for flat in flats]).cumsum(0) + 3
        return [whole[end - len(flat) : end] for end, flat in zip(ends.tolist(), flats, strict=True)]

    tag = folder_of(tmp_path, stage, 2, change=with_flats(stage, embed))
    assert_same_tensors(tensors_in(read(tag), tag), expected_of())


def test_names_that_only_the_module_has_are_taken_from_it(tmp_path: Path) -> None:
    """DeepSpeed saves no frozen parameters in stage 1 but those in the module."""
    tag = folder_of(tmp_path, 1, 2, change=with_model(frozen_param_shapes=None, frozen_param_fragments=None))
    frozen = {name: tensor.bfloat16() for name, tensor in FROZEN.items()}
    assert_same_tensors(tensors_in(read(tag), tag), {**expected_of(), **frozen})


@pytest.mark.parametrize("stage", [2, 3])
def test_no_piece_is_empty(tmp_path: Path, stage: int) -> None:
    for name, ref in read(folder_of(tmp_path, stage, 3)).root.get("fp32").by_name().items():
        place = ref.storage.place
        assert name == "void" or all(p.nbytes for p in getattr(place, "parts", (place,)))


def test_full_weights_in_stage_3_are_offered(tmp_path: Path) -> None:
    def fill(name: str, states: dict[str, Any]) -> None:
        if "module" in states:
            states["module"] = {n: t.bfloat16() for group in (*GROUPS, FROZEN) for n, t in group.items()}

    assert read(folder_of(tmp_path, 3, 2, change=fill)).root.get("module") is not None


def test_a_whole_record_keeps_its_checksum_and_a_part_has_none(tmp_path: Path) -> None:
    tag = by_hand(tmp_path, [{"w": randoms(4, 4)}, {"a": randoms(4), "b": randoms(4)}], stage=2, world_size=1)
    fp32 = read(tag).root.get("fp32").by_name()
    assert fp32["w"].storage.place.crc32 is not None
    assert fp32["a"].storage.place.crc32 is None
    assert fp32["b"].storage.place.crc32 is None


def test_what_stays_behind_is_named(tmp_path: Path) -> None:
    root = read(folder_of(tmp_path, 2, 2)).root
    assert root.get("global_steps") == 7
    assert len(root.get("optimizer_states").pairs) == 2


def test_buffers_too_large_to_cast_are_refused_with_fp32_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_CAST_NBYTES", 10)
    root = read(folder_of(tmp_path, 2, 2)).root
    assert isinstance(root.get("fp32").get("mean16"), Opaque)
    assert isinstance(root.get("module").get("mean16"), TensorRef)
