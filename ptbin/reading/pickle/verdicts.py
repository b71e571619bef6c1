"""Whether a pickle is harmless, by what it names and how. Nothing is ever run, whatever the verdict.

`safe`: every global is in the table of known-good ones, whose meaning ptbin knows. `unknown`: there
are others, a model's own classes say; they stay inert. `unsafe`: a name that can only be meant to run
code or reach the system (`judged_names` has the tables), or a construction that hides from parsers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsafePickleError
from ptbin.reading.pickle.judged_names import (
    Verdict,
    is_special_attribute,
    judge_attribute,
    judge_global,
    judge_method_call,
    plain_module,
)
from ptbin.reading.pickle.machine import PickleProgram
from ptbin.values.nodes import Global, Instance

MAX_FINDINGS = 1000

# No model needs a longer chain of getattr calls.
MAX_ATTRIBUTE_STEPS = 16


_CLOUDPICKLE = ("cloudpickle.cloudpickle", "cloudpickle.cloudpickle_fast")


@dataclass(frozen=True, slots=True)
class GlobalVerdict:
    """One global that a pickle names, and what it is taken for."""

    module: str
    name: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class SafetyReport:
    """Verdict over all pickles of one checkpoint, with what led to it."""

    verdict: Verdict
    globals: tuple[GlobalVerdict, ...]
    findings: tuple[str, ...]

    def to_json(self) -> list[dict[str, str]]:
        return [{"module": g.module, "name": g.name, "verdict": g.verdict} for g in self.globals]


def _judge_call(callee: Any, args: Any) -> str | None:
    """What is wrong with a call no reducer explains; None when nothing is."""
    if isinstance(callee, Instance) and callee.class_path == "functools.partial":
        return None  # how protocol 2 writes constructors with keyword arguments (CPython, Lib/pickle.py)
    if isinstance(callee, Instance) and _is_class_by_value(callee):
        return None
    if isinstance(callee, Instance) and _is_getattr(callee.cls):
        # A nested class, or an enum inside a class: judged by its path when getattr was called for it.
        path = _attribute_path(callee.args)
        if path is None:
            return "a call of what getattr took from a value"
        return _judge_method_call(*path)
    if not isinstance(callee, Global):
        return f"a call of a value ({type(callee).__name__}) instead of a name"
    if "." in callee.name:
        return _judge_method_call(callee.module, callee.name.split("."))
    if _is_getattr(callee):
        return _judge_getattr(args)
    return None


def _judge_method_call(module: str, steps: list[str]) -> str | None:
    if judge_method_call(module, steps) == "unsafe":
        return f"a call of {module}.{'.'.join(steps)}"
    return None


def _is_getattr(callee: Any) -> bool:
    return (
        isinstance(callee, Global) and callee.name == "getattr" and plain_module(callee.module) == "builtins"
    )


def _judge_getattr(args: Any) -> str | None:
    """What is wrong with an attribute that a pickle asks for.

    Protocol 2 has no other way to name a nested class, an enum's member or a bound method (CPython,
    Lib/pickle.py, `save_global`); protocol 4 writes the same as one dotted name, and it is judged as that.
    """
    target, name = (args[0], args[1]) if isinstance(args, tuple) and len(args) >= 2 else (None, None)
    # A dunder, or a name that is computed or walks further, is not an attribute that a pickler writes.
    if not isinstance(name, str) or is_special_attribute(name):
        return "getattr of a special or computed name"
    path = _attribute_path(args)
    if path is None:
        # A bound method of an object is harmless to hold; a call of it is judged as a call of a value.
        return "a long chain of getattr calls" if _chain_length(target) > MAX_ATTRIBUTE_STEPS else None
    module, steps = path
    if judge_attribute(module, steps) == "unsafe":
        return f"getattr of {module}.{'.'.join(steps)}"
    return None


def _is_chain(target: Any) -> bool:
    return isinstance(target, Instance) and _is_getattr(target.cls)


def _chain_length(target: Any) -> int:
    length = 0
    while _is_chain(target) and isinstance(target.args, tuple) and target.args:
        if length > MAX_ATTRIBUTE_STEPS:
            break
        length += 1
        target = target.args[0]
    return length


def _attribute_path(args: Any) -> tuple[str, list[str]] | None:
    """Module and dotted name of what getattr calls on a global lead to; None for any other target."""
    steps: list[str] = []
    while isinstance(args, tuple) and len(args) >= 2 and isinstance(args[1], str):
        target, name = args[:2]
        steps.append(name)
        if len(steps) > MAX_ATTRIBUTE_STEPS:
            return None
        if isinstance(target, Global):
            return target.module, [*target.name.split("."), *reversed(steps)]
        if not _is_chain(target):
            return None
        args = target.args
    return None


def _is_class_by_value(callee: Instance) -> bool:
    """A class that cloudpickle wrote out whole, or the type of the code of its methods.

    So notebooks and scripts pickle what they define themselves, and MLflow's PyTorch flavour always does. A
    *function* that was written out and is called by the pickle itself stays what it is: code that is run.
    """
    package, _, made_by = (callee.class_path or "").rpartition(".")
    if package not in _CLOUDPICKLE:
        return False
    if made_by in ("_make_skeleton_class", "_make_skeleton_enum"):
        return True
    return made_by == "_builtin_type" and callee.args == ("CodeType",)


def judge_programs(programs: Iterable[PickleProgram]) -> SafetyReport:
    """One verdict for all pickles of a checkpoint."""
    verdicts: dict[tuple[str, str], GlobalVerdict] = {}
    findings: dict[str, None] = {}
    for program in programs:
        for module, name in program.globals:
            verdict = judge_global(module, name)
            if (module, name) not in verdicts:
                verdicts[module, name] = GlobalVerdict(module, name, verdict)
                if verdict == "unsafe":
                    findings[f"names {module}.{name}"] = None
        findings.update(dict.fromkeys(program.oddities))
        for callee, args in program.calls:
            found = _judge_call(callee, args)
            if found is not None and len(findings) < MAX_FINDINGS:
                findings[found] = None
    ordered = tuple(verdicts.values())
    if findings:
        return SafetyReport("unsafe", ordered, tuple(findings))
    overall: Verdict = "unknown" if any(g.verdict != "safe" for g in ordered) else "safe"
    return SafetyReport(overall, ordered, ())


def refuse_unsafe_fragment(error: CorruptArchiveError, uri: str) -> None:
    """Hostile pickles are often broken ones as well: what they tried until then is the better answer.

    Raises:
        UnsafePickleError: the pickle that broke is `unsafe` by what it had said.
    """
    if isinstance(error.program, PickleProgram):
        safety = judge_programs([error.program])
        if safety.verdict == "unsafe":
            raise UnsafePickleError(
                f"{uri}: the pickle is unsafe ({'; '.join(safety.findings[:5])}); nothing was run; "
                "it is damaged as well"
            ) from error
