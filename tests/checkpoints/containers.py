"""Checkpoints by container: how archives are framed, compressed, cut, flipped, disguised.

The honest ones must convert; the rest have their reasons. Framing that torch does not write is put
together by `craft.write_zip`.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import torch

from tests.checkpoints.craft import (
    Member,
    TorchPickle,
    change,
    integer,
    ints,
    legacy_file,
    named,
    read_members,
    text,
    torch_members,
    write_zip,
)
from tests.checkpoints.dtypes import random_bits, random_state_dict
from tests.checkpoints.registry import Checkpoint, checkpoint


def _saved(path: Path, *, seed: int = 0) -> dict[str, torch.Tensor]:
    state = random_state_dict(seed=seed)
    torch.save(state, path)
    return state


# -------------------------------------------------------------------------------------------- honest


@checkpoint()
def saved_to_a_file_object(path: Path) -> Checkpoint:
    """Archive root `archive` instead of the file's name."""
    state = random_state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getvalue())
    return Checkpoint(path, state)


@checkpoint()
def crc_switched_off(path: Path) -> Checkpoint:
    """`set_crc32_options(False)`: every CRC in the archive is 0."""
    torch.serialization.set_crc32_options(False)
    try:
        state = _saved(path)
    finally:
        torch.serialization.set_crc32_options(True)
    return Checkpoint(path, state)


def _aligned(nbytes: int) -> None:
    @checkpoint(name=f"storage_alignment_{nbytes}")
    def build(path: Path) -> Checkpoint:
        from torch.utils.serialization import config

        before = config.save.storage_alignment
        config.save.storage_alignment = nbytes
        try:
            state = _saved(path)
        finally:
            config.save.storage_alignment = before
        return Checkpoint(path, state)


for _nbytes in (1, 8, 128, 4096):
    _aligned(_nbytes)


@checkpoint()
def deflated_members(path: Path) -> Checkpoint:
    """As an archive looks after `zip`: torch reads it (without mmap)."""
    state = _saved(path)
    write_zip(path, [Member(m.name, m.data, deflate=True, align=1) for m in read_members(path)])
    return Checkpoint(path, state)


@checkpoint()
def deflated_storages_only(path: Path) -> Checkpoint:
    state = _saved(path)
    write_zip(path, [Member(m.name, m.data, deflate="/data/" in m.name, align=1) for m in read_members(path)])
    return Checkpoint(path, state)


@checkpoint()
def zip64_though_small(path: Path) -> Checkpoint:
    state = _saved(path)
    write_zip(path, read_members(path), zip64=True)
    return Checkpoint(path, state)


@checkpoint()
def unaligned_storages(path: Path) -> Checkpoint:
    """No padding at all: legal, though torch does not write it."""
    state = _saved(path)
    write_zip(path, [Member(m.name, m.data, align=1) for m in read_members(path)])
    return Checkpoint(path, state)


@checkpoint()
def members_in_another_order(path: Path) -> Checkpoint:
    """The pickle last, storages backwards: offsets do not grow with the keys."""
    state = _saved(path)
    write_zip(path, read_members(path)[::-1])
    return Checkpoint(path, state)


@checkpoint()
def members_foreign_to_torch(path: Path) -> Checkpoint:
    """A README and a storage that no tensor names, between the others."""
    state = _saved(path)
    members = read_members(path)
    root = members[0].name.partition("/")[0]
    extra = [Member(f"{root}/README.md", b"trained by me"), Member(f"{root}/data/999", bytes(64))]
    write_zip(path, [*members[:4], *extra, *members[4:]])
    return Checkpoint(path, state)


@checkpoint()
def trailing_bytes(path: Path) -> Checkpoint:
    """torch accepts bytes after the archive (an upload tool's padding)."""
    state = _saved(path)
    with path.open("ab") as file:
        file.write(bytes(512))
    return Checkpoint(path, state)


@checkpoint()
def old_minimal_archive(path: Path) -> Checkpoint:
    """torch 1.6: `data.pkl`, `data/*` and `version`, nothing else."""
    state = _saved(path)
    keep = [m for m in read_members(path) if m.name.endswith(("/data.pkl", "/version")) or "/data/" in m.name]
    write_zip(path, keep)
    return Checkpoint(path, state)


