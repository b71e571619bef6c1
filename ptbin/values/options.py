"""An option: its name, type, default and description, in one place.

The engine's options objects declare theirs as fields made by `option`; flows and commands take them from
there (`options_of`), so that an option is written once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

Kind = Literal[
    "text", "flag", "choice", "list", "pairs", "paths", "count", "number", "share", "size", "duration", "day",
    "json", "recipe", "storage",
]  # fmt: skip
"""`pairs`: `OLD=NEW` each. `paths`: one, or several. `size`: bytes, or `5GB`. `duration`: seconds or `6h`.
`recipe`: a name or JSON text, on a command line also a file. `storage`: fsspec storage options.
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One option, for the engine, the flows and the command line.

    Attributes:
        default: None where leaving it out is a choice as well; `required` where it cannot be.
        metavar: how its value is written in help, `GLOB` say.
        flag: how it is called on a command line where that is not its name; several, separated by spaces.
        most: upper limit of a count.
        group: the heading in a command's help that it stands below.
    """

    name: str
    help: str
    default: Any = None
    kind: Kind = "text"
    choices: tuple[str, ...] = ()
    metavar: str = ""
    flag: str = ""
    least: int = 1
    most: int | None = None
    required: bool = False
    group: str = ""


def option(
    default: Any,
    description: str,
    *,
    kind: Kind | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    flag: str = "",
    most: int | None = None,
    group: str = "",
) -> Any:
    """A field of an options object. Its kind follows from the field's type where it is not given."""
    facts: dict[str, Any] = {"help": description, "kind": kind, "choices": choices, "metavar": metavar}
    facts |= {"flag": flag, "most": most, "group": group}
    return dataclasses.field(default=default, metadata=facts)


def same_option(model: type[Any], name: str) -> Any:
    """A field as another options object has it."""
    there = next(field for field in dataclasses.fields(model) if field.name == name)
    return dataclasses.field(default=there.default, metadata=there.metadata)


def options_of(model: type[Any]) -> dict[str, Option]:
    """The fields that `option` made, by name, in the order in which they are declared."""
    hints = get_type_hints(model)
    found = {}
    for field in dataclasses.fields(model):
        if "help" not in field.metadata:
            continue
        kind, choices = _kind_of(hints[field.name])
        facts = dict(field.metadata)
        facts["choices"] = facts["choices"] or choices
        facts["kind"] = facts["kind"] or ("choice" if facts["choices"] else kind)
        found[field.name] = Option(field.name, default=field.default, **facts)
    return found


def _kind_of(hint: Any) -> tuple[Kind, tuple[str, ...]]:
    parts = (
        [part for part in get_args(hint) if part is not type(None)] if get_origin(hint) is not Literal else []
    )
    if hint is bool:
        return "flag", ()
    if get_origin(hint) is Literal:
        return "choice", get_args(hint)
    if get_origin(hint) is tuple:
        return ("pairs" if get_origin(parts[0]) is tuple else "list"), ()
    if any(get_origin(part) is tuple for part in parts):
        return "paths", ()
    if any(get_origin(part) in {dict, list} for part in parts):
        return "json", ()
    for part in parts:
        if get_origin(part) is Literal:
            return "choice", get_args(part)
    return "text", ()
