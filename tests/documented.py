"""The files that the documentation's commands work on, by the names that it uses."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.checkpoints import FACTORIES

__all__ = ["prepare_documented_files"]

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
FILES = {
    "run1/last.ckpt": "lightning_like",
    "run1/gan.pt": "choose_stylegan2",
    "run1/ema.pt": "ema_next_to_raw",
    "run1/parts.pt": "integer_keys_alone",
    "run1/compiled.pt": "compiled_and_parallel_prefixes",
    "run1/tied.pt": "tied",
    "run1/optimizer.pt": "optimizer_alone",
    "old/whole.pth": "whole_module_with_vanished_classes",
    "from-a-stranger/model.pt": "canary_reduce_posix",
    "copies/cut.pt": "truncated",
    "copies/flipped.pt": "one_flipped_bit_in_a_storage",
    "checkpoints/.snapshots/a.pt": "lightning_like",
    "ranks/mp_rank_00.pt": "megatron_tensor_parallel",
}


def prepare_documented_files(folder: Path) -> None:
    """Write them all below `folder`; about a second."""
    made_in = folder / ".made"
    made_in.mkdir()
    for name, factory in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(FACTORIES[factory].make(made_in).path, path)
    shutil.rmtree(made_in)
    (folder / "run1" / "pointer.bin").write_bytes(LFS_POINTER)
