"""Files of torch 0.1 to 0.4 and of pickle protocols 0 and 1, and unlucky ones that look like something else.

No such torch runs here: the pickles are written opcode by opcode after its sources (torch/tensor.py,
torch/storage.py, torch/autograd/variable.py and torch/serialization.py of the tags v0.1.1 to v0.4.1). Today's
torch still reads most of them, and is then the oracle.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.checkpoints.craft import TorchPickle, integer, ints, legacy_file, named, text
from tests.checkpoints.dtypes import random_bits, random_state_dict
from tests.checkpoints.registry import Checkpoint, checkpoint

HOOKS = named("collections", "OrderedDict") + b")R"

# Tensor classes of torch 0.1 that torch has to this day.
CLASSES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
}


def _tensor(cls: str, storage: bytes, *, module: str = "torch", shape: tuple[int, int] = (2, 3)) -> bytes:
    """`copyreg.__newobj__` of torch 0.1.10: an empty tensor and its state."""
    state = storage + integer(0) + ints(shape) + ints((shape[1], 1))
    return named(module, f"{cls}Tensor") + b")\x81(" + state + b"tb"


def _written(path: Path, entries: dict[str, bytes], storages: list[torch.Tensor]) -> None:
    """A legacy file whose storages are of any type."""
    head, _, keys = legacy_file(TorchPickle.state_dict(entries), []).rpartition(b"\x80\x02]")
    assert keys
    listed = pickle.dumps([str(index) for index in range(len(storages))], 2)
    body = b"".join(struct.pack("<q", t.numel()) + t.numpy().tobytes() for t in storages)
    path.write_bytes(head + listed + body)


def _register_0_1_12(name: str, module: str, reads: str | None) -> None:
    @checkpoint(name=name, torch_reads=reads)
    def build(path: Path) -> Checkpoint:
        tensors = {cls: random_bits(dtype, (2, 3), seed=1) for cls, dtype in CLASSES.items()}
        entries = {
            cls: _tensor(cls, TorchPickle.storage(str(index), 6, f"{cls}Storage", legacy=True), module=module)
            for index, cls in enumerate(CLASSES)
        }
        _written(path, entries, list(tensors.values()))
        return Checkpoint(path, tensors)


_register_0_1_12("torch_0_1_12_tensors", "torch", "pickle")
_register_0_1_12("torch_0_1_12_cuda_tensors", "torch.cuda", None)


def _wrapped(cls: tuple[str, str], inner: bytes, state: bytes) -> bytes:
    return named(*cls) + inner + b"\x85R" + state + b"b"


VARIABLE, PARAMETER = ("torch.autograd.variable", "Variable"), ("torch.nn.parameter", "Parameter")
V1 = named("torch._utils", "_rebuild_tensor") + b"("


def _rebuilt(key: str) -> bytes:
    """`_rebuild_tensor` of torch 0.2 and 0.3."""
    storage = TorchPickle.storage(key, 6, legacy=True)
    return V1 + storage + integer(0) + ints((2, 3)) + ints((3, 1)) + b"tR"


@checkpoint(torch_reads="pickle")
def torch_0_3_variables(path: Path) -> Checkpoint:
    """(requires_grad, volatile, backward hooks) as the state of what was called with its data."""
    tensors = {name: random_bits(torch.float32, (2, 3), seed=i) for i, name in enumerate("abc")}
    entries = {
        "a": _wrapped(PARAMETER, _rebuilt("0"), b"\x88\x89" + HOOKS + b"\x87"),
        "b": _wrapped(VARIABLE, _rebuilt("1"), b"\x89\x89" + HOOKS + b"\x87"),
        "c": _wrapped(
            PARAMETER, _tensor("Float", TorchPickle.storage("2", 6, legacy=True)), b"\x88\x89N\x87"
        ),
    }
    _written(path, entries, list(tensors.values()))
    return Checkpoint(path, tensors)


@checkpoint(torch_reads="pickle")
def torch_0_1_10_variables(path: Path) -> Checkpoint:
    """(data, gradient, hooks, requires_grad, volatile) as the state of an empty one."""
    tensors = {name: random_bits(torch.float32, (2, 3), seed=i) for i, name in enumerate("ab")}
    entries = {
        name: named(*cls)
        + b")\x81("
        + _tensor("Float", TorchPickle.storage(str(index), 6, legacy=True))
        + b"N"
        + HOOKS
        + b"\x88\x89tb"
        for index, (name, cls) in enumerate({"a": PARAMETER, "b": VARIABLE}.items())
    }
    _written(path, entries, list(tensors.values()))
    return Checkpoint(path, tensors)


def _register_state(name: str, state: bytes) -> None:
    @checkpoint(name=f"tensor_with_{name}", reason="unsupported_tensor")
    def build(path: Path) -> Checkpoint:
        """BUILD on a tensor that is complete: it would change what the tensor holds, or means nothing."""
        _written(path, {"w": _rebuilt("0") + state + b"b"}, [torch.zeros(6)])
        return Checkpoint(path, None, reason="unsupported_tensor")


_register_state("a_dict_for_state", b"}" + text("data") + b"Ns")
_register_state("another_view_for_state", b"(NK\x00" + ints((2,)) + ints((1,)) + b"t")
_register_state("another_tensor_for_state", b"(" + _rebuilt("0") + b"N" + HOOKS + b"\x88\x89t")


class _Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _register_lists(protocol: int) -> None:
    @checkpoint(name=f"storages_as_lists_protocol_{protocol}", suffix=".pkl", torch_reads=None)
    def build(path: Path) -> Checkpoint:
        """`pickle.dump` of a state dict in torch 0.1 to 0.4: storages as calls with their elements."""
        tensors = {
            cls: torch.tensor([[1.5, -2, 3], [0.25, 7, 9]]).to(dtype) for cls, dtype in CLASSES.items()
        }
        tensors["Byte"] = torch.tensor([[1, 2, 3], [200, 7, 9]], dtype=torch.uint8)
        content = {
            cls: _Call(
                torch._utils._rebuild_tensor,
                _Call(getattr(torch, f"{cls}Storage"), tensor.flatten().tolist()),
                0,
                (2, 3),
                (3, 1),
            )
            for cls, tensor in tensors.items()
        }
        # before 0.1.10 a tensor was a call with its rows
        content["rows"] = _Call(torch.FloatTensor, [[1.5, 2.5], [3.5, 4.5], [0.0, -0.0]])
        path.write_bytes(pickle.dumps(content, protocol))
        return Checkpoint(path, {**tensors, "rows": torch.tensor([[1.5, 2.5], [3.5, 4.5], [0.0, -0.0]])})


def _register_protocol(protocol: int, legacy: bool) -> None:
    kind = "legacy" if legacy else "zip"
    # torch writes protocol 0 and fails on it: persistent ids are mere text there.
    reads = "pickle" if protocol else None

    @checkpoint(name=f"{kind}_protocol_{protocol}", torch_reads=reads)
    def build(path: Path) -> Checkpoint:
        state = random_state_dict(seed=protocol)
        state["tied"] = next(iter(state.values()))
        torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
        return Checkpoint(path, state)


def _register_raw(protocol: int) -> None:
    @checkpoint(name=f"raw_pickle_protocol_{protocol}", suffix=".pkl", torch_reads=None)
    def build(path: Path) -> Checkpoint:
        state = {"w": random_bits(torch.float32, (3, 4)), "h": random_bits(torch.bfloat16, (5,))}
        path.write_bytes(pickle.dumps({"model": state, "epoch": 3}, protocol))
        return Checkpoint(path, state)

    @checkpoint(name=f"raw_module_protocol_{protocol}", suffix=".pkl", torch_reads=None)
    def module(path: Path) -> Checkpoint:
        torch.manual_seed(protocol)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        path.write_bytes(pickle.dumps(net, protocol))
        return Checkpoint(path, net.state_dict())


for _protocol in (0, 1):
    _register_protocol(_protocol, legacy=True)
    _register_protocol(_protocol, legacy=False)
    _register_raw(_protocol)
for _protocol in (0, 1, 2):
    _register_lists(_protocol)


# ------------------------------------------------------------------- tars of torch before 0.1.10


def torch_tar(
    path: Path, *, form: int, prefix: str = "", before: Mapping[str, bytes] | None = None
) -> Checkpoint:
    """As torch 0.1.9's `save`: one tensor over a storage, one over a view of it, one over another.

    `before` are opcodes in front of the first pickle of a part.
    """
    whole, other = random_bits(torch.float32, (12,), seed=1), random_bits(torch.int64, (6,), seed=2)
    storages = pickle.dumps(2, 2)
    for key, kind, tensor in ((101, torch.FloatStorage, whole), (102, torch.LongStorage, other)):
        storages += pickle.dumps((key, "cpu", kind), 2)
        storages += struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes()
    storages += pickle.dumps([(103, 101, 4, 8)], 2)
    tensors = pickle.dumps(3, 2)
    for key, storage, cls, shape, stride, offset in (
        (201, 101, torch.FloatTensor, (3, 4), (4, 1), 0),
        (202, 103, torch.FloatTensor, (2, 3), (3, 1), 2),
        (203, 102, torch.LongTensor, (2, 3), (1, 2), 0),
    ):
        tensors += pickle.dumps((key, storage, cls), 2) + struct.pack("<iI", len(shape), 0)
        tensors += struct.pack(f"<{2 * len(shape) + 1}q", *shape, *stride, offset)
    body = b"\x80\x02}(" + b"".join(text(n) + text(k) + b"Q" for n, k in (("a", "201"), ("b", "202"))) + b"u."
    body = body[:-2] + text("c") + integer(203) + b"Qu."
    info = pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2)
    parts = {"sys_info": info, "pickle": body, "tensors": tensors, "storages": storages}
    for name, opcodes in (before or {}).items():
        parts[name] = parts[name][:2] + opcodes + parts[name][2:]
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in parts.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"mtime": "1480000000.25"}
            archive.addfile(member, io.BytesIO(data))
    expected = {"a": whole.view(3, 4), "b": whole[6:12].view(2, 3), "c": other.as_strided((2, 3), (1, 2))}
    return Checkpoint(path, expected)


@checkpoint(torch_reads="pickle")
def tar_of_torch_0_1_9(path: Path) -> Checkpoint:
    return torch_tar(path, form=tarfile.GNU_FORMAT)


@checkpoint(torch_reads="pickle")
def tar_of_torch_0_1_9_pax_headed(path: Path) -> Checkpoint:
    return torch_tar(path, form=tarfile.PAX_FORMAT)


@checkpoint(torch_reads=None)
def tar_of_torch_0_1_9_unpacked_and_packed_again(path: Path) -> Checkpoint:
    return torch_tar(path, form=tarfile.USTAR_FORMAT, prefix="./")


# -------------------------------------------------------------------------------------- unlucky

END_RECORD = b"PK\x05\x06"


def _unlucky() -> torch.Tensor:
    return torch.frombuffer(bytearray(bytes(999) + END_RECORD + b"\x07" * 99), dtype=torch.uint8).clone()


@checkpoint()
def legacy_with_the_bytes_of_a_zips_end(path: Path) -> Checkpoint:
    state = {"w": _unlucky()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return Checkpoint(path, state)


@checkpoint(suffix=".safetensors", torch_reads=None)
def safetensors_with_the_bytes_of_a_zips_end(path: Path) -> Checkpoint:
    state = {"w": _unlucky()}
    path.write_bytes(save(state))
    return Checkpoint(path, state)


@checkpoint(suffix=".pkl", torch_reads=None)
def raw_pickle_with_the_bytes_of_a_zips_end(path: Path) -> Checkpoint:
    state = {"w": _unlucky()}
    path.write_bytes(pickle.dumps(state, 2))
    return Checkpoint(path, state)


@checkpoint()
def zip_with_the_bytes_of_a_zips_end(path: Path) -> Checkpoint:
    state = {"w": _unlucky()}
    torch.save(state, path)
    return Checkpoint(path, state)
