"""What each opcode of protocols 0 to 5 does to the machine's state. Builds records, calls nothing.

Source: CPython, Lib/pickletools.py (arguments) and Lib/pickle.py (`_Unpickler`, effects). A stack that
runs empty, a missing memo entry or a value of the wrong kind is an ordinary Python error here, which
`pickle_machine.run_pickle` turns into one `CorruptArchiveError`.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ptbin.values.nodes import DictNode, Global, Instance, SetNode

if TYPE_CHECKING:
    from ptbin.reading.pickle.machine import Machine

# CPython refuses longer decimal integers by default (sys.int_info.default_max_str_digits); protocol 0
# writes integers in decimal, and reading them is quadratic.
MAX_DECIMAL_DIGITS = 4300

_UINT32 = struct.Struct("<I")


def _text(raw: bytes) -> str | bytes:
    """A Python 2 string: torch decodes as UTF-8 (`pickle_load_args`); what is not UTF-8 stays bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _decimal(raw: bytes) -> int:
    if len(raw) > MAX_DECIMAL_DIGITS:
        raise ValueError(f"an integer of {len(raw)} digits")
    return int(raw)


# The opcodes that a state dict's pickle is made of take the shortest way to their argument. BININT1, BINGET
# and BINPUT are done in the interpreter's loop, and come here only at the end of the data.


def _long_binget(m: Machine) -> None:
    m.stack.append(m.memo[_uint32(m)])


def _long_binput(m: Machine) -> None:
    m.memo[_uint32(m)] = m.stack[-1]


def _uint32(m: Machine) -> int:
    pos = m.pos
    end = pos + 4
    if end > m.size:
        m.take(4)  # raises
    m.pos = end
    number: int = _UINT32.unpack_from(m.data, pos)[0]
    return number


def _binunicode(m: Machine) -> None:
    nbytes = _uint32(m)
    start = m.pos
    end = start + nbytes
    if end > m.size:
        m.take(nbytes)  # raises
    m.pos = end
    m.stack.append(m.data[start:end].decode("utf-8", "surrogatepass"))


