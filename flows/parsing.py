"""From flat JSON-able values, as a command line or a deployment gives them, to one frozen options object."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptbin.errors import UsageError
from ptbin.installed import require_reader
from ptbin.options import ConvertOptions
from ptbin.restoring.options import RestoreOptions
from ptbin.stores import refuse_secret
from ptbin.values.names import is_unicode, shown_path
from ptbin.values.options import options_of

MAX_WORKERS = 256


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Bytes: a number, or one with a unit. As at Hugging Face GB is 10^9 bytes, and GiB 2^30.

    Raises:
        UsageError: anything else.
    """
    match = _SIZE.fullmatch(str(text))
    unit = _UNITS.get(match[2].upper().removesuffix("B") + "B" if match[2] else "") if match else None
    if match is None or unit is None:
        raise UsageError(f"{text!r} is not a size; examples: 500MB, 5GB, 2GiB")
    return int(float(match[1]) * unit)


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")


def parse_duration(text: str | float) -> float:
    """Seconds: a number, or one with a unit of `s`, `m`, `h`, `d`; several add up (`1h30m`).

    Raises:
        UsageError: anything else, or nothing at all.
    """
    rest = str(text).replace(" ", "")
    parts = _DURATION.findall(rest)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != rest or seconds <= 0:
        raise UsageError(f"{text!r} is not a duration; examples: 90, 45m, 6h, 1h30m")
    return seconds


def parse_share(text: str) -> float:
    """A share of 1, or the same in percent: `0.99`, `99%`.

    Raises:
        UsageError: anything else.
    """
    text = text.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UsageError(f"{text!r} is not a share, such as 0.99 or 99%")
    return share


def build_options(asked: Mapping[str, Any], **instead: Any) -> ConvertOptions:
    """The engine's options out of parameters, which may have others as well.

    `rename` is written as `OLD=NEW`, sizes with units, one path to select or several.

    Raises:
        UsageError: an unknown value, a rename without `=`, a value that is not a size, torch needed and
        missing.
    """
    values = _of_fields(ConvertOptions, {**asked, **instead})
    if values.get("verify") == "load":
        require_reader(values.get("format", "torch"))
    return ConvertOptions(**values)


def restore_options(asked: Mapping[str, Any]) -> RestoreOptions:
    """As `build_options`, for the way back."""
    return RestoreOptions(**_of_fields(RestoreOptions, asked))


def _of_fields(model: type[Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an options object, each turned from the form in which it is written."""
    values = {}
    for entry in options_of(model).values():
        if entry.name not in asked:
            continue
        value = asked[entry.name]
        if entry.kind == "pairs":
            value = _parse_renames(value)
        elif entry.kind == "size" and value is not None:
            value = parse_size(value)
        elif entry.kind == "list" or (entry.kind == "paths" and not isinstance(value, str | None)):
            value = tuple(value)
        values[entry.name] = value
    return values


def _parse_renames(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of a regular expression and its replacement, each written as `OLD=NEW`.

    Raises:
        UsageError: a rename without `=`.
    """
    pairs = []
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise UsageError(f"rename: {text!r} is not of the form OLD=NEW")
        pairs.append((old, new))
    return tuple(pairs)


def refuse_secrets(*uris: str, instead: str = "give credentials as storage options") -> None:
    """A flow's parameters are stored on Prefect's server and shown in its UI: no passwords in them.

    Raises:
        UsageError: a URI that carries a password or a signature, or that is not UTF-8.
    """
    for uri in uris:
        if not is_unicode(uri):
            raise UsageError(f"{shown_path(uri)}: the path is not UTF-8; rename the folder first")
        refuse_secret(uri, instead)


def refuse_runner_secrets(address: str | None) -> None:
    """As `refuse_secrets`, for the address of a cluster, which errors quote as well."""
    if address is not None:
        refuse_secrets(address, instead="let the cluster's own configuration authenticate")