@checkpoint()
def big_endian(path: Path) -> Checkpoint:
    """As an s390x machine writes it: member `byteorder` is `big`, elements byte-swapped."""
    state = {
        "f32": random_bits(torch.float32, (6,)),
        "f16": random_bits(torch.float16, (5,)),
        "bf16": random_bits(torch.bfloat16, (3, 3)),
        "i64": random_bits(torch.int64, (4,)),
        "c64": random_bits(torch.complex64, (3,)),
        "u8": random_bits(torch.uint8, (7,)),
        "bool": random_bits(torch.bool, (9,)),
    }
    torch.save(state, path)
    units = {name: tensor.dtype.itemsize for name, tensor in state.items()} | {"c64": 4}
    keys = {str(index): unit for index, unit in enumerate(units.values())}
    members = []
    for member in read_members(path):
        key = member.name.rpartition("/data/")[2] if "/data/" in member.name else None
        data = member.data
        if member.name.endswith("/byteorder"):
            data = b"big"
        elif key in keys:
            unit = keys[key]
            data = b"".join(data[at : at + unit][::-1] for at in range(0, len(data), unit))
        members.append(Member(member.name, data, align=member.align))
    write_zip(path, members)
    return Checkpoint(path, state)


@checkpoint()
def cuda_tagged(path: Path) -> Checkpoint:
    """Storages that say `cuda:0`, read where there is no GPU."""
    tensor = random_bits(torch.float32, (6,))
    opcodes = TorchPickle.tensor("0", elements=6, shape=(6,), stride=(1,)).replace(
        b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"
    )
    data = TorchPickle.state_dict({"w": opcodes})
    write_zip(path, torch_members(data, [tensor.numpy().tobytes()]))
    return Checkpoint(path, {"w": tensor})


def _legacy_by_hand(path: Path, data: bytes, tensor: torch.Tensor) -> Checkpoint:
    path.write_bytes(legacy_file(data, [tensor.numpy().tobytes()]))
    return Checkpoint(path, {"w": tensor})


@checkpoint()
def legacy_of_torch_0_3(path: Path) -> Checkpoint:
    """`_rebuild_tensor` with four arguments, from before `requires_grad` travelled along."""
    storage = TorchPickle.storage("0", 6, legacy=True)
    entry = (
        named("torch._utils", "_rebuild_tensor")
        + b"("
        + storage
        + integer(0)
        + ints((2, 3))
        + ints((3, 1))
        + b"tR"
    )
    return _legacy_by_hand(path, TorchPickle.state_dict({"w": entry}), random_bits(torch.float32, (2, 3)))


@checkpoint()
def legacy_of_python_2(path: Path) -> Checkpoint:
    """Every string a byte string (SHORT_BINSTRING), as Python 2 pickles `str`."""
    data = TorchPickle.state_dict(
        {"w": TorchPickle.tensor("0", elements=6, shape=(6,), stride=(1,), legacy=True)}
    )
    for word in ("w", "storage", "0", "cpu"):
        data = data.replace(text(word), b"U" + bytes([len(word)]) + word.encode())
    return _legacy_by_hand(path, data, random_bits(torch.float32, (6,)))


@checkpoint()
def legacy_with_view_metadata(path: Path) -> Checkpoint:
    """torch below 0.4 saved views of storages: (key of the view, its offset, its length) in the id."""
    view = b"(" + text("7") + integer(2) + integer(4) + b"t"
    storage = TorchPickle.storage("0", 6, legacy=True)[:-3] + view + b"tQ"
    hooks = named("collections", "OrderedDict") + b")R"
    head = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage
    entry = head + integer(0) + ints((4,)) + ints((1,)) + b"\x89" + hooks + b"tR"
    whole = random_bits(torch.float32, (6,))
    made = _legacy_by_hand(path, TorchPickle.state_dict({"w": entry}), whole)
    return Checkpoint(made.path, {"w": whole[2:6]})


@checkpoint(slow=True)
def larger_than_four_gib(path: Path) -> Checkpoint:
    """A real zip64: one storage of 4 GiB and 64 bytes, a hole on disk, and a small one behind it."""
    elements = (1 << 30) + 16
    small = random_bits(torch.float32, (16,))
    data = TorchPickle.state_dict(
        {
            "big": TorchPickle.tensor("0", elements=elements, shape=(elements,), stride=(1,)),
            "small": TorchPickle.tensor("1", elements=16, shape=(16,), stride=(1,)),
        }
    )
    members = torch_members(data, [b"", small.numpy().tobytes()])
    write_zip(path, change(members, "/data/0", hole_nbytes=elements * 4))
    return Checkpoint(path, {"big": torch.zeros(1).expand(elements), "small": small})


# ------------------------------------------------------------------------- damaged, disguised, foreign


