"""DeepSpeed folders: what ptbin finds is what DeepSpeed's own `zero_to_fp32` makes of them, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
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
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.checkpoint import Checkpoint, as_checkpoint_errors
from ptbin.reading.containers.deepspeed import models as reading
from ptbin.reading.pickle.verdicts import judge_programs
from ptbin.sources.opening import find_source
from ptbin.values.nodes import DictNode, Opaque
from ptbin.values.tensors import ByteRange, InMemory, Joined, TensorRef
from tests.bits import assert_same_tensors, same_bits
from tests.checkpoints.deepspeed_zero import VARIANTS, by_hand, consolidate, consolidated, train

# -- reading, and an oracle's view of what was read ------------------------------------------------


def read(tag: Path, limits: Limits | None = None) -> Checkpoint:
    with find_source(str(tag)).open() as reader, as_checkpoint_errors(reader.uri):
        return read_checkpoint(reader, limits)


def _bytes_at(tag: Path, names: list[str], place: Any) -> bytes:
    """The bytes of a place, straight from the files: the upper bits of an offset number the file."""
    if isinstance(place, InMemory):
        return place.data
    if isinstance(place, Joined):
        return b"".join(_bytes_at(tag, names, part) for part in place.parts)
    assert isinstance(place, ByteRange)
    with (tag / names[place.offset >> 48]).open("rb") as file:
        file.seek(place.offset & ((1 << 48) - 1))
        return file.read(place.nbytes)


def tensors_in(checkpoint: Checkpoint, tag: Path, path: str = "fp32") -> dict[str, torch.Tensor]:
    """The tensors of one candidate, as torch tensors."""
    node = checkpoint.root.get(path)
    assert isinstance(node, DictNode)
    names = sorted(os.listdir(tag))
    found = {}
    for name, ref in node.by_name().items():
        assert isinstance(ref, TensorRef)
        raw = _bytes_at(tag, names, ref.storage.place)
        assert len(raw) == ref.storage.nbytes
        dtype = getattr(torch, ref.dtype.name)
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        found[name] = flat.as_strided(ref.shape, ref.stride, ref.storage_offset)
    return found


def bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).view(torch.float32)


GENERATOR = torch.Generator().manual_seed(11)


def randoms(*shape: int) -> torch.Tensor:
    """Any bits: NaNs with payloads, denormals, both zeros."""
    return (
        torch.randint(-(2**31), 2**31, shape, generator=GENERATOR, dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
        if shape
        else bits(0x7FA12345).reshape(())
    )


GROUPS: tuple[dict[str, torch.Tensor], ...] = (
    {"embedding": randoms(5, 7), "body.weight": randoms(3, 3, 2), "single": randoms()},
    {"body.bias": randoms(3), "scale": randoms(1)},
)
FROZEN = {
    "old.weight": torch.randn(4, 3).half(),
    "old.bias": torch.randn(3).bfloat16(),
    "void": torch.empty(0, 4),
}
BUFFERS = {
    "steps": torch.tensor(12),
    "table": torch.arange(6).reshape(2, 3).to(torch.int16),
    "mean": torch.randn(5),
    "mean16": torch.tensor([1.0, -0.0, float("inf"), 3e-5]).half(),
    "meanb": torch.tensor([0x7FC1, 0x0001, -32768, 0x7F81], dtype=torch.int16).view(torch.bfloat16),
    "mean64": torch.tensor([1e300, 1e-50, 0.1], dtype=torch.float64),
    "turned": torch.randn(3, 2).half().t(),
    "part": torch.randn(9).half()[4:7],
    "mask": torch.tensor([True, False]),
}
PADDINGS = [[5, 0, 3], [1, 2]]
SHARED = {"head": "embedding", "nowhere": "gone"}


def expected_of(groups: Any = GROUPS) -> dict[str, torch.Tensor]:
    expected = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in BUFFERS.items()
    }
    expected.update(FROZEN)
    for group in groups:
        expected.update(group)
    return {**expected, "head": groups[0]["embedding"]}


def folder_of(path: Path, stage: int, world_size: int, **more: Any) -> Path:
    return by_hand(
        path,
        more.pop("groups", GROUPS),
        stage=stage,
        world_size=world_size,
        frozen=FROZEN,
        buffers=BUFFERS,
        shared=SHARED,
        **more,
    )


# -- folders that DeepSpeed wrote --------------------------------------------------------------------


def needs_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every variant on two ranks, some on three."""
    needs_deepspeed()
    made = train(tmp_path_factory.mktemp("deepspeed"), {2: list(VARIANTS), 3: ["stage2", "stage3_subgroups"]})
    return {**made[2], **{f"{name}_of_three": path for name, path in made[3].items()}}


