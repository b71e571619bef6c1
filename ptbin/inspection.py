"""What is in a checkpoint, from its index alone: container, state dicts, tensors, globals, verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptbin.errors import AmbiguousStateDictError, IncompleteCheckpointError, NoStateDictError
from ptbin.options import Limits
from ptbin.reading.checkpoint import Checkpoint, one_clear_error, read_checkpoint
from ptbin.reading.parts import refuse_part
from ptbin.reading.selection import Candidate, choose_candidate, find_candidates, why_chosen
from ptbin.reading.verdicts import judge_programs
from ptbin.sources import SourcePlace, find_source
from ptbin.state_dict import tensors_of

__all__ = ["inspect"]


def inspect(
    uri: str, *, storage_options: Mapping[str, Any] | None = None, limits: Limits | None = None
) -> dict[str, Any]:
    """Describe one checkpoint without reading its weights and without running any of its code.

    Returns:
        `uri`, `container`, `size`, `selected` (path or None), `why`, `reason` and `detail` where nothing is
        selected, `state_dicts`, `tensors` of the selected one, `globals`, `findings`, `verdict`.

    Raises:
        CheckpointError: the file cannot be read. StorageError: nor can the store.
    """
    limits = limits or Limits()
    place = find_source(uri, storage_options)
    with place.open() as reader, one_clear_error(reader.uri):
        checkpoint = read_checkpoint(reader, limits)
        safety = judge_programs(checkpoint.programs)
        candidates = find_candidates(checkpoint, limits)
        selected, reason, detail = _choose(place, checkpoint, candidates)
        return {
            "uri": reader.uri,
            "container": checkpoint.container,
            "size": reader.size,
            "selected": selected.path if selected is not None else None,
            "why": why_chosen(selected, candidates, checkpoint.preferred) if selected is not None else None,
            "reason": reason,
            "detail": detail,
            "state_dicts": [candidate.to_json() for candidate in candidates],
            "tensors": _tensors(selected),
            "globals": safety.to_json(),
            "findings": list(safety.findings),
            "verdict": safety.verdict,
            "bytes_read": reader.bytes_read,
        }


def _choose(
    place: SourcePlace, checkpoint: Checkpoint, candidates: list[Candidate]
) -> tuple[Candidate | None, str | None, str | None]:
    try:
        place.refuse_part()
        refuse_part(checkpoint)
        return choose_candidate(checkpoint, candidates), None, None
    except (NoStateDictError, AmbiguousStateDictError, IncompleteCheckpointError) as error:
        return None, error.reason, str(error)


def _tensors(selected: Candidate | None) -> list[dict[str, Any]]:
    if selected is None:
        return []
    return [
        {"name": label, "dtype": tensor.dtype.name, "shape": list(tensor.shape), "nbytes": tensor.nbytes}
        for name, value in selected.state_dict.entries
        for label, tensor in tensors_of(name, value)
    ]
