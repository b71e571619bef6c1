"""A pickle interpreter that imports nothing and calls nothing.

Implements every opcode of protocols 0 to 5 (CPython, Lib/pickletools.py and Modules/_pickle.c) over
bytes in memory and builds the records of `nodes`. A call the pickle asks for is looked up in a table
of *reducers*, functions of ptbin that turn the arguments of known constructors (`OrderedDict`,
`torch._utils._rebuild_tensor_v2`, ...) into records; every other call stays an inert `Instance`.

Costs: one pass, about a microsecond an opcode; memory linear in the pickle (the memo is a dict, so a
large LONG_BINPUT index claims nothing). Lengths are checked against the bytes left before they are
used. Any structural fault is one `CorruptArchiveError` with the byte offset.

Does not know torch, containers, or what is safe: it reports the globals and oddities it met, and
`verdicts` judges them.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError, PtbinError
from ptbin.nodes import DictNode, Global, Instance, SetNode
from ptbin.options import Limits

__all__ = ["PickleProgram", "PickleTruncatedError", "Reducer", "run_pickle"]

Reducer = Callable[[tuple[Any, ...]], Any]

# CPython refuses longer decimal integers by default (sys.int_info.default_max_str_digits); protocol 0
# writes integers in decimal, and reading them is quadratic.
MAX_DECIMAL_DIGITS = 4300


class PickleTruncatedError(CorruptArchiveError):
    """The stream runs off the end of the bytes given; more bytes may complete it."""


@dataclass(slots=True)
class PickleProgram:
    """What one pickle said.

    Attributes:
        root: the record that STOP would have returned.
        end: offset just behind STOP.
        opcodes: how many were run.
        globals: every (module, name) met, with the offset of its first mention.
        oddities: constructions no pickler writes, which hide things from scanners; empty when fine.
        calls: (callee, arguments) of calls that no reducer explains, for `verdicts`.
    """

    root: Any = None
    end: int = 0
    opcodes: int = 0
    globals: dict[tuple[str, str], int] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)
    calls: list[tuple[Any, Any]] = field(default_factory=list)


def run_pickle(
    data: bytes,
    start: int = 0,
    *,
    reducers: Mapping[tuple[str, str], Reducer],
    persistent: Callable[[Any], Any] | None = None,
    limits: Limits | None = None,
    where: str = "pickle",
) -> PickleProgram:
    """Interpret the pickle at `start` in `data`.

    Args:
        reducers: (module, name) to a function of the call's arguments; it may raise `ValueError`,
            `TypeError` or a `PtbinError` where the arguments make no sense.
        persistent: turns a persistent id into a record; without it one is an error.
        where: the container's name for this pickle, for messages.

    Raises:
        CorruptArchiveError: truncated or contradictory stream; its `program` holds what was met until then.
        LimitExceededError: more opcodes than `limits.opcodes`.
    """
    machine = _Machine(data, start, reducers, persistent, limits or Limits(), where)
    try:
        return machine.run()
    except CorruptArchiveError as error:
        error.program = machine.program
        raise
    except PtbinError:
        raise
    except (
        IndexError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        struct.error,
    ) as error:
        damaged = CorruptArchiveError(
            f"{where}: the pickle is damaged at byte {machine.pos}: {type(error).__name__}: {error}"
        )
        damaged.program = machine.program
        raise damaged from error


class _Machine:
    def __init__(
        self,
        data: bytes,
        start: int,
        reducers: Mapping[tuple[str, str], Reducer],
        persistent: Callable[[Any], Any] | None,
        limits: Limits,
        where: str,
    ) -> None:
        self.data = data
        self.pos = start
        self.size = len(data)
        self.reducers = reducers
        self.persistent = persistent
        self.limits = limits
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.frame_end = 0
        self.program = PickleProgram()
        self.globals_seen: dict[tuple[str, str], Global] = {}

    def run(self) -> PickleProgram:
        data, size, dispatch = self.data, self.size, _DISPATCH
        budget = self.limits.opcodes
        count = 0
        while True:
            if self.pos >= size:
                raise PickleTruncatedError(f"{self.where}: the pickle ends at byte {size} without STOP")
            opcode = data[self.pos]
            self.pos += 1
            count += 1
            if opcode == 0x2E:  # STOP
                break
            if count > budget:
                raise LimitExceededError(f"{self.where}: more than {budget} opcodes")
            handler = dispatch[opcode]
            if handler is None:
                raise CorruptArchiveError(
                    f"{self.where}: found byte {opcode:#04x}, expected an opcode, at byte {self.pos - 1}"
                )
            handler(self)
        self.program.root = self.stack.pop()
        self.program.end = self.pos
        self.program.opcodes = count
        return self.program

    # -- reading arguments ------------------------------------------------------------------

    def take(self, nbytes: int) -> bytes:
        end = self.pos + nbytes
        if nbytes < 0 or end > self.size:
            raise PickleTruncatedError(
                f"{self.where}: {nbytes} bytes stated at byte {self.pos}, {self.size - self.pos} are left"
            )
        piece = self.data[self.pos : end]
        self.pos = end
        return piece

    def unsigned(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.pos)
        if end < 0:
            raise PickleTruncatedError(f"{self.where}: no end of line after byte {self.pos}")
        piece = self.data[self.pos : end]
        self.pos = end + 1
        return piece

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # -- building ------------------------------------------------------------------------------

    def find_global(self, module: str, name: str) -> Global:
        key = (module, name)
        known = self.globals_seen.get(key)
        if known is None:
            known = self.globals_seen[key] = Global(module, name, self.pos)
            self.program.globals[key] = self.pos
        return known

    def call(self, callee: Any, args: Any, kwargs: Any = None) -> Any:
        if type(callee) is Global and isinstance(args, tuple) and not kwargs:
            reducer = self.reducers.get((callee.module, callee.name))
            if reducer is not None:
                try:
                    return reducer(args)
                except (ValueError, TypeError, LookupError):
                    # A builtin called with nonsense stays an inert record; a tensor must make sense.
                    if callee.module.startswith("torch"):
                        raise
        self.program.calls.append((callee, args))
        return Instance(callee, args, kwargs)


def _text(raw: bytes) -> str | bytes:
    """A Python 2 string: torch decodes as UTF-8 (`pickle_load_args`); what is none stays bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _decimal(raw: bytes) -> int:
    if len(raw) > MAX_DECIMAL_DIGITS:
        raise ValueError(f"an integer of {len(raw)} digits")
    return int(raw)


