"""A pickle interpreter that imports nothing and calls nothing.

Implements every opcode of protocols 0 to 5 (CPython, Lib/pickletools.py and Modules/_pickle.c) over
bytes in memory and builds the records of `nodes`. A call the pickle asks for is looked up in a table
of *reducers*, functions of ptbin that turn the arguments of known constructors (`OrderedDict`,
`torch._utils._rebuild_tensor_v2`, ...) into records; every other call stays an inert `Instance`.

Costs: one pass, a quarter of a microsecond an opcode, less where a tensor is written as torch writes it
(`tensor_runs`); memory linear in the pickle (the memo is a dict, so a large LONG_BINPUT index takes none).
Lengths are checked against the bytes left before they are used. Any structural fault is one
`CorruptArchiveError` with the byte offset.

Does not know torch, containers, or what is safe: it reports the globals and oddities it met, and
`verdicts` judges them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError, PtbinError
from ptbin.options import Limits
from ptbin.reading.pickle.machine import Machine, PickleProgram, PickleTruncatedError, Reducer, SetState
from ptbin.reading.pickle.opcodes import DISPATCH
from ptbin.reading.pickle.tensor_runs import TENSOR_RUN, run_named, run_tensor

_SHORT = {0x4B: "push", 0x68: "get", 0x71: "put"}
"""BININT1, BINGET, BINPUT: more than half of a state dict's opcodes, done in the loop to save the calls."""


def run_pickle(
    data: bytes,
    start: int = 0,
    *,
    reducers: Mapping[tuple[str, str], Reducer],
    persistent: Callable[[Any], Any] | None = None,
    set_state: SetState | None = None,
    limits: Limits | None = None,
    where: str = "pickle",
) -> PickleProgram:
    """Interpret the pickle at `start` in `data`.

    Args:
        reducers: (module, name) to a function of the call's arguments; it may raise `ValueError`,
            `TypeError` or a `PtbinError` where the arguments are not valid.
        persistent: turns a persistent id into a record; without it one is an error.
        set_state: what BUILD does to a record that a reducer made: (record, state); False where it does
            not know the record. It may raise as reducers do.
        where: the container's name for this pickle, for messages.

    Raises:
        CorruptArchiveError: truncated or contradictory stream; its `program` holds what was met until then.
        LimitExceededError: more opcodes than `limits.opcodes`.
    """
    machine = Machine(data, start, reducers, persistent, set_state, limits or Limits(), where)
    try:
        return _run(machine)
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


def _run(machine: Machine) -> PickleProgram:
    data, size, dispatch = machine.data, machine.size, DISPATCH
    budget = machine.limits.opcodes
    count = 0
    while True:
        if machine.pos >= size:
            raise PickleTruncatedError(f"{machine.where}: the pickle ends at byte {size} without STOP")
        opcode = data[machine.pos]
        machine.pos += 1
        count += 1
        if opcode == 0x2E:  # STOP
            break
        if count > budget:
            raise LimitExceededError(f"{machine.where}: more than {budget} opcodes", limit="opcodes")
        if (short := _SHORT.get(opcode)) is not None and machine.pos < size:
            argument = data[machine.pos]
            machine.pos += 1
            if short == "push":
                machine.stack.append(argument)
            elif short == "get":
                if data.startswith(b"((", machine.pos) and (run := TENSOR_RUN.match(data, machine.pos - 2)):
                    done = run_tensor(machine, run, budget - count)
                    if done:
                        count += done - 1
                        count += run_named(machine, budget - count)
                        continue
                machine.stack.append(machine.memo[argument])
            else:
                machine.memo[argument] = machine.stack[-1]
            continue
        handler = dispatch[opcode]
        if handler is None:
            raise CorruptArchiveError(
                f"{machine.where}: found byte {opcode:#04x}, expected an opcode, at byte {machine.pos - 1}"
            )
        handler(machine)
    machine.program.root = machine.stack.pop()
    machine.program.end = machine.pos
    machine.program.opcodes = count
    return machine.program
