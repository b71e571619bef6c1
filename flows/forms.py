"""A flow's parameters, made of its options: Prefect makes a form of them and checks what is typed.

The form is flat. Choices are enumerations; sizes and durations carry the pattern that they have to match,
so that Prefect's server refuses others before it creates a run. What ptbin refuses later ends the run with
one line (`flows.run_flow`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from flows.parsing import parse_duration, parse_size
from ptbin.values.options import Option

Function = TypeVar("Function", bound=Callable[..., Any])

SOURCE = Option(
    "source", "Where the files are: a path on the worker's machine or an fsspec URL.", required=True
)
DEST = Option("dest", "Where the results go or are: a path or any fsspec URL.", required=True)
PLACES = (SOURCE, DEST)


def _text_of(value: Any) -> Any:
    """A path as text: from Python, places may be given as `pathlib.Path`."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PlaceText = Annotated[str, Field(min_length=1), BeforeValidator(_text_of)]

# For the server alone, which refuses options by value before it stores them; an error of pydantic's would
# quote them in the run's log.
Reference = Annotated[str, Field(json_schema_extra={"pattern": r"^((block|env):.+)?$"})]

_OF_THE_RUN = (
    Option("source_options", "Where SOURCE's storage options lie: block:NAME, block:KIND/NAME or env:NAME."),
    Option("dest_options", "Where DEST's storage options lie: block:NAME, block:KIND/NAME or env:NAME."),
    Option(
        "run_id",
        "Leave empty. The name of the run's folder in DEST, given by callers that watch the run.",
    ),
)

_SIZE = r"^\s*\d+(\.\d+)?\s*([KkMmGgTt]([Ii]?[Bb])?|[Bb])?\s*$"
_PAIR = r"^[^=]+="
_DURATION = r"^\s*(\d+(\.\d+)?\s*[smhd]\s*)*\d+(\.\d+)?\s*[smhd]?\s*$"


def takes(places: Sequence[Option], options: Sequence[Option]) -> Callable[[Function], Function]:
    """Give a flow's function, which takes them as keywords, the parameters that Prefect shows.

    Prefect takes descriptions from a docstring's `Args:` and from nowhere else.
    """

    def decorate(function: Function) -> Function:
        every = [*places, *options, *_OF_THE_RUN]
        parameters = [
            inspect.Parameter(
                entry.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD if entry.required else inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if entry.required else entry.default,
                annotation=PlaceText if entry in places else _annotation(entry),
            )
            for entry in every
        ]
        function.__signature__ = inspect.Signature(parameters, return_annotation=Any)  # type: ignore[attr-defined]
        lines = [f"    {entry.name}: {entry.help}" for entry in every]
        function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *lines, ""])
        return function

    return decorate


def _annotation(entry: Option) -> Any:
    made = Reference if entry.name in ("source_options", "dest_options") else _type_of(entry)
    return made | None if entry.default is None else made


def _type_of(entry: Option) -> Any:
    if entry.kind == "choice":
        return Literal[entry.choices]
    if entry.kind == "size":
        return _text(_SIZE, parse_size) | Annotated[int, Field(ge=1)]
    if entry.kind == "duration":
        return _text(_DURATION, parse_duration) | Annotated[float, Field(gt=0)]
    if entry.kind == "count":
        return Annotated[int, Field(ge=entry.least, le=entry.most)]
    if entry.kind == "share":
        return Annotated[float, Field(gt=0, le=1)]
    kinds: dict[str, Any] = {
        "flag": bool,
        "list": Sequence[str],
        "pairs": Sequence[Annotated[str, Field(pattern=_PAIR)]],
        "paths": str | Sequence[str],
        "json": dict[str, Any] | list[Any],
    }
    return kinds.get(entry.kind, str)


def _text(pattern: str, parse: Callable[[str], object]) -> Any:
    """A text that matches the pattern and can be parsed."""

    def check(text: str) -> str:
        try:
            parse(text)
        except Exception as error:
            raise ValueError(str(error)) from error
        return text

    return Annotated[str, Field(pattern=pattern), AfterValidator(check)]
