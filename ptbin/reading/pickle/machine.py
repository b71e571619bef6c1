"""The state of one pickle run: position, stack, marks, memo; and its result.

The loop that runs opcodes is `interpreter`'s, what each does is in `opcodes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import CorruptArchiveError, PtbinError
from ptbin.options import Limits
from ptbin.values.nodes import DictNode, Global, Instance

Reducer = Callable[[tuple[Any, ...]], Any]
SetState = Callable[[Any, Any], bool]


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


class Machine:
    """The state of one run: position, stack, marks, memo. What each opcode does is in `pickle_opcodes`."""

    def __init__(
        self,
        data: bytes,
        start: int,
        reducers: Mapping[tuple[str, str], Reducer],
        persistent: Callable[[Any], Any] | None,
        set_state: SetState | None,
        limits: Limits,
        where: str,
    ) -> None:
        self.data = data
        self.pos = start
        self.size = len(data)
        self.reducers = reducers
        self.persistent = persistent
        self.set_state = set_state
        self.limits = limits
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.frame_end = 0
        self.program = PickleProgram()
        self.globals_seen: dict[tuple[str, str], Global] = {}
        self._reducer_of: dict[Global, Reducer | None] = {}

    # -- reading arguments ------------------------------------------------------------------

    def require(self, nbytes: int) -> int:
        """End of the next `nbytes`, which must be there."""
        end = self.pos + nbytes
        if nbytes < 0 or end > self.size:
            raise PickleTruncatedError(
                f"{self.where}: {nbytes} bytes stated at byte {self.pos}, {self.size - self.pos} are left"
            )
        return end

    def take(self, nbytes: int) -> bytes:
        end = self.require(nbytes)
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
            if not (module.isprintable() and name.isprintable()):
                # A line break in a name would end it wherever it is written out as text.
                self.program.oddities.append(f"a global with control characters before byte {self.pos}")
            known = self.globals_seen[key] = Global(module, name, self.pos)
            self.program.globals[key] = self.pos
        return known

    def call(self, callee: Any, args: Any, kwargs: Any = None) -> Any:
        if type(callee) is Global and isinstance(args, tuple) and not kwargs:
            try:
                reducer = self._reducer_of[callee]
            except KeyError:
                reducer = self._reducer_of[callee] = self.reducers.get((callee.module, callee.name))
            if reducer is not None:
                try:
                    return reducer(args)
                except PtbinError:
                    raise
                except (ValueError, TypeError, LookupError):
                    # A builtin called with nonsense stays an inert record; a tensor must make sense.
                    if callee.module.startswith("torch"):
                        raise
            elif callee.module in ("copyreg", "copy_reg"):
                made = self._by_copyreg(callee.name, args)
                if made is not None:
                    return made
        self.program.calls.append((callee, args))
        return Instance(callee, args, kwargs)

    def _by_copyreg(self, name: str, args: tuple[Any, ...]) -> Any:
        """How protocols 0 and 1 make an object (CPython, Lib/copyreg.py); None for other arguments.

        `__newobj__(class, *args)` is NEWOBJ; `_reconstructor(class, base, state)` is NEWOBJ without
        arguments, filled from `state` where the class derives from a dict or a list.
        """
        if name == "__newobj__" and args:
            return self.call(args[0], args[1:])
        if name != "_reconstructor" or len(args) != 3 or type(args[1]) is not Global:
            return None
        cls, base, state = args
        if base.name == "object" and state is None:
            return self.call(cls, ())
        if base.name == "dict" and isinstance(state, DictNode):
            made = self.call(cls, ())
            if isinstance(made, (DictNode, Instance)):
                made.pairs.extend(state.pairs)
                return made
        if base.name == "list" and isinstance(state, list):
            made = self.call(cls, ())
            if isinstance(made, Instance):
                made.items.extend(state)
                return made
        return None
