"""Checkpoints inside archives: NeMo's tars, stable-baselines3's zips, and what only looks like one.

Tars are written by Python's tarfile, zips by its zipfile, as NeMo and stable-baselines3 do themselves; the
headers that neither writes are put together by hand. Layouts: nemo/core/connectors/save_restore_connector.py
(`_make_nemo_file_from_folder`), stable_baselines3/common/save_util.py (`save_to_zip_file`), MLflow's and
SageMaker's archives.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.checkpoints.dtypes import random_bits, random_state_dict
from tests.checkpoints.registry import Checkpoint, checkpoint

__all__ = ["saved_bytes", "tar_bytes", "zip_bytes"]

CONFIG = b"name: model\n"


def saved_bytes(value: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def tar_bytes(
    members: Mapping[str, bytes],
    *,
    form: int = tarfile.GNU_FORMAT,
    mode: str = "w",
    pax: Mapping[str, str] | None = None,
) -> bytes:
    """A tar with these members. `pax` are headers of each member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = dict(pax or {})
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(members: Mapping[str, bytes], *, deflated: tuple[str, ...] = ()) -> bytes:
    """A zip as `zipfile` writes it, its members stored unless named in `deflated`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            method = zipfile.ZIP_DEFLATED if name in deflated else zipfile.ZIP_STORED
            archive.writestr(name, data, compress_type=method)
    return buffer.getvalue()


def _tokenizer() -> bytes:
    return bytes(range(256)) * 100


@checkpoint(suffix=".nemo", torch_reads=None)
def nemo(path: Path) -> Checkpoint:
    state = random_state_dict()
    members = {"./model_config.yaml": CONFIG, "./model_weights.ckpt": saved_bytes(state)}
    path.write_bytes(tar_bytes({**members, "./tokenizer.model": _tokenizer()}))
    return Checkpoint(path, state)


@checkpoint(suffix=".nemo", torch_reads=None)
def nemo_with_a_second_checkpoint(path: Path) -> Checkpoint:
    state = random_state_dict()
    members = {"model_weights.ckpt": saved_bytes(state), "vocoder.pt": saved_bytes({"v": torch.ones(300)})}
    path.write_bytes(tar_bytes(members))
    return Checkpoint(path, state, options={"select": "model_weights.ckpt"})


@checkpoint(suffix=".nemo", reason="ambiguous_state_dict")
def nemo_with_a_second_model(path: Path) -> Checkpoint:
    """The file's own name for its weights decides which is meant; what the other one is nobody says."""
    members = {
        "model_weights.ckpt": saved_bytes({"w": torch.ones(9)}),
        "vocoder.pt": saved_bytes({"v": torch.ones(300)}),
    }
    path.write_bytes(tar_bytes(members))
    return Checkpoint(path, None, reason="ambiguous_state_dict")


def _register_form(name: str, form: int, pax: Mapping[str, str] | None = None) -> None:
    @checkpoint(name=f"tar_{name}", suffix=".tar", torch_reads=None)
    def build(path: Path) -> Checkpoint:
        state = random_state_dict(seed=2)
        # longer than the 100 and 155 bytes that a plain header has for it
        folder = "/".join("folder" * 5 for _ in range(3)) if form == tarfile.USTAR_FORMAT else "f" * 300
        members = {f"{folder}/notes.txt": CONFIG, f"{folder}/weights.pt": saved_bytes(state)}
        path.write_bytes(tar_bytes(members, form=form, pax=pax))
        return Checkpoint(path, state)


_register_form("ustar", tarfile.USTAR_FORMAT)
_register_form("gnu_long_names", tarfile.GNU_FORMAT)
_register_form("pax_long_names", tarfile.PAX_FORMAT)
_register_form("pax_headers", tarfile.PAX_FORMAT, {"mtime": "1500000000.123456789", "LIBARCHIVE.x": "1"})


@checkpoint(suffix=".tar", torch_reads=None)
def tar_with_links_and_folders(path: Path) -> Checkpoint:
    state = random_state_dict(seed=3)
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("run", tarfile.DIRTYPE),
            ("run/latest", tarfile.SYMTYPE),
            ("p", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            archive.addfile(info)
        data = saved_bytes(state)
        info = tarfile.TarInfo("run/weights.pt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return Checkpoint(path, state)


@checkpoint(suffix=".tar", torch_reads=None)
def tar_of_a_legacy_file(path: Path) -> Checkpoint:
    state = random_state_dict(seed=4)
    data = saved_bytes(state, _use_new_zipfile_serialization=False)
    path.write_bytes(tar_bytes({"a.txt": CONFIG, "w.pth": data}))
    return Checkpoint(path, state)


@checkpoint(suffix=".tar", torch_reads=None)
def tar_of_safetensors(path: Path) -> Checkpoint:
    state = {"a": random_bits(torch.float32, (3, 4)), "b": random_bits(torch.bfloat16, (5,))}
    path.write_bytes(tar_bytes({"config.json": b"{}", "model.safetensors": save(state)}))
    return Checkpoint(path, state)


@checkpoint(suffix=".mar", torch_reads=None)
def torchserve_archive_of_a_script(path: Path) -> Checkpoint:
    """A zip without compression around a TorchScript archive."""
    torch.manual_seed(5)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), buffer)
    members = {"MAR-INF/MANIFEST.json": b"{}", "model.pt": buffer.getvalue(), "handler.py": b"pass"}
    path.write_bytes(zip_bytes(members))
    return Checkpoint(path, module.state_dict())


