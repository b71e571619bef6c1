"""Checkpoints that mean harm: canaries for every opcode that can build a call, bombs, impossible tensors.

A canary file creates `<file>.fired` as soon as anything unpickles it; `tests/test_checkpoints.py` shows
that each of them does, in a process of its own. Around the payload lies an honest state dict of one
tensor, so that a reader that merely stops early is not taken for a careful one.

Which opcodes call something: CPython, Lib/pickle.py, `_Unpickler.load_*`. REDUCE, INST, OBJ, NEWOBJ
and NEWOBJ_EX call or construct what is on the stack; BUILD calls `__setstate__`; APPEND, APPENDS and
ADDITEMS call the methods `append`, `extend` and `add` of whatever object is there; GLOBAL, STACK_GLOBAL
and EXT1, EXT2, EXT4 import.
"""

from __future__ import annotations

import shlex
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.checkpoints.archives import tar_bytes, zip_bytes
from tests.checkpoints.craft import (
    TorchPickle,
    change,
    ints,
    legacy_file,
    named,
    text,
    torch_members,
    write_zip,
)
from tests.checkpoints.dtypes import random_bits
from tests.checkpoints.old_torch import torch_tar
from tests.checkpoints.registry import Checkpoint, checkpoint

__all__ = ["EXTENSION_CODE", "OPCODE_PAYLOADS"]

EXTENSION_CODE = 0x71
"""copyreg code that the EXT canaries use; they fire where `os.system` is registered under it."""

Payload = Callable[[Path], bytes]

_ORDERED_DICT = named("collections", "OrderedDict") + b")R"
_SYSTEM = named("os", "system")
_REDUCE_1 = b"\x85R"  # TUPLE1 REDUCE


def _touch(canary: Path) -> bytes:
    return text(f"touch {shlex.quote(str(canary))}")


def _lazy_call(canary: Path) -> bytes:
    """`map.__new__(map, os.system, [command])`: runs when something iterates over it."""
    return named("builtins", "map") + b"(" + _SYSTEM + b"(" + _touch(canary) + b"lt\x81"


def _method(name: str) -> bytes:
    """An OrderedDict whose attribute `name` is os.system, set by BUILD."""
    return _ORDERED_DICT + b"}" + text(name) + _SYSTEM + b"sb"


def _inner_pickle(canary: Path) -> bytes:
    return b"\x80\x02" + _SYSTEM + _touch(canary) + _REDUCE_1 + b"."


def _binbytes(raw: bytes) -> bytes:
    return b"B" + struct.pack("<L", len(raw)) + raw


def _inner_torch_file(canary: Path) -> bytes:
    return legacy_file(_inner_pickle(canary), [])


def _getattr(target: bytes, name: str) -> bytes:
    return named("builtins", "getattr") + target + text(name) + b"\x86R"