REAL = (*VARIANTS, "stage2_of_three", "stage3_subgroups_of_three")


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", REAL)
def test_is_what_zero_to_fp32_finds(trained: Mapping[str, Path], variant: str) -> None:
    tag = trained[variant]
    checkpoint = read(tag)
    found, expected = tensors_in(checkpoint, tag), consolidated(tag)
    extra = {"frozen.weight", "frozen.bias"} if variant == "stage1" else set()  # which it loses
    assert found.keys() - expected.keys() == extra
    assert_same_tensors({name: found[name] for name in expected}, expected)
    assert checkpoint.container == "deepspeed_zero"
    assert checkpoint.archive_root is None
    assert judge_programs(checkpoint.programs).verdict == "unknown"


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "stage3" not in name])
def test_masters_round_to_the_weights_that_were_trained(trained: Mapping[str, Path], variant: str) -> None:
    """A second oracle: rounded to 16 bits, every master is the module's own parameter."""
    tag = trained[variant]
    checkpoint = read(tag)
    found, module = tensors_in(checkpoint, tag), tensors_in(checkpoint, tag, "module")
    assert sorted(found) == sorted(module)
    for name, tensor in found.items():
        assert same_bits(tensor.to(module[name].dtype), module[name]), name
    loaded = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    assert_same_tensors(module, loaded["module"])


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", REAL)
def test_ties_stay_ties(trained: Mapping[str, Path], variant: str) -> None:
    fp32 = read(trained[variant]).root.get("fp32").by_name()
    assert fp32["head.weight"] is fp32["embedding.weight"]


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", ["stage3", "stage3_subgroups"])
def test_stage_3_offers_no_module(trained: Mapping[str, Path], variant: str) -> None:
    assert read(trained[variant]).root.get("module") is None


@pytest.mark.starts_processes
@pytest.mark.parametrize("variant", REAL)
def test_converts(trained: Mapping[str, Path], variant: str, tmp_path: Path) -> None:
    tag = trained[variant]
    expected = tensors_in(read(tag), tag)
    manifest = ptbin.convert(str(tag), str(tmp_path / "x.bin"))
    assert manifest["selected"] == "fp32"
    assert manifest["source"]["container"] == "deepspeed_zero"
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), expected)


@pytest.mark.starts_processes
def test_module_can_be_selected(trained: Mapping[str, Path], tmp_path: Path) -> None:
    tag = trained["stage2"]
    ptbin.convert(str(tag), str(tmp_path / "x.bin"), ptbin.ConvertOptions(select="module"))
    loaded = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), loaded["module"])


# -- folders laid out by hand ------------------------------------------------------------------------


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

    tag = folder_of(tmp_path, stage, 2, change=_flats(stage, embed))
    assert_same_tensors(tensors_in(read(tag), tag), expected_of())


def test_names_that_only_the_module_has_are_taken_from_it(tmp_path: Path) -> None:
    """DeepSpeed saves no frozen parameters in stage 1 but those in the module."""
    tag = folder_of(tmp_path, 1, 2, change=_model(frozen_param_shapes=None, frozen_param_fragments=None))
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


# -- folders that lie ----------------------------------------------------------------------------------


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


