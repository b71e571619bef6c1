"""The opcodes of one tensor, done in one step.

torch's pickles say each tensor by the same run of some thirty opcodes: a call of `_rebuild_tensor_v2` with a
persistent id, an offset, a size, a stride, `False` and an empty `OrderedDict`. A regular expression takes the
run's arguments out of the bytes. What follows is what the machine would do opcode by opcode: the same memo
entries are read and written in the same order, the same calls are looked up, and nothing is assumed of what
the memo holds. Any other way of writing it is left to the machine.

Source: torch/_tensor.py (`_reduce_ex_internal`), torch/serialization.py (`persistent_id`), as CPython's
pickler writes them by protocol 2.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptbin.reading.pickle.machine import Machine

_GET = rb"(h.|j.{4})"
_PUT = rb"(q.|r.{4}|)"
_INT = rb"(?:K.|M..|J.{4})"
_INTS = rb"(\)|" + _INT + rb"(?:\x85|" + _INT + rb"(?:\x86|" + _INT + rb"\x87))|\(" + _INT + rb"{4,16}t)"


def _tensor(get: bytes, put: bytes) -> bytes:
    storage = rb"\(" + get + get + rb"X(.)\0\0\0(\d+)" + put + get + rb"(" + _INT + rb")t" + put + rb"Q"
    view = rb"(" + _INT + rb")" + _INTS + put + _INTS + put
    return rb"h(.)\(" + storage + view + rb"\x89" + get + rb"\)R" + put + rb"t" + put + rb"R" + put


TENSOR_RUN = re.compile(_tensor(_GET, _PUT), re.DOTALL)
"""Begins at the BINGET of the function. TUPLE1 to TUPLE3, or MARK and TUPLE, make size and stride."""

NAMED_RUN = re.compile(rb"X(.{4})([\x20-\x7e]+)r(.{4})" + _tensor(rb"h(.)", rb"r(.{4})"), re.DOTALL)
"""A name and its tensor, as all are written once the memo has 256 entries: every PUT is a LONG_BINPUT."""

_FIXED_OPCODES = 17
"""Opcodes of a run without PUTs and without those of size and stride."""
_NAMED_OPCODES = 26
"""As above, of a run with its name, with PUTs."""
MAX_KNOWN = 4096

_UINT32 = struct.Struct("<I")
_PUTS = struct.Struct("<8I")


def run_tensor(machine: Machine, run: re.Match[bytes], left: int) -> int:
    """Do the opcodes of `run`; how many there were, 0 where they were left to the machine.

    Raises what the machine would raise, its position at the opcode to blame.
    """
    groups = run.groups()
    callee, word, kind, length, key, key_put, location, numel, id_put = groups[:9]
    offset, size, size_put, stride, stride_put, hooks, hooks_put, args_put, put = groups[9:]
    shape, shape_opcodes = _ints(size)
    steps, stride_opcodes = _ints(stride)
    puts = (key_put, id_put, size_put, stride_put, hooks_put, args_put, put)
    opcodes = _FIXED_OPCODES + shape_opcodes + stride_opcodes + 7 - puts.count(b"")
    if length[0] != len(key) or opcodes > left or machine.persistent is None:
        return 0
    memo = machine.memo
    machine.pos = run.end(9) + 1
    function = memo[callee[0]]
    head, cls = memo[_index(word)], memo[_index(kind)]
    name = key.decode("ascii")
    if key_put:
        memo[_index(key_put)] = name
    pid = (head, cls, name, memo[_index(location)], _int(numel))
    if id_put:
        memo[_index(id_put)] = pid
    storage = machine.persistent(pid)
    if size_put:
        memo[_index(size_put)] = shape
    if stride_put:
        memo[_index(stride_put)] = steps
    machine.pos = run.end()
    empty = machine.call(memo[_index(hooks)], ())
    if hooks_put:
        memo[_index(hooks_put)] = empty
    args = (storage, _int(offset), shape, steps, False, empty)
    if args_put:
        memo[_index(args_put)] = args
    made = machine.call(function, args)
    if put:
        memo[_index(put)] = made
    machine.stack.append(made)
    return opcodes


def run_named(machine: Machine, left: int) -> int:
    """Do names and tensors from the machine's position on, as far as they are written alike; opcodes done.

    Raises as `run_tensor`.
    """
    persistent = machine.persistent
    if persistent is None:
        return 0
    memo, stack, call, match = machine.memo, machine.stack, machine.call, NAMED_RUN.match
    done = 0
    while (run := match(machine.data, machine.pos)) is not None:
        groups = run.groups()
        length, name, name_put, callee, word, kind, key_length, key, key_put, location, numel = groups[:11]
        id_put, offset, size, size_put, stride, stride_put, hooks, hooks_put, args_put, put = groups[11:]
        shape, shape_opcodes = _ints(size)
        steps, stride_opcodes = _ints(stride)
        opcodes = _NAMED_OPCODES + shape_opcodes + stride_opcodes
        if key_length[0] != len(key) or _UINT32.unpack(length)[0] != len(name) or done + opcodes > left:
            break
        puts = name_put + key_put + id_put + size_put + stride_put + hooks_put + args_put + put
        to_name, to_key, to_id, to_size, to_stride, to_hooks, to_args, to_tensor = _PUTS.unpack(puts)
        machine.pos = run.end(13) + 1
        text = memo[to_name] = name.decode("ascii")
        stack.append(text)
        function, head, cls = memo[callee[0]], memo[word[0]], memo[kind[0]]
        storage_key = memo[to_key] = key.decode("ascii")
        pid = memo[to_id] = (head, cls, storage_key, memo[location[0]], _int(numel))
        storage = persistent(pid)
        memo[to_size] = shape
        memo[to_stride] = steps
        machine.pos = run.end()
        empty = memo[to_hooks] = call(memo[hooks[0]], ())
        args = memo[to_args] = (storage, _int(offset), shape, steps, False, empty)
        made = memo[to_tensor] = call(function, args)
        stack.append(made)
        done += opcodes
    return done


def _index(text: bytes) -> int:
    """Of a memo entry, behind BINGET or LONG_BINGET, BINPUT or LONG_BINPUT."""
    return text[1] if len(text) == 2 else int.from_bytes(text[1:], "little")


def _int(text: bytes) -> int:
    """The argument of BININT1, BININT2 or BININT."""
    return int.from_bytes(text[1:], "little", signed=len(text) == 5)


_known: dict[bytes, tuple[tuple[int, ...], int]] = {b")": ((), 1)}
_ARGUMENT_NBYTES = {0x4B: 1, 0x4D: 2, 0x4A: 4}


def _ints(text: bytes) -> tuple[tuple[int, ...], int]:
    """The integers of a tuple and the number of its opcodes; tensors of one shape share them."""
    found = _known.get(text)
    if found is None:
        numbers = []
        end = len(text) - 1
        position = 1 if text[:1] == b"(" else 0
        marks = position
        while position < end:
            following = position + 1 + _ARGUMENT_NBYTES[text[position]]
            numbers.append(_int(text[position:following]))
            position = following
        found = tuple(numbers), len(numbers) + 1 + marks
        if len(_known) < MAX_KNOWN:
            _known[text] = found
    return found