def _mark(m: Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.stack = m.marks.pop()


def _int(m: Machine) -> None:
    raw = m.line()
    # "00" and "01" are how protocol 1 wrote False and True (pickletools, INT)
    m.stack.append(False if raw == b"00" else True if raw == b"01" else _decimal(raw))


def _string(m: Machine) -> None:
    raw = m.line().strip()
    if len(raw) < 2 or raw[:1] not in b"'\"" or raw[-1:] != raw[:1]:
        raise ValueError("STRING without quotes")
    m.stack.append(_text(codecs.escape_decode(raw[1:-1])[0]))


def _int32(m: Machine) -> int:
    number: int = struct.unpack("<i", m.take(4))[0]
    return number


def _signed(m: Machine, nbytes: int) -> int:
    return int.from_bytes(m.take(nbytes), "little", signed=True)


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _named(m: Machine) -> Global:
    return m.find_global(_decode(m.line()), _decode(m.line()))


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    module = m.stack.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise ValueError("STACK_GLOBAL without two strings")
    m.stack.append(m.find_global(module, name))


def _extension(m: Machine, nbytes: int) -> None:
    code = m.unsigned(nbytes)
    # The registry that gives such a code its meaning lies outside the file.
    m.program.oddities.append(f"extension code {code} at byte {m.pos}")
    m.stack.append(m.find_global("copyreg", f"extension:{code}"))


def _inst(m: Machine) -> None:
    found = _named(m)
    args = tuple(m.pop_mark())
    m.stack.append(m.call(found, args))


def _obj(m: Machine) -> None:
    items = m.pop_mark()
    m.stack.append(m.call(items[0], tuple(items[1:])))


def _reduce(m: Machine) -> None:
    args = m.stack.pop()
    m.stack.append(m.call(m.stack.pop(), args))


def _newobj_ex(m: Machine) -> None:
    kwargs = m.stack.pop()
    args = m.stack.pop()
    pairs = kwargs.pairs if isinstance(kwargs, DictNode) else kwargs
    m.stack.append(m.call(m.stack.pop(), args, pairs or None))


def _build(m: Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if isinstance(target, Instance):
        _refuse_attribute(m, target)
        target.state = state
    elif isinstance(target, DictNode):
        target.state = state
    elif hasattr(target, "set_state"):
        target.set_state(state)
    elif m.set_state is None or not m.set_state(target, state):
        # On a name this would set attributes of a class or a module.
        m.program.oddities.append(f"state set on a finished {type(target).__name__} at byte {m.pos}")


def _refuse_attribute(m: Machine, target: Instance) -> None:
    """Note a change to what `getattr` gave: a class, a method, a module, which the pickle did not make."""
    if type(target.cls) is Global and target.cls.name == "getattr":
        m.program.oddities.append(f"a change to what getattr gave at byte {m.pos}")


def _update(m: Machine, items: list[Any]) -> None:
    """Add keys and values, in turn, to the mapping on the stack."""
    target = m.stack[-1]
    if isinstance(target, Instance):
        _refuse_attribute(m, target)
    elif not isinstance(target, DictNode):
        raise TypeError(f"SETITEM on {type(target).__name__}")
    target.pairs.extend(_paired(items))


def _extend(m: Machine, items: list[Any], *kinds: type) -> None:
    """Add to the sequence on the stack, which is of one of the kinds, or of a class."""
    target = m.stack[-1]
    if isinstance(target, Instance):
        _refuse_attribute(m, target)
    elif not isinstance(target, kinds):
        raise TypeError(f"APPEND on {type(target).__name__}")
    (target if isinstance(target, list) else target.items).extend(items)


def _paired(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("an odd number of keys and values")
    return list(zip(items[::2], items[1::2], strict=True))


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def handler(m: Machine) -> None:
        if len(m.stack) < count:
            raise IndexError("stack underflow")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return handler


def _put(m: Machine, index: int) -> None:
    if index < 0:
        raise ValueError("negative memo index")
    m.memo[index] = m.stack[-1]


def _persistent_id(m: Machine, pid: Any) -> None:
    if m.persistent is None:
        raise ValueError("a persistent id in a pickle that has no storages")
    m.stack.append(m.persistent(pid))


def _frame(m: Machine) -> None:
    nbytes = m.unsigned(8)
    m.require(nbytes)
    if m.pos - 9 < m.frame_end:
        m.program.oddities.append(f"a frame inside a frame at byte {m.pos}")
    m.frame_end = m.pos + nbytes


def _proto(m: Machine) -> None:
    version = m.unsigned(1)
    if version > 5:
        raise ValueError(f"pickle protocol {version}")


def _no_buffer(m: Machine) -> None:
    raise ValueError(f"an out-of-band buffer at byte {m.pos}, which no file can hold")


def _readonly_buffer(m: Machine) -> None:
    m.stack[-1]


def _push(make: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def handler(m: Machine) -> None:
        m.stack.append(make(m))

    return handler


def _push_from_mark(build: Callable[[list[Any]], Any]) -> Callable[[Machine], None]:
    def handler(m: Machine) -> None:
        items = m.pop_mark()  # first: it changes which stack there is
        m.stack.append(build(items))

    return handler


_HANDLERS: dict[str, Callable[[Machine], object]] = {
    # constants and numbers
    "N": _push(lambda m: None),
    "\x88": _push(lambda m: True),
    "\x89": _push(lambda m: False),
    "I": _int,
    "L": _push(lambda m: _decimal(m.line().removesuffix(b"L"))),
    "J": _push(_int32),
    "K": _push(lambda m: m.unsigned(1)),
    "M": _push(lambda m: m.unsigned(2)),
    "\x8a": _push(lambda m: _signed(m, m.unsigned(1))),
    "\x8b": _push(lambda m: _signed(m, _int32(m))),
    "F": _push(lambda m: float(m.line())),
    "G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    # strings and bytes
    "S": _string,
    "T": _push(lambda m: _text(m.take(_int32(m)))),
    "U": _push(lambda m: _text(m.take(m.unsigned(1)))),
    "V": _push(lambda m: m.line().decode("raw-unicode-escape")),
    "X": _binunicode,
    "\x8c": _push(lambda m: _decode(m.take(m.unsigned(1)))),
    "\x8d": _push(lambda m: _decode(m.take(m.unsigned(8)))),
    "B": _push(lambda m: m.take(m.unsigned(4))),
    "C": _push(lambda m: m.take(m.unsigned(1))),
    "\x8e": _push(lambda m: m.take(m.unsigned(8))),
    "\x96": _push(lambda m: m.take(m.unsigned(8))),
    "\x97": _no_buffer,
    "\x98": _readonly_buffer,
    # containers
    "(": _mark,
    "0": _pop,
    "1": lambda m: m.pop_mark(),
    "2": lambda m: m.stack.append(m.stack[-1]),
    ")": _push(lambda m: ()),
    "t": _push_from_mark(tuple),
    "\x85": _tuple_of(1),
    "\x86": _tuple_of(2),
    "\x87": _tuple_of(3),
    "]": _push(lambda m: []),
    "l": _push_from_mark(list),
    "}": _push(lambda m: DictNode()),
    "d": _push_from_mark(lambda items: DictNode("dict", _paired(items))),
    "\x8f": _push(lambda m: SetNode([])),
    "\x91": _push_from_mark(lambda items: SetNode(items, frozen=True)),
    "a": lambda m: _extend(m, [m.stack.pop()], list, SetNode),
    "e": lambda m: _extend(m, m.pop_mark(), list, SetNode),
    "s": lambda m: _update(m, [m.stack.pop(-2), m.stack.pop()]),
    "u": lambda m: _update(m, m.pop_mark()),
    "\x90": lambda m: _extend(m, m.pop_mark(), SetNode),
    # memo
    "p": lambda m: _put(m, _decimal(m.line())),
    "q": lambda m: _put(m, m.unsigned(1)),
    "r": _long_binput,
    "\x94": lambda m: _put(m, len(m.memo)),
    "g": _push(lambda m: m.memo[_decimal(m.line())]),
    "h": _push(lambda m: m.memo[m.unsigned(1)]),
    "j": _long_binget,
    # names and calls
    "c": _push(_named),
    "\x93": _stack_global,
    "\x82": lambda m: _extension(m, 1),
    "\x83": lambda m: _extension(m, 2),
    "\x84": lambda m: _extension(m, 4),
    "R": _reduce,
    "\x81": _reduce,  # NEWOBJ: class and arguments, as REDUCE has function and arguments
    "\x92": _newobj_ex,
    "i": _inst,
    "o": _obj,
    "b": _build,
    "P": lambda m: _persistent_id(m, _decode(m.line())),
    "Q": lambda m: _persistent_id(m, m.stack.pop()),
    # framing
    "\x80": _proto,
    "\x95": _frame,
}

DISPATCH = [_HANDLERS.get(chr(code)) for code in range(256)]
"""By opcode; None for a byte that is not one."""
