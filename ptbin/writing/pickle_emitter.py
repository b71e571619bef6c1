"""A protocol 2 pickle of a state dict, written from scratch.

Emits only what `torch.load(weights_only=True)` reads (torch/_weights_only_unpickler.py, 2.13): plain
containers and values, `OrderedDict`, and torch's rebuild functions over persistent storage ids. Not one
byte of the source's pickle goes along. Deterministic: the same records give the same bytes.

Protocol 2, because `weights_only=True` refuses protocol 4 (pytorch/pytorch#118092).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ptbin.errors import UnsupportedTensorError
from ptbin.values.dtypes import BY_NAME, BY_STORAGE_CLASS, QUANTIZER_SCHEMES, DType
from ptbin.values.nodes import DictNode, Global, Instance, SetNode, TorchSize
from ptbin.values.tensors import SparseTensor, TensorRef
from ptbin.writing.storages import OutputTensor

# Everything an output's pickle may name; a subset of what weights_only=True allows.
_NAMES = frozenset(
    [
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
        *(("__builtin__", name) for name in ("bytearray", "complex", "set")),
        *(
            ("torch._utils", f"_rebuild_{name}")
            for name in ("tensor_v2", "tensor_v3", "qtensor", "sparse_tensor")
        ),
        ("torch.serialization", "_get_layout"),
        ("torch.storage", "UntypedStorage"),
        *(("torch", name) for name in ("Size", "device", *QUANTIZER_SCHEMES, *BY_NAME, *BY_STORAGE_CLASS)),
    ]
)

BATCH = 1000  # as CPython's pickler (Lib/pickle.py, _BATCHSIZE)
MAX_FORMS = 4096
_UINT32 = struct.Struct("<I").pack


def emit_state_dict(
    entries: list[tuple[str, Any]],
    *,
    mapping_kind: str,
    metadata: DictNode | None,
    locate: Callable[[TensorRef], OutputTensor],
) -> bytes:
    """The pickle of the mapping `entries`, its tensors placed by `locate`."""
    emitter = _Emitter(locate)
    emitter.emit_mapping(
        mapping_kind, list(entries), {"_metadata": metadata} if metadata is not None else None
    )
    return emitter.finish()


class _Emitter:
    def __init__(self, locate: Callable[[TensorRef], OutputTensor]) -> None:
        self._out: list[bytes] = [b"\x80\x02"]
        self._memo: dict[Any, int] = {}
        """By text, by (module, name) of a global, by identity of a container."""
        self._keep: list[Any] = []
        self._locate = locate
        self._written: set[DType] = set()
        """Types of the plain tensors so far: all names that another such tensor needs are in the memo."""
        self._forms: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}

    def finish(self) -> bytes:
        self._out.append(b".")
        return b"".join(self._out)

    # -- memo --------------------------------------------------------------------------------

    def _known(self, key: Any) -> bool:
        index = self._memo.get(key)
        if index is None:
            return False
        self._out.append(b"h" + bytes([index]) if index < 256 else b"j" + _UINT32(index))
        return True

    def _remember(self, key: Any) -> None:
        index = len(self._memo)
        self._memo[key] = index
        self._out.append(b"q" + bytes([index]) if index < 256 else b"r" + _UINT32(index))

    # -- values ------------------------------------------------------------------------------

    def text(self, value: str) -> None:
        if self._known(value):
            return
        raw = value.encode("utf-8", "surrogatepass")
        self._out.append(b"X" + _UINT32(len(raw)) + raw)
        self._remember(value)

    def name(self, module: str, name: str) -> None:
        if (module, name) not in _NAMES:
            # Whatever a foreign pickle said, nothing but these reaches an output.
            raise UnsupportedTensorError(f"{module}.{name} is not a name that an output may hold")
        if self._known((module, name)):
            return
        self._out.append(f"c{module}\n{name}\n".encode())
        self._remember((module, name))

    def number(self, value: int) -> None:
        if 0 <= value < 256:
            self._out.append(b"K" + bytes([value]))
        elif 0 <= value < 65536:
            self._out.append(b"M" + struct.pack("<H", value))
        elif -(1 << 31) <= value < 1 << 31:
            self._out.append(b"J" + struct.pack("<i", value))
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._out.append(b"\x8a" + bytes([len(raw)]) + raw)

    def tuple_of(self, count: int, emit: Callable[[], None]) -> None:
        if count == 0:
            self._out.append(b")")
        elif count <= 3:
            emit()
            self._out.append((b"\x85", b"\x86", b"\x87")[count - 1])
        else:
            self._out.append(b"(")
            emit()
            self._out.append(b"t")

    @staticmethod
    def each(emit: Callable[[Any], None], values: Iterable[Any]) -> None:
        for value in values:
            emit(value)

    def numbers(self, values: tuple[int, ...]) -> None:
        self.tuple_of(len(values), partial(self.each, self.number, values))

    def call(self, module: str, name: str, count: int, emit_args: Callable[[], None]) -> None:
        self.name(module, name)
        self.tuple_of(count, emit_args)
        self._out.append(b"R")

    def value(self, value: Any) -> None:
        if value is None:
            self._out.append(b"N")
        elif isinstance(value, bool):
            self._out.append(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            self.number(value)
        elif isinstance(value, float):
            self._out.append(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, TensorRef):
            self.tensor(value)
        elif isinstance(value, SparseTensor):
            self.sparse(value)
        elif isinstance(value, complex):
            parts = (value.real, value.imag)
            self.call("__builtin__", "complex", 2, partial(self.each, self.value, parts))
        elif isinstance(value, bytes):
            self.raw_bytes(value)
        elif isinstance(value, bytearray):
            self.call("__builtin__", "bytearray", 1, lambda: self.raw_bytes(bytes(value)))
        elif isinstance(value, Global):
            self.name(value.module, value.name)
        elif isinstance(value, Instance):  # torch.device, the only one `keep_writable` lets pass
            self.call("torch", "device", len(value.args), partial(self.each, self.value, value.args))
        else:
            self.container(value)

    def raw_bytes(self, value: bytes) -> None:
        def args() -> None:
            self.text(value.decode("latin1"))
            self.text("latin1")

        self.call("_codecs", "encode", 2, args)

    def container(self, value: Any) -> None:
        if self._known(id(value)):
            return
        self._keep.append(value)  # an id stays unique only while its object lives
        if isinstance(value, TorchSize):
            self.call("torch", "Size", 1, lambda: self.numbers(tuple(value)))
        elif isinstance(value, tuple):
            self.tuple_of(len(value), partial(self.each, self.value, value))
        elif isinstance(value, list):
            self.list_of(value)
        elif isinstance(value, SetNode):
            self.call("__builtin__", "set", 1, lambda: self.list_of(value.items))
        else:
            assert isinstance(value, DictNode)
            self.emit_mapping(value.kind, value.pairs, None)
        self._remember(id(value))

    def list_of(self, items: list[Any]) -> None:
        self._out.append(b"]")
        for start in range(0, len(items), BATCH):
            self._out.append(b"(")
            for item in items[start : start + BATCH]:
                self.value(item)
            self._out.append(b"e")

    def emit_mapping(self, kind: str, pairs: list[tuple[Any, Any]], state: dict[str, Any] | None) -> None:
        if kind == "OrderedDict":
            self.call("collections", "OrderedDict", 0, lambda: None)
        else:
            self._out.append(b"}")
        for start in range(0, len(pairs), BATCH):
            self._out.append(b"(")
            for key, value in pairs[start : start + BATCH]:
                if type(key) is str:
                    self.text(key)
                else:
                    self.value(key)
                if type(value) is TensorRef:
                    self.tensor(value)
                else:
                    self.value(value)
            self._out.append(b"u")
        if state is not None and kind == "OrderedDict":
            self._out.append(b"}")
            for key, value in state.items():
                self.text(key)
                self.value(value)
                self._out.append(b"s")
            self._out.append(b"b")

    # -- tensors -----------------------------------------------------------------------------

    def storage(self, placed: OutputTensor) -> None:
        """Persistent id ('storage', class, key, 'cpu', element count); the location is always the CPU."""

        def fields() -> None:
            self.text("storage")
            if placed.dtype.storage_class is None:
                self.name("torch.storage", "UntypedStorage")
                count = placed.storage.nbytes
            else:
                self.name("torch", placed.dtype.storage_class)
                count = placed.storage.nbytes // placed.dtype.itemsize
            self.text(placed.storage.key)
            self.text("cpu")
            self.number(count)

        self.tuple_of(5, fields)
        self._out.append(b"Q")

    def tensor(self, tensor: TensorRef) -> None:
        placed = self._locate(tensor)
        is_plain = tensor.quantizer is None and not tensor.flags
        if is_plain and placed.dtype in self._written:
            before, behind = self._form(tensor, placed)
            self._out.append(before)
            self.text(placed.storage.key)
            self._out.append(behind)
            return
        untyped = placed.dtype.storage_class is None
        function = "_rebuild_tensor_v3" if untyped else "_rebuild_tensor_v2"
        if tensor.quantizer is not None:
            function = "_rebuild_qtensor"

        def fields() -> None:
            self.storage(placed)
            self.number(placed.storage_offset)
            self.numbers(tensor.shape)
            self.numbers(placed.stride)
            if tensor.quantizer is not None:
                self.quantizer(tensor.quantizer)
            self._out.append(b"\x89")  # requires_grad
            self.call("collections", "OrderedDict", 0, lambda: None)  # backward hooks
            if untyped:
                self.name("torch", placed.dtype.name)
            if tensor.flags:
                self._out.append(b"}")
                for flag in tensor.flags:
                    self.text(flag)
                    self._out.append(b"\x88s")

        count = 6 + int(untyped or tensor.quantizer is not None) + int(bool(tensor.flags))
        self.call("torch._utils", function, count, fields)
        if is_plain and not untyped:
            self._written.add(placed.dtype)

    def _form(self, tensor: TensorRef, placed: OutputTensor) -> tuple[bytes, bytes]:
        """What stands before and behind the storage's key: the same for all plain tensors of one shape."""
        nbytes, offset = placed.storage.nbytes, placed.storage_offset
        form = (placed.dtype, tensor.shape, placed.stride, nbytes, offset)
        found = self._forms.get(form)
        if found is None:
            assert placed.dtype.storage_class is not None
            whole, self._out = self._out, []
            self.name("torch._utils", "_rebuild_tensor_v2")
            self._out.append(b"((")
            self.text("storage")
            self.name("torch", placed.dtype.storage_class)
            before, self._out = b"".join(self._out), []
            self.text("cpu")
            self.number(nbytes // placed.dtype.itemsize)
            self._out.append(b"tQ")
            self.number(offset)
            self.numbers(tensor.shape)
            self.numbers(placed.stride)
            self._out.append(b"\x89")
            self.call("collections", "OrderedDict", 0, lambda: None)
            self._out.append(b"tR")
            found = before, b"".join(self._out)
            self._out = whole
            if len(self._forms) < MAX_FORMS:
                self._forms[form] = found
        return found

    def quantizer(self, params: tuple[Any, ...]) -> None:
        def fields() -> None:
            self.name("torch", params[0])
            for value in params[1:]:
                self.value(value)

        self.tuple_of(len(params), fields)

    def sparse(self, tensor: SparseTensor) -> None:
        extra = tensor.layout == "torch.sparse_coo" and tensor.coalesced is not None

        def data() -> None:
            for _, part in tensor.parts:
                self.tensor(part)
            self.call("torch", "Size", 1, lambda: self.numbers(tensor.shape))
            if extra:
                self.value(tensor.coalesced)

        def fields() -> None:
            self.call("torch.serialization", "_get_layout", 1, lambda: self.text(tensor.layout))
            self.tuple_of(len(tensor.parts) + 1 + int(extra), data)

        self.call("torch._utils", "_rebuild_sparse_tensor", 2, fields)
