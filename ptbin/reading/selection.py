"""The state dict to convert: chosen, named by the caller, or made of several. Pure.

One candidate (`search`) is the answer; several are an `AmbiguousStateDictError` that lists them. The caller
may name one or more (`select`: their union, names prefixed by their paths), have nested mappings flattened
into one (`flatten`), or have each by itself (`split`). What a selection does not take is listed with its role
(`left_out`), for `accounting`.
"""

from __future__ import annotations

from typing import Any

from ptbin.errors import AmbiguousStateDictError, NoStateDictError
from ptbin.options import ConvertOptions
from ptbin.reading.averages import AVERAGED, COPY_SUFFIX
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.flattening import flattened
from ptbin.reading.search import (
    MAX_SEARCH_DEPTH,
    PRIMARY_NAMES,
    Candidate,
    Findings,
    Rejected,
    as_state_dict,
    find_state_dicts,
)
from ptbin.reading.tree import iter_data, resolve
from ptbin.values.nodes import DictNode, Instance
from ptbin.values.state_dict import Excluded, StateDict, iter_tensors
from ptbin.values.tensors import SparseTensor, TensorRef

WAYS_OUT = (
    "--select PATH takes one (repeatable), --flatten makes one state dict of all, "
    "--split gives each an output of its own"
)


def select_state_dicts(
    checkpoint: Checkpoint, options: ConvertOptions, findings: Findings | None = None
) -> list[StateDict]:
    """The state dicts that the options ask for: one, unless `options.split`.

    Raises:
        NoStateDictError: nothing there, or nothing at a selected path.
        AmbiguousStateDictError: several, and no way to tell which, with the candidates.
    """
    if findings is None:
        findings = find_state_dicts(checkpoint, options.limits)
    paths = options.selected_paths
    if options.flatten:
        made = [flattened(checkpoint, path, _node_at(checkpoint, path)) for path in paths or (".",)]
    elif paths:
        made = [_named(checkpoint, path, findings) for path in paths]
    elif options.split:
        made = [c.state_dict for c in _to_split(checkpoint, findings)]
    else:
        made = [_choose_candidate(checkpoint, findings).state_dict]
    if options.split or len(made) == 1:
        return made
    return [_union(made)]


def select_state_dict(checkpoint: Checkpoint, path: str) -> StateDict:
    """The state dict at a path, whatever else there is.

    Raises:
        NoStateDictError: there is none.
    """
    found = as_state_dict(checkpoint, resolve(checkpoint.root, path), path, named_by_user=True)
    if not isinstance(found, StateDict):
        raise NoStateDictError(f"{checkpoint.uri}: no state dict at {path!r}")
    return found


def _node_at(checkpoint: Checkpoint, path: str) -> Any:
    node = resolve(checkpoint.root, path)
    if node is None:
        raise NoStateDictError(f"{checkpoint.uri}: nothing at {path!r}")
    return node


def _named(checkpoint: Checkpoint, path: str, findings: Findings) -> StateDict:
    candidates = findings.candidates
    chosen = next((c.state_dict for c in candidates if c.path == path), None)
    if chosen is None:
        found = as_state_dict(checkpoint, resolve(checkpoint.root, path), path, named_by_user=True)
        if isinstance(found, Rejected) and path == AVERAGED:
            found = _the_average(checkpoint, candidates)
        if isinstance(found, Rejected):
            raise AmbiguousStateDictError(
                f"{checkpoint.uri}: {path!r} is not a state dict by itself, {found.why}; "
                f"--select {path} --flatten joins their names by dots",
                tuple(c.path for c in candidates if c.path.startswith(f"{path}.")),
            )
        chosen = found
    if chosen is None and path == AVERAGED:
        chosen = _the_average(checkpoint, candidates)
    if chosen is None:
        offered = ", ".join(c.path for c in candidates[:20]) or "none"
        raise NoStateDictError(f"{checkpoint.uri}: no state dict at {path!r}; found: {offered}")
    whole = chosen.path.removesuffix(COPY_SUFFIX)
    if whole != chosen.path:
        raw = next(c.state_dict for c in candidates if c.path == whole)
        copied = {id(value) for _, value in chosen.entries}
        rest = [value for _, value in raw.entries if id(value) not in copied]
        chosen.excluded.append(Excluded(whole, "raw_copy", node=rest))
        chosen.nodes = raw.nodes
    return chosen


def _the_average(checkpoint: Checkpoint, candidates: list[Candidate]) -> StateDict:
    averages = [c for c in candidates if c.role == AVERAGED]
    if len(averages) == 1:
        return averages[0].state_dict
    listed = ", ".join(c.path for c in (averages or candidates)[:20])
    if averages:
        raise AmbiguousStateDictError(
            f"{checkpoint.uri}: {len(averages)} averaged copies, choose one with --select: {listed}",
            tuple(c.path for c in averages),
        )
    raise NoStateDictError(f"{checkpoint.uri}: no averaged copy; found: {listed or 'none'}")


