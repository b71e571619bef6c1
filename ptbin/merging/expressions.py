"""Regular expressions over names that others wrote: those that may take for ever to match are refused.

Python's `re` tries every way to match and cannot be stopped. The ways multiply where a repeated group can be
matched in more than one way, and where choices or repeats follow one another.
"""

from __future__ import annotations

import re

MAX_REPEATS = 4
"""Of characters that are not digits: with `n` letters in a name, `n ** 4 / 24` ways at most."""
MAX_CHOICES = 10
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_SET = re.compile(r"\[\^?\]?[^\]]*\]")
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")
_REPEATED = re.compile(r"[*+]|\{\d*,\d*\}|\{\d+\}")
_NUMBER = re.compile(r"(?:\\d|\[0-9\])[*+]")
_QUESTION = re.compile(r"(?<![(*+?}])\?")
_GROUP = r"\((?:\?:|\?P<\w+>)?"
_RUN = r"(?:\\[dw]|\[\^\\?\.\]|\[0-9\])[*+]"
_STEP = re.compile(rf"{_GROUP}(?:{_RUN}\\\.|\\\.{_RUN}|{_GROUP}(?P<words>\w+(?:\|\w+)*)\)\\\.)\)")
"""`([^.]+\\.)`, `(\\.\\d+)`, `((module|model)\\.)`: by the dot there is one way, however often."""


def runaway(text: str) -> str:
    """Why matching the expression may never end; empty where it is sure to."""
    without_steps = _STEP.sub(_plain_step, text)
    repeats = len(_REPEAT.findall(bare(_NUMBER.sub("x", without_steps))))
    if repeats > MAX_REPEATS:
        return f"{repeats} repeats that are not of digits, at most {MAX_REPEATS}"
    plain = bare(without_steps)
    choices = len(_QUESTION.findall(plain))
    several_ways = [False]  # for each open group
    for at, character in enumerate(plain):
        if character == "(":
            several_ways.append(False)
        elif character == ")" and len(several_ways) > 1:
            inside = several_ways.pop()
            if inside and _REPEATED.match(plain, at + 1):
                return "a repeated group with repeats or choices in it"
            several_ways[-1] |= inside
        elif character == "|" and not several_ways[-1]:
            choices += 1
            several_ways[-1] = True
        elif _REPEAT.match(plain, at) or _QUESTION.match(plain, at):
            several_ways[-1] = True
    return f"{choices} choices, at most {MAX_CHOICES}" if choices > MAX_CHOICES else ""


def bare(text: str) -> str:
    """With a letter for each escaped character and each set."""
    return _SET.sub("x", _ESCAPED.sub("x", text))


def _plain_step(found: re.Match[str]) -> str:
    words = (found["words"] or "").split("|")
    return "(x)" if len(set(words)) == len(words) else found[0]
