"""Why weights do not fit a model: a report of every key, the nearest name, the option that helps. Pure."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

SHOWN = 20
Shapes = Mapping[str, tuple[int, ...] | None]
"""Names of one side and the shapes of those that are tensors."""

_SIZE = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((\[.*?\])\)"
)
"""As `nn.Module._load_from_state_dict` words it (torch 2.13, nn/modules/module.py)."""


def allowed(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def mismatch_report(
    weights: Shapes,
    model: Shapes,
    *,
    missing: Sequence[str],
    unexpected: Sequence[str],
    errors: Sequence[str],
    conflicts: Sequence[Sequence[str]] = (),
) -> list[str]:
    """Lines; none where nothing is wrong."""
    lines: list[str] = []
    spare = [name for name in weights if name not in model]
    open_names = [name for name in model if name not in weights]
    for title, names, own, others, pool in (
        ("missing in the weights", missing, model, weights, spare),
        ("unexpected by the model", unexpected, weights, model, open_names),
    ):
        if names:
            lines.append(f"{len(names)} {title}:")
            lines += [
                f"  {name}{_shape(own.get(name))}{_nearest(name, own, others, pool)}"
                for name in names[:SHOWN]
            ]
            lines += _more(names)
    shapes = [match for error in errors if (match := _SIZE.search(error))]
    others_said = [error for error in errors if not _SIZE.search(error)]
    if shapes:
        lines.append(f"{len(shapes)} of another shape:")
        lines += [f"  {m[1]}: weights {_as_tuple(m[2])}, model {_as_tuple(m[3])}" for m in shapes[:SHOWN]]
        lines += _more(shapes)
    if others_said:
        lines.append("torch reports:")
        lines += [f"  {error}" for error in others_said[:SHOWN]] + _more(others_said)
    if conflicts:
        lines.append(f"{len(conflicts)} tied in the model, and the weights have several values:")
        lines += [f"  {', '.join(names)}" for names in conflicts[:SHOWN]] + _more(conflicts)
    if lines and (hint := _hint(list(weights), list(model))):
        lines.append(hint)
    return lines


def _more(names: Sequence[object]) -> list[str]:
    return [f"  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []


def _shape(shape: tuple[int, ...] | None) -> str:
    return f" {shape}" if shape is not None else ""


def _as_tuple(text: str) -> str:
    numbers = re.findall(r"\d+", text)
    return "(" + ", ".join(numbers) + ("," if len(numbers) == 1 else "") + ")"


def _nearest(name: str, own: Shapes, others: Shapes, pool: list[str]) -> str:
    """The most similar name on the other side, one of the same shape where there is any."""
    pool = pool or list(others)
    same = [other for other in pool if others.get(other) == own.get(name)]
    close = difflib.get_close_matches(name, same, 1, 0.4) or difflib.get_close_matches(name, pool, 1, 0.6)
    return f"  (nearest: {close[0]})" if close else ""


def _hint(weights: list[str], model: list[str]) -> str:
    """The option with which more of the names would fit; empty where none would."""
    fits = len(set(weights) & set(model))
    best, advice = fits, ""
    for prefix in _prefixes(weights):
        cut = {name.removeprefix(prefix) for name in weights}
        if (count := len(cut & set(model))) > best:
            best, advice = count, f"--strip-prefix {prefix}"
    for prefix in _prefixes(model):
        put = {prefix + name for name in weights}
        if (count := len(put & set(model))) > best:
            best, advice = count, f"--rename '^={prefix}'"
    return f"with {advice} {best} of the model's {len(model)} names fit, without it {fits}" if advice else ""


def select_hint(
    candidates: Mapping[str, Sequence[str]], weights: Sequence[str], model: Sequence[str]
) -> list[str]:
    """A line that names the state dict of the source of which more names fit; none where none would."""
    fits = len(set(weights) & set(model))
    counts = {path: len(set(names) & set(model)) for path, names in candidates.items()}
    best = max(counts, key=lambda path: counts[path], default=None)
    if best is None or counts[best] <= fits:
        return []
    return [f"with --select {best} {counts[best]} of the model's {len(model)} names fit, without it {fits}"]


def _prefixes(names: list[str]) -> list[str]:
    """What names begin with, up to a dot, longest first; a few levels deep."""
    found: dict[str, int] = {}
    for name in names:
        parts = name.split(".")[:-1][:4]
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end]) + "."
            found[prefix] = found.get(prefix, 0) + 1
    common = [prefix for prefix, count in found.items() if count * 2 >= len(names)]
    return sorted(common, key=len)
