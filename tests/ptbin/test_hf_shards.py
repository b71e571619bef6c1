"""torch's Hugging Face shards: what torch's own consolidation makes of them; folders that are not all."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptbin
from ptbin import ConvertOptions, catalog
from ptbin.errors import CorruptArchiveError, IncompleteCheckpointError
from tests.bits import assert_same_tensors
from tests.checkpoints.hf_shards import NAME, write_shards
from tests.checkpoints.rank_files import full_tensors, make_rank_files


def model(rows: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return {
        "norm.weight": torch.randn(rows, generator=g),
        "up.weight": torch.randn(24, rows, generator=g).bfloat16(),
        "up.bias": torch.randn(24, generator=g),
        "down.weight": torch.randn(rows, 24, generator=g),
        "short": torch.randn(3, 2, generator=g),
    }


def consolidated(folder: Path, out: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """What torch's own (private) consolidation gives."""
    consolidate: Any = importlib.import_module("torch.distributed.checkpoint._consolidate_hf_safetensors")
    out.mkdir()
    consolidate.consolidate_safetensors_files(str(folder), str(out), dict.fromkeys(names, 1))
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def converted(folder: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    ptbin.convert(str(folder), str(out), ConvertOptions(verify="load", **options))
    found: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_shards_become_what_torch_makes_of_them(tmp_path: Path, ranks: int) -> None:
    whole = model()
    folder = write_shards(tmp_path / "in" / "run", whole, ranks)
    found = converted(folder, tmp_path / "x.bin")
    assert_same_tensors(found, whole)
    assert_same_tensors(found, consolidated(folder, tmp_path / "torch", whole))
    assert [item.path for item in catalog.find_checkpoints(str(tmp_path / "in"))] == ["run"]


@pytest.mark.starts_processes
def test_what_ranks_save_is_whole(tmp_path: Path) -> None:
    folder = make_rank_files(tmp_path) / "safetensors"
    assert_same_tensors(converted(folder, tmp_path / "x.bin"), full_tensors())


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_any_missing_file_is_named(tmp_path: Path, ranks: int) -> None:
    for number in range(1, ranks + 1):
        folder = write_shards(tmp_path / str(number), model(), ranks)
        (folder / NAME.format(number)).unlink()
        with pytest.raises(IncompleteCheckpointError, match=NAME.format(number)):
            converted(folder, tmp_path / "x.bin")


def test_files_that_show_nothing_of_their_number_are_taken_with_parts(tmp_path: Path) -> None:
    whole = {"a": torch.randn(8, 6), "b": torch.randn(16, 6)}
    folder = write_shards(tmp_path / "run", whole, 4)
    with pytest.raises(IncompleteCheckpointError, match=r"shard-00005.*--parts"):
        converted(folder, tmp_path / "x.bin")
    assert_same_tensors(converted(folder, tmp_path / "x.bin", parts=True), whole)


def _rewrite(
    name: str, change: Callable[[dict[str, Any], dict[str, Any]], object]
) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        held = load_file(folder / name)
        told = {
            key: {"saved_offsets": [2 * 3 if t.dim() else 0] + [0] * (t.dim() - 1)} for key, t in held.items()
        }
        told["up.weight"]["saved_offsets"] = told["up.bias"]["saved_offsets"] = [12, 0][:2]
        told["up.bias"]["saved_offsets"] = [12]
        told["short"]["saved_offsets"] = [2, 0]
        change(held, told)
        save_file(held, folder / name, {"DCP_SHARDING_INFO": json.dumps(told)})

    return apply


SECOND = NAME.format(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-9]), CorruptArchiveError, SECOND),
        (
            _rewrite(SECOND, lambda h, t: t["up.bias"].update(saved_offsets=[11])),
            IncompleteCheckpointError,
            "up.bias",
        ),
        (
            _rewrite(SECOND, lambda h, t: t["up.bias"].update(saved_offsets=[13])),
            IncompleteCheckpointError,
            "up.bias",
        ),
        (_rewrite(SECOND, lambda h, t: t.pop("up.bias")), IncompleteCheckpointError, f"{SECOND}.*'up.bias'"),
        (
            _rewrite(SECOND, lambda h, t: h.update({"up.bias": h["up.bias"].double()})),
            IncompleteCheckpointError,
            f"of another type in {SECOND}",
        ),
        (
            lambda f: save_file(load_file(f / SECOND), f / SECOND),
            IncompleteCheckpointError,
            f"{SECOND} has no",
        ),
    ],
)
def test_shards_that_do_not_go_together_are_refused(
    tmp_path: Path, change: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    folder = write_shards(tmp_path / "run", model(), 2)
    change(folder)
    with pytest.raises(error, match=message):
        converted(folder, tmp_path / "x.bin")


def test_copies_of_a_piece_must_be_equal(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "run", model(), 2)
    for number in (1, 2):
        held = load_file(folder / NAME.format(number))
        with (folder / NAME.format(number)).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        told = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        held["buffer"] = torch.full((4,), float(number))
        told["buffer"] = {"saved_offsets": [0]}
        save_file(held, folder / NAME.format(number), {"DCP_SHARDING_INFO": json.dumps(told)})
    with pytest.raises(IncompleteCheckpointError, match="'buffer' should be the same in shard-00001"):
        converted(folder, tmp_path / "x.bin")