def _mark(m: _Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _pop(m: _Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.stack = m.marks.pop()


def _int(m: _Machine) -> None:
    raw = m.line()
    # "00" and "01" are how protocol 1 wrote False and True (pickletools, INT)
    m.stack.append(False if raw == b"00" else True if raw == b"01" else _decimal(raw))


def _long(m: _Machine) -> None:
    raw = m.line()
    m.stack.append(_decimal(raw.removesuffix(b"L")))


def _string(m: _Machine) -> None:
    raw = m.line().strip()
    if len(raw) < 2 or raw[:1] not in b"'\"" or raw[-1:] != raw[:1]:
        raise ValueError("STRING without quotes")
    m.stack.append(_text(codecs.escape_decode(raw[1:-1])[0]))


def _long1(m: _Machine) -> None:
    m.stack.append(int.from_bytes(m.take(m.unsigned(1)), "little", signed=True))


def _long4(m: _Machine) -> None:
    (n,) = struct.unpack("<i", m.take(4))
    m.stack.append(int.from_bytes(m.take(n), "little", signed=True))


def _binstring(m: _Machine) -> None:
    (n,) = struct.unpack("<i", m.take(4))
    m.stack.append(_text(m.take(n)))


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _global(m: _Machine) -> None:
    module = _decode(m.line())
    name = _decode(m.line())
    m.stack.append(m.find_global(module, name))


def _stack_global(m: _Machine) -> None:
    name = m.stack.pop()
    module = m.stack.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise ValueError("STACK_GLOBAL without two strings")
    m.stack.append(m.find_global(module, name))


def _extension(m: _Machine, nbytes: int) -> None:
    code = m.unsigned(nbytes)
    # The registry that gives such a code its meaning lies outside the file: nobody can tell what it names.
    m.program.oddities.append(f"extension code {code} at byte {m.pos}")
    m.stack.append(m.find_global("copyreg", f"extension:{code}"))


def _inst(m: _Machine) -> None:
    module = _decode(m.line())
    name = _decode(m.line())
    args = tuple(m.pop_mark())
    m.stack.append(m.call(m.find_global(module, name), args))


def _obj(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(m.call(items[0], tuple(items[1:])))


def _reduce(m: _Machine) -> None:
    args = m.stack.pop()
    m.stack.append(m.call(m.stack.pop(), args))


def _newobj_ex(m: _Machine) -> None:
    kwargs = m.stack.pop()
    args = m.stack.pop()
    pairs = kwargs.pairs if isinstance(kwargs, DictNode) else kwargs
    m.stack.append(m.call(m.stack.pop(), args, pairs or None))


def _build(m: _Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if isinstance(target, Instance):
        if isinstance(target.state, DictNode) and isinstance(state, DictNode):
            target.state = DictNode("dict", [*target.state.pairs, *state.pairs])
        else:
            target.state = state
    elif isinstance(target, DictNode):
        target.state = state
    elif hasattr(target, "set_state"):
        target.set_state(state)
    # BUILD on a tensor sets Python attributes, which are not weights; elsewhere it has no meaning here.


def _pairs_of(target: Any) -> list[tuple[Any, Any]]:
    if isinstance(target, (DictNode, Instance)):
        return target.pairs
    raise TypeError(f"SETITEM on {type(target).__name__}")


def _items_of(target: Any) -> list[Any]:
    if isinstance(target, list):
        return target
    if isinstance(target, (Instance, SetNode)):
        return target.items
    raise TypeError(f"APPEND on {type(target).__name__}")


def _paired(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("an odd number of keys and values")
    return list(zip(items[::2], items[1::2], strict=True))


def _setitem(m: _Machine) -> None:
    value = m.stack.pop()
    key = m.stack.pop()
    _pairs_of(m.stack[-1]).append((key, value))


def _setitems(m: _Machine) -> None:
    items = m.pop_mark()
    _pairs_of(m.stack[-1]).extend(_paired(items))


def _append(m: _Machine) -> None:
    value = m.stack.pop()
    _items_of(m.stack[-1]).append(value)


def _appends(m: _Machine) -> None:
    items = m.pop_mark()
    _items_of(m.stack[-1]).extend(items)


def _additems(m: _Machine) -> None:
    items = m.pop_mark()
    target = m.stack[-1]
    if not isinstance(target, (SetNode, Instance)):
        raise TypeError(f"ADDITEMS on {type(target).__name__}")
    target.items.extend(items)


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def handler(m: _Machine) -> None:
        if len(m.stack) < count:
            raise IndexError("stack underflow")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return handler


def _put(m: _Machine, index: int) -> None:
    if index < 0:
        raise ValueError("negative memo index")
    m.memo[index] = m.stack[-1]


def _persistent_id(m: _Machine, pid: Any) -> None:
    if m.persistent is None:
        raise ValueError("a persistent id in a pickle that has no storages")
    m.stack.append(m.persistent(pid))


def _frame(m: _Machine) -> None:
    nbytes = m.unsigned(8)
    if nbytes > m.size - m.pos:
        raise PickleTruncatedError(
            f"{m.where}: FRAME of {nbytes} bytes at byte {m.pos}, {m.size - m.pos} are left"
        )
    if m.pos - 9 < m.frame_end:
        m.program.oddities.append(f"a frame inside a frame at byte {m.pos}")
    m.frame_end = m.pos + nbytes


def _proto(m: _Machine) -> None:
    version = m.unsigned(1)
    if version > 5:
        raise ValueError(f"pickle protocol {version}")


def _no_buffer(m: _Machine) -> None:
    raise ValueError(f"an out-of-band buffer at byte {m.pos}, which no file can hold")


def _readonly_buffer(m: _Machine) -> None:
    m.stack[-1]


_DISPATCH: list[Callable[[_Machine], None] | None] = [None] * 256


def _register() -> None:
    def set_op(char: str, handler: Callable[[_Machine], None]) -> None:
        _DISPATCH[ord(char)] = handler

    def push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
        def handler(m: _Machine) -> None:
            m.stack.append(make(m))

        return handler

    # constants and numbers
    set_op("N", push(lambda m: None))
    set_op("\x88", push(lambda m: True))
    set_op("\x89", push(lambda m: False))
    set_op("I", _int)
    set_op("L", _long)
    set_op("J", push(lambda m: struct.unpack("<i", m.take(4))[0]))
    set_op("K", push(lambda m: m.unsigned(1)))
    set_op("M", push(lambda m: m.unsigned(2)))
    set_op("\x8a", _long1)
    set_op("\x8b", _long4)
    set_op("F", push(lambda m: float(m.line())))
    set_op("G", push(lambda m: struct.unpack(">d", m.take(8))[0]))
    # strings and bytes
    set_op("S", _string)
    set_op("T", _binstring)
    set_op("U", push(lambda m: _text(m.take(m.unsigned(1)))))
    set_op("V", push(lambda m: m.line().decode("raw-unicode-escape")))
    set_op("X", push(lambda m: _decode(m.take(m.unsigned(4)))))
    set_op("\x8c", push(lambda m: _decode(m.take(m.unsigned(1)))))
    set_op("\x8d", push(lambda m: _decode(m.take(m.unsigned(8)))))
    set_op("B", push(lambda m: m.take(m.unsigned(4))))
    set_op("C", push(lambda m: m.take(m.unsigned(1))))
    set_op("\x8e", push(lambda m: m.take(m.unsigned(8))))
    set_op("\x96", push(lambda m: m.take(m.unsigned(8))))
    set_op("\x97", _no_buffer)
    set_op("\x98", _readonly_buffer)
    # containers
    set_op("(", _mark)
    set_op("0", _pop)
    set_op("1", lambda m: (m.pop_mark(), None)[1])
    set_op("2", lambda m: m.stack.append(m.stack[-1]))
    set_op(")", push(lambda m: ()))
    set_op("t", lambda m: _push_from_mark(m, tuple))
    set_op("\x85", _tuple_of(1))
    set_op("\x86", _tuple_of(2))
    set_op("\x87", _tuple_of(3))
    set_op("]", push(lambda m: []))
    set_op("l", lambda m: _push_from_mark(m, list))
    set_op("}", push(lambda m: DictNode()))
    set_op("d", lambda m: _push_from_mark(m, lambda items: DictNode("dict", _paired(items))))
    set_op("\x8f", push(lambda m: SetNode([])))
    set_op("\x91", lambda m: _push_from_mark(m, lambda items: SetNode(items, frozen=True)))
    set_op("a", _append)
    set_op("e", _appends)
    set_op("s", _setitem)
    set_op("u", _setitems)
    set_op("\x90", _additems)
    # memo
    set_op("p", lambda m: _put(m, _decimal(m.line())))
    set_op("q", lambda m: _put(m, m.unsigned(1)))
    set_op("r", lambda m: _put(m, m.unsigned(4)))
    set_op("\x94", lambda m: _put(m, len(m.memo)))
    set_op("g", push(lambda m: m.memo[_decimal(m.line())]))
    set_op("h", push(lambda m: m.memo[m.unsigned(1)]))
    set_op("j", push(lambda m: m.memo[m.unsigned(4)]))
    # names and calls
    set_op("c", _global)
    set_op("\x93", _stack_global)
    set_op("\x82", lambda m: _extension(m, 1))
    set_op("\x83", lambda m: _extension(m, 2))
    set_op("\x84", lambda m: _extension(m, 4))
    set_op("R", _reduce)
    set_op("\x81", _reduce)  # NEWOBJ: class and arguments, as REDUCE has function and arguments
    set_op("\x92", _newobj_ex)
    set_op("i", _inst)
    set_op("o", _obj)
    set_op("b", _build)
    set_op("P", lambda m: _persistent_id(m, _decode(m.line())))
    set_op("Q", lambda m: _persistent_id(m, m.stack.pop()))
    # framing
    set_op("\x80", _proto)
    set_op("\x95", _frame)


def _push_from_mark(m: _Machine, build: Callable[[list[Any]], Any]) -> None:
    items = m.pop_mark()
    m.stack.append(build(items))


_register()
