"""What is in a checkpoint, from its index alone: container, state dicts, tensors, globals, verdict,
accounting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptbin.errors import CheckpointError
from ptbin.options import ConvertOptions, Limits, given
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.parts import accept_part
from ptbin.reading.search import find_state_dicts
from ptbin.reading.selected import Selected, read_and_judge, refuse_unsafe, select_from
from ptbin.reading.selection import why_chosen
from ptbin.sources.opening import find_source
from ptbin.stores import Where
from ptbin.values.state_dict import StateDict, iter_tensors
from ptbin.values.tensors import Joined, TensorRef, Tiled


def inspect(
    uri: Where,
    *,
    storage_options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    options: ConvertOptions | None = None,
) -> dict[str, Any]:
    """Describe one checkpoint without reading its weights and without running any of its code.

    Args:
        options: of a conversion; the answer says what it would take, or why it would refuse.

    Returns:
        `uri`, `container`, `size`, `selected` (path or None), `why`, `reason` and `detail` where nothing
        would be converted, `state_dicts`, `tensors` of the selected one (`made_of` where a recipe names and
        cuts them anew, `pieces` where they lie in several), `accounting` and `left_out` as a
        manifest has them, `globals`, `findings`, `verdict`.

    Raises:
        CheckpointError: the file cannot be read. StorageError: nor can the store.
    """
    options = given(options, ConvertOptions)
    if limits is not None:
        options = options.replace(limits=limits)
    place = find_source(uri, storage_options)
    with place.open() as reader, as_checkpoint_errors(reader.uri):
        checkpoint, safety = read_and_judge(reader, options)
        if options.parts:
            accept_part(checkpoint)
        findings = find_state_dicts(checkpoint, options.limits)
        selected: Selected | None = None
        refusal: CheckpointError | None = None
        # In the order in which a conversion meets them; what lies in an unsafe one is shown all the same.
        try:
            place.refuse_part(parts=options.parts)
        except CheckpointError as error:
            refusal = error
        else:
            try:
                selected = select_from(checkpoint, safety, options, findings)
            except CheckpointError as error:
                refusal = error
            try:
                refuse_unsafe(safety, options, reader.uri)
            except CheckpointError as error:
                refusal = error
        accounting = selected.accounting if selected is not None else None
        return {
            "uri": reader.uri,
            "container": checkpoint.container,
            "size": reader.size,
            "selected": selected.path if selected is not None else None,
            "why": _why(selected),
            "reason": refusal.reason if refusal is not None else None,
            "detail": str(refusal) if refusal is not None else None,
            "state_dicts": [candidate.to_json() for candidate in findings.candidates],
            "tensors": _tensors(selected),
            "accounting": accounting.to_json() if accounting is not None else None,
            "left_out": [item.to_json() for item in accounting.left_out] if accounting is not None else [],
            "globals": safety.to_json(),
            "findings": list(safety.findings),
            "verdict": safety.verdict,
            "notes": selected.notes if selected is not None else [],
            "bytes_read": reader.bytes_read,
        }


def _why(selected: Selected | None) -> str | None:
    if selected is None:
        return None
    if selected.options.selected_paths:
        return "asked for"
    chosen = next((c for c in selected.findings.candidates if c.path == selected.path), None)
    if chosen is None:
        return "made of what lies below" if selected.options.flatten else "each by itself"
    return why_chosen(chosen, selected.findings, selected.checkpoint.preferred)


def _plan_of(label: str, tensor: TensorRef, state_dict: StateDict) -> dict[str, Any]:
    """What the tensor is made of, where it is made: names in the source, and how many pieces are read."""
    found: dict[str, Any] = {}
    if label in state_dict.made_of:
        found["made_of"] = list(state_dict.made_of[label])
    place = tensor.storage.place
    if isinstance(place, (Joined, Tiled)):
        found["pieces"] = len(place.parts if isinstance(place, Joined) else place.tiles)
    return found


def _tensors(selected: Selected | None) -> list[dict[str, Any]]:
    if selected is None:
        return []
    return [
        {
            "name": label,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
            **_plan_of(label, tensor, state_dict),
        }
        for state_dict in selected.state_dicts
        for label, tensor in iter_tensors(state_dict.entries)
    ]