def _model(**changes: Any) -> Any:
    def change(name: str, states: dict[str, Any]) -> None:
        if "model_states" in name:
            states.update(changes)

    return change


def _shape(name: str, *shape: int) -> Any:
    def change(_: str, states: dict[str, Any]) -> None:
        for group in states.get("param_shapes", ()):
            if name in group:
                group[name] = torch.Size(shape)

    return change


def _flats(stage: int, replace: Any) -> Any:
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"

    def change(name: str, states: dict[str, Any]) -> None:
        if "optim" in name:
            states["optimizer_state_dict"][key] = replace(states["optimizer_state_dict"][key])

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
    (2, _model(module=None), UnsupportedFormatError, "pipeline parallel"),
    (2, _model(mp_world_size=2), IncompleteCheckpointError, "tensor, pipeline or expert parallel"),
    (
        2,
        _model(checkpoint_parallel_dimensions={"tp_degree": 1, "pp_degree": 4}),
        IncompleteCheckpointError,
        "parallel",
    ),
    (2, _model(ds_autoep_layers=[{}]), UnsupportedFormatError, "AutoEP"),
    (2, _model(param_shapes=[{"a": torch.Size([2])}]), CorruptArchiveError, "1 groups, the optimizer 2"),
    (2, _model(param_shapes=[{"a": torch.Size([2])}] * 2), CorruptArchiveError, "names 'a' in two groups"),
    (2, _model(param_shapes=[{"a": (-1,)}, {}]), CorruptArchiveError, "with shape"),
    (2, _model(param_shapes=[{"a": (2**70, 2)}, {}]), CorruptArchiveError, "with shape"),
    (2, _model(param_shapes=[{"a": (1,) * 65}, {}]), CorruptArchiveError, "with shape"),
    (2, _model(param_shapes=[{3: (1,)}, {}]), CorruptArchiveError, "with shape"),
    (2, _model(param_shapes=7), CorruptArchiveError, "param_shapes"),
    (2, _shape("embedding", 50, 7), CorruptArchiveError, "begins at element 0 of partitions that have 54"),
    (2, _shape("body.weight", 2**40, 2**40), CorruptArchiveError, "begins at element 35"),
    (2, _shape("embedding", 2, 7), CorruptArchiveError, "take 33 elements, its partitions have 54"),
    (3, _shape("embedding", 50, 7), CorruptArchiveError, "begins at element"),
    (3, _shape("embedding", 2, 7), CorruptArchiveError, "elements of each rank"),
    (2, _flats(2, _gapped), UnsupportedTensorError, "contiguous"),
    (
        2,
        _flats(2, lambda flats: [flat.reshape(1, -1) for flat in flats]),
        UnsupportedTensorError,
        "dimension",
    ),
    (2, _flats(2, lambda flats: [flat.view(torch.int32) for flat in flats]), UnsupportedTensorError, "int32"),
    (3, _flats(3, lambda flats: [flats[0], flats[1].double()]), UnsupportedTensorError, "float64"),
    (3, _flats(3, lambda flats: [flats[0]] * 2), CorruptArchiveError, "same bytes"),
    (3, _flats(3, lambda flats: [*flats, "x"]), CorruptArchiveError, "not a list of tensors"),
    (2, _first_fragment_cut, CorruptArchiveError, "frozen 'old.weight' has shape"),
    (3, _first_fragment_cut, CorruptArchiveError, "frozen 'old.weight'"),
    (3, _model(frozen_param_fragments=None), CorruptArchiveError, "no fragment of frozen"),
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
    (2, _on_rank_1(_flats(2, lambda flats: flats[:1])), CorruptArchiveError, "of stage 2 with 2 partitions"),
    (
        3,
        _on_rank_1(_flats(3, lambda flats: [flats[0], flats[1][:1]])),
        CorruptArchiveError,
        "has 29 elements",
    ),
    (3, _on_rank_1(_flats(3, lambda flats: [f.half() for f in flats])), CorruptArchiveError, "of float16"),
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
