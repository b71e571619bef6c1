"""From an open source to the state dict that an output will hold: read, judged, selected, made writable.

The one path that conversion and the strictest proof share, so that both mean the same tensors.
"""

from __future__ import annotations

from ptbin.errors import CorruptArchiveError, NoStateDictError, UnsafePickleError
from ptbin.options import ConvertOptions
from ptbin.reading.checkpoint import Checkpoint, read_checkpoint
from ptbin.reading.keys import keep_writable, rename_entries
from ptbin.reading.leftovers import role_of_leftover
from ptbin.reading.parts import refuse_part, take_part
from ptbin.reading.pickle_machine import PickleProgram
from ptbin.reading.selection import select_state_dict
from ptbin.reading.source import RandomReader
from ptbin.reading.verdicts import SafetyReport, judge_programs
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
        if isinstance(error.program, PickleProgram):
            # Hostile pickles are often broken ones as well; what they tried is the better answer.
            _refuse_unsafe(judge_programs([error.program]), options, reader.uri)
        raise
    safety = judge_programs(checkpoint.programs)
    _refuse_unsafe(safety, options, reader.uri)
    if options.parts:
        take_part(checkpoint)
    else:
        refuse_part(checkpoint)
    try:
        state_dict = select_state_dict(checkpoint, options.select, options.limits)
    except NoStateDictError as error:
        error.companion = role_of_leftover(checkpoint.root)
        raise
    keep_writable(state_dict, checkpoint.uri)
    rename_entries(state_dict, options, checkpoint.uri)
    return checkpoint, safety, state_dict


def _refuse_unsafe(safety: SafetyReport, options: ConvertOptions, uri: str) -> None:
    if safety.verdict == "unsafe" and options.on_unsafe == "reject":
        raise UnsafePickleError(
            f"{uri}: the pickle {'; '.join(safety.findings[:5])}; nothing was run; "
            "--on-unsafe extract takes the weights all the same"
        )