OPCODE_PAYLOADS: dict[str, Payload] = {
    "reduce": lambda c: _SYSTEM + _touch(c) + _REDUCE_1,
    "reduce_posix": lambda c: named("posix", "system") + _touch(c) + _REDUCE_1,
    "reduce_builtin_of_python_2": lambda c: (
        named("__builtin__", "eval") + text(f"open({str(c)!r}, 'w')") + _REDUCE_1
    ),
    "reduce_exec": lambda c: named("builtins", "exec") + text(f"open({str(c)!r}, 'w').close()") + _REDUCE_1,
    "reduce_open": lambda c: named("builtins", "open") + text(str(c)) + text("w") + b"\x86R",
    "reduce_file_handler": lambda c: named("logging", "FileHandler") + text(str(c)) + _REDUCE_1,
    "reduce_popen": lambda c: named("subprocess", "getoutput") + _touch(c) + _REDUCE_1,
    "reduce_partial": lambda c: named("functools", "partial") + _SYSTEM + _touch(c) + b"\x86R)R",
    "reduce_methodcaller": lambda c: (
        named("operator", "methodcaller")
        + text("system")
        + _touch(c)
        + b"\x86R"
        + named("builtins", "__import__")
        + text("os")
        + _REDUCE_1
        + _REDUCE_1
    ),
    "reduce_getattr_of_import": lambda c: (
        named("builtins", "getattr")
        + named("builtins", "__import__")
        + text("os")
        + _REDUCE_1
        + text("system")
        + b"\x86R"
        + _touch(c)
        + _REDUCE_1
    ),
    "reduce_getattr_of_an_imported_module": lambda c: (
        _getattr(named("random", "_os"), "mknod") + text(str(c)) + _REDUCE_1
    ),
    "reduce_getattr_in_three_steps": lambda c: (
        _getattr(_getattr(_getattr(named("torch", "os"), "path"), "os"), "mknod") + text(str(c)) + _REDUCE_1
    ),
    "reduce_getattr_with_a_default": lambda c: (
        named("builtins", "getattr")
        + named("random", "_os")
        + text("mknod")
        + b"N\x87R"
        + text(str(c))
        + _REDUCE_1
    ),
    "reduce_getattr_of_a_library_method": lambda c: (
        _getattr(named("pathlib", "Path"), "touch")
        + named("pathlib", "Path")
        + text(str(c))
        + _REDUCE_1
        + _REDUCE_1
    ),
    "obj_of_getattr": lambda c: (
        b"(("
        + named("builtins", "getattr")
        + named("random", "_os")
        + text("mknod")
        + b"o"
        + text(str(c))
        + b"o"
    ),
    "stack_global_names_a_library_method": lambda c: (
        text("pathlib")
        + text("Path.touch")
        + b"\x93"
        + named("pathlib", "Path")
        + text(str(c))
        + _REDUCE_1
        + _REDUCE_1
    ),
    "reduce_inner_pickle": lambda c: named("pickle", "loads") + _binbytes(_inner_pickle(c)) + _REDUCE_1,
    "reduce_inner_torch_file": lambda c: (
        named("torch.storage", "_load_from_bytes") + _binbytes(_inner_torch_file(c)) + _REDUCE_1
    ),
    "reduce_known_good_with_foreign_callable": lambda c: (
        named("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + _SYSTEM
        + named("torch", "Tensor")
        + _touch(c)
        + b"\x85}tR"
    ),
    "reduce_reconstructor_of_a_lazy_call": lambda c: (
        named("copyreg", "_reconstructor")
        + named("builtins", "tuple")
        + named("builtins", "tuple")
        + _lazy_call(c)
        + b"\x87R"
    ),
    "inst": lambda c: b"(" + _touch(c) + b"ios\nsystem\n",
    "obj": lambda c: b"(" + _SYSTEM + _touch(c) + b"o",
    "newobj": lambda c: named("builtins", "tuple") + _lazy_call(c) + b"\x85\x81",
    "newobj_ex": lambda c: named("builtins", "tuple") + _lazy_call(c) + b"\x85}\x92",
    "build_setstate": lambda c: _method("__setstate__") + _touch(c) + b"b",
    "append_method": lambda c: _method("append") + _touch(c) + b"a",
    "appends_method": lambda c: _method("append") + b"(" + _touch(c) + b"e",
    "reduce_list_of_a_lazy_call": lambda c: named("builtins", "list") + _lazy_call(c) + _REDUCE_1,
    "additems_method": lambda c: _method("add") + b"(" + _touch(c) + b"\x90",
    "stack_global": lambda c: text("os") + text("system") + b"\x93" + _touch(c) + _REDUCE_1,
    "stack_global_memoised": lambda c: (
        text("os")
        + b"q\xf00"
        + text("system")
        + b"r\xf1\0\0\x000"
        + b"h\xf0j\xf1\0\0\0\x93"
        + _touch(c)
        + _REDUCE_1
    ),
    "stack_global_of_byte_strings": lambda c: b"U\x02osU\x06system\x93" + _touch(c) + _REDUCE_1,
    "stack_global_walks_attributes": lambda c: (
        text("shutil") + text("os.system") + b"\x93" + _touch(c) + _REDUCE_1
    ),
    "ext1": lambda c: b"\x82" + bytes([EXTENSION_CODE]) + _touch(c) + _REDUCE_1,
    "ext2": lambda c: b"\x83" + struct.pack("<H", EXTENSION_CODE) + _touch(c) + _REDUCE_1,
    "ext4": lambda c: b"\x84" + struct.pack("<l", EXTENSION_CODE) + _touch(c) + _REDUCE_1,
    "obj_under_pop_mark": lambda c: b"((" + _SYSTEM + _touch(c) + b"o1N",
    "frame_of_length_zero": lambda c: b"\x95" + bytes(8) + _SYSTEM + _touch(c) + _REDUCE_1,
    "frame_ends_inside_the_call": lambda c: b"\x95" + struct.pack("<Q", 3) + _SYSTEM + _touch(c) + _REDUCE_1,
    "text_opcodes_of_protocol_0": lambda c: (
        b"cos\nsystem\n(V" + _touch(c)[5:].decode().encode("raw_unicode_escape") + b"\ntR"
    ),
}
"""Opcodes that leave one value on the stack, and have run a command by then."""


def _weights() -> tuple[dict[str, torch.Tensor], dict[str, bytes], list[bytes]]:
    tensor = random_bits(torch.float32, (2, 3))
    opcodes = TorchPickle.tensor("0", elements=6, shape=(2, 3), stride=(3, 1))
    return {"w": tensor}, {"w": opcodes}, [tensor.numpy().tobytes()]


def _canary(path: Path) -> Path:
    return path.with_name(path.name + ".fired")


def _register_canary(name: str, payload: Payload) -> None:
    # Names with dots are walked from protocol 4 on; Python 2's names are translated up to protocol 2.
    protocol = 4 if name in ("stack_global_walks_attributes", "stack_global_names_a_library_method") else 2

    @checkpoint(name=f"canary_{name}", reason="unsafe_pickle")
    def popped(path: Path) -> Checkpoint:
        """The call's result is popped before the state dict begins: nothing of it is in the tree."""
        tensors, entries, storages = _weights()
        data = TorchPickle.state_dict(entries, before=payload(_canary(path)) + b"0", protocol=protocol)
        write_zip(path, torch_members(data, storages))
        return Checkpoint(path, tensors, reason="unsafe_pickle", canary=_canary(path))

    @checkpoint(name=f"canary_{name}_as_value", reason="unsafe_pickle")
    def as_value(path: Path) -> Checkpoint:
        tensors, entries, storages = _weights()
        data = TorchPickle.state_dict({"a": payload(_canary(path)), **entries}, protocol=protocol)
        write_zip(path, torch_members(data, storages))
        return Checkpoint(path, tensors, reason="unsafe_pickle", canary=_canary(path))


for _name, _payload in OPCODE_PAYLOADS.items():
    _register_canary(_name, _payload)


@checkpoint(suffix=".pkl", reason="unsafe_pickle")
def canary_in_a_raw_pickle(path: Path) -> Checkpoint:
    path.write_bytes(_inner_pickle(_canary(path)))
    return Checkpoint(path, None, reason="unsafe_pickle", canary=_canary(path))


def _register_legacy(position: str) -> None:
    @checkpoint(name=f"canary_in_the_legacy_{position}", reason="unsafe_pickle")
    def build(path: Path) -> Checkpoint:
        """A legacy file is five pickles in a row, and torch unpickles each."""
        tensors, entries, storages = _weights()
        call = _SYSTEM + _touch(_canary(path)) + _REDUCE_1 + b"0"
        entries = {"w": TorchPickle.tensor("0", elements=6, shape=(2, 3), stride=(3, 1), legacy=True)}
        data = TorchPickle.state_dict(entries, before=call if position == "state_dict" else b"")
        raw = legacy_file(data, storages, before={position: call})
        path.write_bytes(raw)
        return Checkpoint(path, tensors, reason="unsafe_pickle", canary=_canary(path))


for _position in ("magic_number", "protocol_version", "sys_info", "state_dict", "storage_keys"):
    _register_legacy(_position)


def _register_hidden(name: str, suffix: str, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    @checkpoint(name=f"hidden_in_a_{name}", suffix=suffix, reason="unsafe_pickle")
    def build(path: Path) -> Checkpoint:
        """Beside an honest checkpoint, which alone would be taken."""
        tensors, _, storages = _weights()
        honest = legacy_file(
            TorchPickle.state_dict(
                {"w": TorchPickle.tensor("0", elements=6, shape=(2, 3), stride=(3, 1), legacy=True)}
            ),
            storages,
        )
        bad = legacy_file(_inner_pickle(_canary(path)), [])
        path.write_bytes(pack({"a.txt": b"text" * 9, "other.pth": bad, "policy.pth": honest}))
        return Checkpoint(path, tensors, reason="unsafe_pickle", canary=_canary(path))


_register_hidden("tar", ".tar", tar_bytes)
_register_hidden("zip", ".zip", zip_bytes)


def _register_torch_tar(position: str) -> None:
    @checkpoint(name=f"hidden_in_the_{position}_of_a_torch_tar", reason="unsafe_pickle")
    def build(path: Path) -> Checkpoint:
        made = torch_tar(
            path,
            form=tarfile.GNU_FORMAT,
            before={position: _SYSTEM + _touch(_canary(path)) + _REDUCE_1 + b"0"},
        )
        return Checkpoint(path, made.expected, reason="unsafe_pickle", canary=_canary(path))


for _position in ("pickle", "storages", "tensors"):
    _register_torch_tar(_position)


# --------------------------------------------------------------------------------------------- bombs


def _beside_weights(
    name: str,
    opcodes: bytes | Callable[[], bytes],
    *,
    reason: str | None = None,
    torch_reads: str | None = None,
) -> None:
    """`{"state_dict": ..., "other": <opcodes>}`."""

    @checkpoint(name=name, reason=reason, torch_reads=torch_reads)
    def build(path: Path) -> Checkpoint:
        tensors, entries, storages = _weights()
        inner = b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"
        other = opcodes if isinstance(opcodes, bytes) else opcodes()
        data = TorchPickle.state_dict({"state_dict": inner, "other": other}, protocol=4)
        write_zip(path, torch_members(data, storages))
        return Checkpoint(path, tensors if reason is None else None, reason=reason)


_TUPLE_GRAPH = b"K\x01" + b"2\x86" * 30  # (x, x) thirty times over: 2^30 leaves out of 62 bytes

_beside_weights("bomb_tuple_graph_beside_weights", _TUPLE_GRAPH)
_beside_weights("bomb_memo_index", b"Nr" + struct.pack("<L", 0xFFFFFFF0))
_beside_weights("deep_nesting_beside_weights", lambda: b"]" * 100_000 + b"a" * 99_999)
_beside_weights("dict_with_an_unhashable_key", b"}]Ns")
_beside_weights("list_that_holds_itself", b"]q\xf0h\xf0a")
_beside_weights("dict_that_holds_itself", b"}q\xf0" + text("me") + b"h\xf0s")

for _name, _opcodes in {
    "length_of_binunicode": b"X\xff\xff\xff\xff",
    "length_of_binunicode8": b"\x8d" + struct.pack("<Q", 1 << 62),
    "length_of_binbytes": b"B\xff\xff\xff\xff",
    "length_of_binbytes8": b"\x8e" + struct.pack("<Q", 1 << 62),
    "length_of_bytearray8": b"\x96" + struct.pack("<Q", 1 << 62),
    "length_of_binstring_negative": b"T" + struct.pack("<l", -5),
    "length_of_long4": b"\x8b" + struct.pack("<l", (1 << 31) - 1),
    "length_of_frame": b"\x95" + struct.pack("<Q", 1 << 62) + b"N",
    "unknown_opcode": b"\xff",
    "stack_underflow": b"000000000000",
    "memo_never_filled": b"h\xee",
    "tuple_without_mark": b"tttt",
    "not_utf8": b"X\x02\0\0\0\xff\xfe",
    "number_that_is_none": b"Iabc\n",
}.items():
    _beside_weights(f"pickle_{_name}", _opcodes, reason="corrupt_archive")


@checkpoint(torch_reads=None)
def bomb_tuple_graph_in_the_state_dict(path: Path) -> Checkpoint:
    tensors, entries, storages = _weights()
    write_zip(path, torch_members(TorchPickle.state_dict({"x": _TUPLE_GRAPH, **entries}), storages))
    return Checkpoint(path, tensors)


@checkpoint(reason="no_state_dict")
def bomb_tuple_graph_alone(path: Path) -> Checkpoint:
    write_zip(path, torch_members(b"\x80\x02" + _TUPLE_GRAPH + b"."))
    return Checkpoint(path, None, reason="no_state_dict")


@checkpoint(reason="corrupt_archive")
def pickle_without_stop(path: Path) -> Checkpoint:
    _, entries, storages = _weights()
    write_zip(path, torch_members(TorchPickle.state_dict(entries)[:-1], storages))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="limit_exceeded")
def bomb_deflated_pickle(path: Path) -> Checkpoint:
    """100 MiB of `None, pop` that deflate to 100 KB."""
    _, entries, storages = _weights()
    data = TorchPickle.state_dict(entries, before=b"N0" * (50 << 20))
    write_zip(path, change(torch_members(data, storages), "/data.pkl", deflate=True, align=1))
    return Checkpoint(path, None, reason="limit_exceeded")


@checkpoint(reason="limit_exceeded")
def bomb_deflated_storage_claims_a_tebibyte(path: Path) -> Checkpoint:
    elements = 1 << 38
    entry = TorchPickle.tensor("0", elements=elements, shape=(elements,), stride=(1,))
    members = torch_members(TorchPickle.state_dict({"w": entry}), [bytes(1 << 20)])
    write_zip(path, change(members, "/data/0", deflate=True, align=1, size=elements * 4))
    return Checkpoint(path, None, reason="limit_exceeded")


@checkpoint(reason="corrupt_archive")
def bomb_overlapping_members(path: Path) -> Checkpoint:
    """Two directory entries, one member: how a zip bomb of 46 MB holds petabytes (Fifield, 2019)."""
    entries = {key: TorchPickle.tensor(key, elements=6, shape=(6,), stride=(1,)) for key in "01"}
    write_zip(path, torch_members(TorchPickle.state_dict(entries), [bytes(24), bytes(24)]))
    raw = bytearray(path.read_bytes())
    first, second = (raw.rindex(f"archive/data/{key}".encode()) - 46 for key in "01")
    raw[second + 42 : second + 46] = raw[first + 42 : first + 46]
    path.write_bytes(raw)
    return Checkpoint(path, None, reason="corrupt_archive")


# ------------------------------------------------------------------------------- impossible tensors


def _impossible(
    name: str,
    *,
    elements: int = 6,
    shape: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
    storage_offset: int = 0,
    key: str = "0",
    reason: str = "corrupt_archive",
) -> None:
    @checkpoint(name=f"tensor_{name}", reason=reason)
    def build(path: Path) -> Checkpoint:
        good = TorchPickle.tensor("0", elements=6, shape=(6,), stride=(1,))
        bad = TorchPickle.tensor(
            key, elements=elements, shape=shape, stride=stride, storage_offset=storage_offset
        )
        # two storages: where one key had two sizes, that contradiction would be found first
        entries = {"good": good, "bad": bad.replace(text("0"), text("1"), 1) if key == "0" else bad}
        storages = [bytes(24), bytes(min(elements, 6) * 4 if elements > 0 else 0)]
        write_zip(path, torch_members(TorchPickle.state_dict(entries), storages))
        return Checkpoint(path, None, reason=reason)


_impossible("stride_out_of_range", shape=(10,), stride=(1000,))
_impossible("stride_negative", stride=(-3, 1))
_impossible("stride_zero_bomb", shape=(1_000_000_000,), stride=(0,), reason="limit_exceeded")
_impossible("stride_overflow", shape=(2, 2), stride=(1 << 62, 1 << 62))
_impossible("shape_negative", shape=(-2, 3))
_impossible("shape_overflow", shape=(1 << 40, 1 << 40), stride=(0, 0), reason="limit_exceeded")
_impossible("shape_beyond_64_bits", shape=(1 << 70,), stride=(0,))
_impossible("offset_negative", storage_offset=-1)
_impossible("offset_beyond_the_storage", storage_offset=1)
_impossible("rank_of_shape_and_stride_differ", shape=(2, 3), stride=(1,))
_impossible("storage_claims_a_tebibyte", elements=1 << 38, shape=(1 << 38,), stride=(1,))
_impossible("storage_of_negative_length", elements=-6)
_impossible("storage_key_is_a_path", key="../../../etc/passwd")
_impossible("storage_key_of_no_member", key="77")


@checkpoint(reason="corrupt_archive")
def tensor_shape_of_floats(path: Path) -> Checkpoint:
    entry = TorchPickle.tensor("0", elements=6, shape=(2, 3), stride=(3, 1))
    floats = b"(G" + struct.pack(">d", 2.0) + b"G" + struct.pack(">d", 3.0) + b"t"
    entry = entry.replace(ints((2, 3)), floats)
    write_zip(path, torch_members(TorchPickle.state_dict({"w": entry}), [bytes(24)]))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="corrupt_archive")
def tensor_without_arguments(path: Path) -> Checkpoint:
    entry = named("torch._utils", "_rebuild_tensor_v2") + b")R"
    write_zip(path, torch_members(TorchPickle.state_dict({"w": entry})))
    return Checkpoint(path, None, reason="corrupt_archive")


@checkpoint(reason="unsupported_format")
def encrypted_flag_on_one_storage(path: Path) -> Checkpoint:
    """The flag on one member alone: scanners that look at the first one miss it."""
    _, entries, storages = _weights()
    members = torch_members(TorchPickle.state_dict(entries), storages)
    write_zip(path, change(members, "/data/0", flags=1))
    return Checkpoint(path, None, reason="unsupported_format")