def _to_split(checkpoint: Checkpoint, findings: Findings) -> list[Candidate]:
    """Every state dict that is no part of another one, of no trainer's state, and no second name of an
    earlier one.
    """
    main = _without_twins([c for c in findings.candidates if not c.auxiliary or c.role is not None])
    whole = {c.path for c in main}
    main = [c for c in main if c.path.removesuffix(COPY_SUFFIX) == c.path or c.path not in whole]
    main = [c for c in main if not c.path.endswith(COPY_SUFFIX)]
    if not main:
        return [_choose_candidate(checkpoint, findings)]
    return main


def _union(made: list[StateDict]) -> StateDict:
    """One state dict of several, names prefixed by their paths."""
    entries = [
        (name if part.path == "." else f"{part.path}.{name}", value)
        for part in made
        for name, value in part.entries
    ]
    excluded = [item for part in made for item in part.excluded]
    nodes = frozenset().union(*(part.nodes for part in made))
    path = ", ".join(part.path for part in made)
    return StateDict(path, "flattened", "OrderedDict", entries, None, excluded, nodes=nodes, base=".")


def why_chosen(chosen: Candidate, findings: Findings, preferred: str | None) -> str:
    """One sentence: why this one and none of the others."""
    others = [c for c in findings.candidates if c is not chosen]
    if not others:
        return "the only state dict there is"
    if chosen.path == preferred:
        return "what this container is meant to hold"
    if all(c.auxiliary for c in others):
        return "the only one that is not saved next to a model"
    return "the others are the same weights"


def _choose_candidate(checkpoint: Checkpoint, findings: Findings) -> Candidate:
    """The one candidate that is the answer.

    Raises:
        NoStateDictError, AmbiguousStateDictError: as `select_state_dicts`.
    """
    candidates = findings.candidates
    main = _without_twins([c for c in candidates if not c.auxiliary])
    preferred = next((c for c in candidates if c.path == checkpoint.preferred), None)
    if preferred is not None:
        return preferred
    if findings.rejected and not main:
        raise _all_rejected(checkpoint, findings)
    if len(main) == 1:
        return main[0]
    if main:
        listed = ", ".join(
            f"{c.path} ({c.tensors} tensors, {c.nbytes} bytes{f', {c.role}' if c.role else ''})"
            for c in main[:20]
        )
        raise AmbiguousStateDictError(
            f"{checkpoint.uri}: {len(main)} state dicts: {listed}; {WAYS_OUT}", tuple(c.path for c in main)
        )
    raise NoStateDictError(f"{checkpoint.uri}: {_why_none(checkpoint, candidates, findings)}")


def _all_rejected(checkpoint: Checkpoint, findings: Findings) -> AmbiguousStateDictError:
    first = findings.rejected[0]
    paths = tuple(c.path for c in findings.candidates)
    where = "the top" if first.path == "." else repr(first.path)
    held = ", ".join(repr(name[:100]) for name in first.tensors[:3]) or "tensors"
    held += " and others" if len(first.tensors) > 3 else ""
    select = "" if first.path == "." else f"--select {first.path} "
    alone = f"; --select {paths[0]} takes {paths[0]!r} and leaves the rest" if paths else ""
    return AmbiguousStateDictError(
        f"{checkpoint.uri}: {where} holds {held}, and {first.why}: which of it is the model? "
        f"{select}--flatten joins all names by dots, --select {first.path} takes it as torch.load gives it"
        f"{alone}",
        paths,
    )


def _why_none(checkpoint: Checkpoint, auxiliary: list[Candidate], findings: Findings) -> str:
    root = checkpoint.root
    if auxiliary:
        return "no state dict of a model; --select takes one of " + ", ".join(c.path for c in auxiliary[:10])
    if (
        isinstance(root, (list, tuple))
        and root
        and all(isinstance(v, (TensorRef, SparseTensor)) for v in root)
    ):
        return f"a list of {len(root)} tensors without names; a state dict needs a name for each"
    if isinstance(root, (TensorRef, SparseTensor)):
        return "a single tensor without a name"
    if next((data for data in iter_data(root) if isinstance(data, (bytes, bytearray))), None) is not None:
        return "it holds the bytes of another torch.save; write them to a separate file and convert that"
    if findings.too_deep and isinstance(root, DictNode):
        return (
            f"no mapping of names to tensors in the upper {MAX_SEARCH_DEPTH} levels; "
            "--flatten takes what lies deeper, names joined by dots"
        )
    what = root.class_path if isinstance(root, Instance) else getattr(root, "kind", type(root).__name__)
    if isinstance(root, DictNode) and (names := list(root.by_name())):
        what += f" of {', '.join(repr(name[:60]) for name in names[:5])}{', ...' if names[5:] else ''}"
    return f"no mapping of names to tensors, and no module, in what it holds ({what})"


def _without_twins(candidates: list[Candidate]) -> list[Candidate]:
    """Drop candidates that show the very same weights under the same names as an earlier one."""
    if len(candidates) < 2:
        return candidates
    kept: dict[tuple[Any, ...], Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: c.path not in PRIMARY_NAMES):
        key = tuple(sorted((n, t.layout_key()) for n, t in iter_tensors(candidate.state_dict.entries)))
        kept.setdefault(key, candidate)
    chosen = {id(candidate) for candidate in kept.values()}
    return [c for c in candidates if id(c) in chosen]