@checkpoint(reason="checksum_mismatch")
def one_flipped_bit_in_a_storage(path: Path) -> Checkpoint:
    """torch.load takes it without a word."""
    state = _saved(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(state["0.weight"].numpy().tobytes())
    raw[at + 17] ^= 0x10
    path.write_bytes(raw)
    return Checkpoint(path, None, reason="checksum_mismatch")


@checkpoint(reason="corrupt_archive")
def truncated(path: Path) -> Checkpoint:
    _saved(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3])
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="corrupt_archive")
def legacy_truncated(path: Path) -> Checkpoint:
    torch.save(random_state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-10])
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="corrupt_archive")
def duplicate_members(path: Path) -> Checkpoint:
    _saved(path)
    members = read_members(path)
    write_zip(path, [*members, *(m for m in members if m.name.endswith("/data/0"))])
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="corrupt_archive")
def duplicate_members_but_for_case(path: Path) -> Checkpoint:
    """torch would read DATA.PKL, other readers data.pkl."""
    _saved(path)
    members = read_members(path)
    other = [
        Member(m.name.replace("data.pkl", "DATA.PKL"), m.data) for m in members if m.name.endswith("data.pkl")
    ]
    write_zip(path, [*members, *other])
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="corrupt_archive")
def local_name_differs(path: Path) -> Checkpoint:
    _saved(path)
    write_zip(path, change(read_members(path), "/data/0", local_name="other/data/9"))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="unsupported_format")
def encrypted_flag(path: Path) -> Checkpoint:
    _saved(path)
    write_zip(path, [Member(m.name, m.data, flags=1) for m in read_members(path)])
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(reason="corrupt_archive")
def storage_missing(path: Path) -> Checkpoint:
    _saved(path)
    write_zip(path, [m for m in read_members(path) if not m.name.endswith("/data/1")])
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="corrupt_archive")
def storage_shorter_than_declared(path: Path) -> Checkpoint:
    _saved(path)
    write_zip(path, change(read_members(path), "/data/0", data=bytes(100)))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="corrupt_archive")
def directory_claims_more_than_the_file(path: Path) -> Checkpoint:
    _saved(path)
    write_zip(path, change(read_members(path), "/data/0", size=1 << 40, zip64=True))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="corrupt_archive")
def directory_offset_is_a_lie(path: Path) -> Checkpoint:
    _saved(path)
    raw = bytearray(path.read_bytes())
    end = raw.rindex(b"PK\5\6")
    struct.pack_into("<L", raw, end + 16, 7)
    path.write_bytes(raw)
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="unsupported_format")
def seven_zip_in_disguise(path: Path) -> Checkpoint:
    path.write_bytes(b"7z\xbc\xaf\x27\x1c\0\4" + bytes(200))
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(reason="unsupported_format")
def zip_of_something_else(path: Path) -> Checkpoint:
    write_zip(path, [Member("holiday/photo.jpg", bytes(300)), Member("notes.txt", b"hello")])
    return Checkpoint(path, None, reason="unsupported_format")


@checkpoint(suffix=".pt2", torch_reads=None)
def torch_export_archive(path: Path) -> Checkpoint:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
            self.right.weight = self.left.weight
            self.norm = torch.nn.BatchNorm1d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.norm(self.left(x)) + self.right(x)
            return result

    program = torch.export.export(Tied().eval(), (torch.zeros(4, 3),))
    torch.export.save(program, path)
    return Checkpoint(path, {name: tensor.detach() for name, tensor in program.state_dict.items()})


@checkpoint(suffix=".safetensors", torch_reads=None)
def safetensors_file(path: Path) -> Checkpoint:
    from safetensors.torch import save_file

    state_dict = random_state_dict()
    save_file(state_dict, str(path))
    return Checkpoint(path, state_dict)


@checkpoint(reason="corrupt_archive")
def empty_file(path: Path) -> Checkpoint:
    path.write_bytes(b"")
    return Checkpoint(path, None, reason="corrupt_archive")


def _not_a_checkpoint(name: str, content: bytes) -> None:
    @checkpoint(name=name, reason="unsupported_format")
    def build(path: Path) -> Checkpoint:
        path.write_bytes(content)
        return Checkpoint(path, None, reason="unsupported_format")


for _name, _content in {
    "git_lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    + b"ab" * 32
    + b"\nsize 123456\n",
    "html_error_page": b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n",
    "gzip_in_disguise": b"\x1f\x8b\x08\0" + bytes(60),
    "hdf5_in_disguise": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "zeros_only": bytes(4096),
}.items():
    _not_a_checkpoint(_name, _content)
