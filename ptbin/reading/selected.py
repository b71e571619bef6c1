"""From an open source to the state dict that an output will hold: read, judged, selected, made writable.

The one path that conversion and the strictest proof share, so that both mean the same tensors.
"""

from __future__ import annotations

from ptbin.errors import CorruptArchiveError, UnsafePickleError
from ptbin.options import ConvertOptions
from ptbin.reading.checkpoint import Checkpoint, read_checkpoint
from ptbin.reading.keys import keep_writable, rename_entries
from ptbin.reading.selection import select_state_dict
from ptbin.reading.source import RandomReader
from ptbin.reading.verdicts import SafetyReport, judge_programs, refuse_unsafe_fragment
from ptbin.state_dict import StateDict

__all__ = ["read_selected"]


def read_selected(
    reader: RandomReader, options: ConvertOptions
) -> tuple[Checkpoint, SafetyReport, StateDict]:
    """Index the source, judge it and take the state dict out of it.

    Raises:
        UnsafePickleError: verdict `unsafe`, unless `options.on_unsafe` is `extract`.
    """
    try:
        checkpoint = read_checkpoint(reader, options.limits)
    except CorruptArchiveError as error:
        if options.on_unsafe == "reject":
            refuse_unsafe_fragment(error, reader.uri)
        raise
    safety = judge_programs(checkpoint.programs)
    _refuse_unsafe(safety, options, reader.uri)
    state_dict = select_state_dict(checkpoint, options.select, options.limits)
    keep_writable(state_dict, checkpoint.uri)
    rename_entries(state_dict, options, checkpoint.uri)
    return checkpoint, safety, state_dict


def _refuse_unsafe(safety: SafetyReport, options: ConvertOptions, uri: str) -> None:
    if safety.verdict == "unsafe" and options.on_unsafe == "reject":
        raise UnsafePickleError(
            f"{uri}: the pickle {'; '.join(safety.findings[:5])}; nothing was run; "
            "--on-unsafe extract takes the weights all the same"
        )