@checkpoint(suffix=".tar", torch_reads=None)
def tar_of_a_nemo(path: Path) -> Checkpoint:
    state = random_state_dict(seed=6)
    inner = tar_bytes({"./model_config.yaml": CONFIG, "./model_weights.ckpt": saved_bytes(state)})
    path.write_bytes(tar_bytes({"release.nemo": inner}))
    return Checkpoint(path, state)


@checkpoint(suffix=".tar", torch_reads=None)
def tar_selected_by_member(path: Path) -> Checkpoint:
    state = random_state_dict(seed=7)
    members = {"generator.pt": saved_bytes(state), "discriminator.pt": saved_bytes({"d": torch.ones(500)})}
    path.write_bytes(tar_bytes(members))
    return Checkpoint(path, state, options={"select": "generator.pt"})


@checkpoint(suffix=".tar", reason="ambiguous_state_dict")
def tar_of_two_checkpoints(path: Path) -> Checkpoint:
    members = {
        "generator.pt": saved_bytes({"g": torch.ones(400)}),
        "d.pt": saved_bytes({"d": torch.ones(500)}),
    }
    path.write_bytes(tar_bytes(members))
    return Checkpoint(path, None, reason="ambiguous_state_dict")


def _agent(state: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """What stable-baselines3 2.x keeps of an agent."""
    weights = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([weights])
    weights.sum().backward()
    optimizer.step()
    return {
        "data": b'{"policy_class": {":serialized:": "gASVMAAAAAAAAACM"}}',
        "pytorch_variables.pth": saved_bytes(None),
        "policy.pth": saved_bytes(state),
        "policy.optimizer.pth": saved_bytes(optimizer.state_dict()),
        "_stable_baselines3_version": b"2.3.2",
        "system_info.txt": b"- OS: Linux",
    }


@checkpoint(suffix=".zip", torch_reads=None)
def stable_baselines3(path: Path) -> Checkpoint:
    state = random_state_dict(seed=8)
    path.write_bytes(zip_bytes(_agent(state)))
    return Checkpoint(path, state)


@checkpoint(suffix=".zip", torch_reads=None)
def stable_baselines3_sac(path: Path) -> Checkpoint:
    """With a learned scalar beside the policy, and three optimizers."""
    state = random_state_dict(seed=9)
    members = _agent(state)
    optimizer = members.pop("policy.optimizer.pth")
    for name in ("actor", "critic", "ent_coef"):
        members[f"{name}.optimizer.pth"] = optimizer
    members["pytorch_variables.pth"] = saved_bytes({"log_ent_coef": torch.nn.Parameter(torch.zeros(1))})
    path.write_bytes(zip_bytes(members))
    return Checkpoint(path, state)


@checkpoint(suffix=".tar", torch_reads=None)
def tar_of_a_training_folder(path: Path) -> Checkpoint:
    state = random_state_dict(seed=10)
    members = {
        "config.json": b"{}",
        "optimizer.pt": _agent({})["policy.optimizer.pth"],
        "rng_state.pth": saved_bytes({"cpu": torch.get_rng_state()}),
        "pytorch_model.bin": saved_bytes(state),
    }
    path.write_bytes(tar_bytes({f"checkpoint-500/{name}": data for name, data in members.items()}))
    return Checkpoint(path, state)


# ------------------------------------------------------------------------------------------ refused


def _register_parts(name: str, reason: str, names: tuple[str, ...]) -> None:
    @checkpoint(name=name, suffix=".tar", reason=reason)
    def build(path: Path) -> Checkpoint:
        parts = {part: saved_bytes({part[:3]: torch.ones(9)}) for part in names}
        path.write_bytes(tar_bytes({"about.yaml": CONFIG, **parts}))
        return Checkpoint(path, None, reason=reason)


_register_parts("tar_of_one_shard", "unsupported_format", ("m/pytorch_model-00001-of-00002.bin",))
_register_parts("tar_of_distributed_chunks", "unsupported_format", ("weights/__0_0.distcp", "common.pt"))
_register_parts(
    "tar_of_zero_partitions", "unsupported_format", ("zero_pp_rank_0_mp_rank_00_optim_states.pt",)
)
_register_parts(
    "nemo_of_two_ranks",
    "incomplete_checkpoint",
    ("tp_rank_00_pp_rank_000/model_weights.ckpt", "tp_rank_01_pp_rank_000/model_weights.ckpt"),
)


@checkpoint(suffix=".zip", reason="unsupported_format")
def zip_of_a_deflated_checkpoint(path: Path) -> Checkpoint:
    path.write_bytes(zip_bytes(_agent(random_state_dict()), deflated=("policy.pth", "data")))
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(suffix=".nemo", reason="unsupported_format")
def nemo_in_gzip(path: Path) -> Checkpoint:
    members = {"./model_config.yaml": CONFIG, "./model_weights.ckpt": saved_bytes(random_state_dict())}
    path.write_bytes(tar_bytes(members, mode="w:gz"))
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(suffix=".pt", reason="unsupported_format")
def checkpoint_in_gzip(path: Path) -> Checkpoint:
    path.write_bytes(gzip.compress(saved_bytes(random_state_dict())))
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(suffix=".tar", reason="unsupported_format")
def tar_without_a_checkpoint(path: Path) -> Checkpoint:
    path.write_bytes(
        tar_bytes({"a.txt": CONFIG, "pictures.zip": zip_bytes({"a.png": b"\x89PNG" + bytes(99)})})
    )
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(suffix=".tar", reason="unsupported_format")
def tar_with_a_sparse_member(path: Path) -> Checkpoint:
    raw = bytearray(tar_bytes({"w.pt": saved_bytes(random_state_dict())}))
    raw[156:157] = b"S"
    path.write_bytes(_with_checksum(raw))
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(suffix=".tar", reason="unsupported_format")
def tar_with_two_members_of_one_name(path: Path) -> Checkpoint:
    """As `tar --append` leaves it: tar itself would take the second."""
    first, second = (tar_bytes({"w.pt": saved_bytes(random_state_dict(seed=seed))}) for seed in (1, 2))
    end = 512 + -(-len(saved_bytes(random_state_dict(seed=1))) // 512) * 512
    path.write_bytes(first[:end] + second)
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(suffix=".tar", reason="unsupported_format")
def tar_behind_a_tar(path: Path) -> Checkpoint:
    """`cat a.tar b.tar`: tar stops at the first end, and so does tarfile."""
    path.write_bytes(b"".join(tar_bytes({"w.pt": saved_bytes({"w": torch.ones(n)})}) for n in (2, 3)))
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(suffix=".tar", reason="limit_exceeded")
def tar_in_tar_in_tar(path: Path) -> Checkpoint:
    inner = saved_bytes({"w": torch.ones(2)})
    for _ in range(6):
        inner = tar_bytes({"inner.tar": inner})
    path.write_bytes(inner)
    return Checkpoint(path, None, reason="limit_exceeded")


@checkpoint(suffix=".tar", reason="corrupt_archive")
def tar_cut_short(path: Path) -> Checkpoint:
    path.write_bytes(tar_bytes({"w.pt": saved_bytes(random_state_dict())})[:2000])
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(suffix=".tar", reason="corrupt_archive")
def tar_that_claims_exabytes(path: Path) -> Checkpoint:
    raw = bytearray(tar_bytes({"w.pt": saved_bytes(random_state_dict())}))
    raw[124:136] = b"\x80" + b"\x00\x00\x00" + b"\x7f" * 8  # GNU's base-256
    path.write_bytes(_with_checksum(raw))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(suffix=".tar", reason="corrupt_archive")
def tar_with_a_negative_size(path: Path) -> Checkpoint:
    raw = bytearray(tar_bytes({"w.pt": saved_bytes(random_state_dict())}))
    raw[124:136] = b"\xff" * 12
    path.write_bytes(_with_checksum(raw))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(suffix=".tar", reason="corrupt_archive")
def tar_with_noise_for_a_second_header(path: Path) -> Checkpoint:
    data = saved_bytes(random_state_dict())
    raw = bytearray(tar_bytes({"w.pt": data, "b": CONFIG}))
    at = 512 + -(-len(data) // 512) * 512
    raw[at : at + 512] = b"\x55" * 512
    path.write_bytes(bytes(raw))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(suffix=".tar", reason="checksum_mismatch")
def tar_of_a_checkpoint_with_a_flipped_bit(path: Path) -> Checkpoint:
    state = {"w": torch.zeros(1000)}
    data = bytearray(saved_bytes(state))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.getinfo("archive/data/0").header_offset + 1000
    data[start] ^= 1
    path.write_bytes(tar_bytes({"w.pt": bytes(data)}))
    return Checkpoint(path, None, reason="checksum_mismatch")


def _with_checksum(raw: bytearray) -> bytes:
    """The first header's sum made right again."""
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)
