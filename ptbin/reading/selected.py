"""From an open source to the state dicts that an output will hold: read, judged, selected, made writable,
accounted for.

The one path that conversion, inspection and the strictest proof share, so that all mean the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ptbin.errors import AmbiguousStateDictError, CorruptArchiveError, NoStateDictError, UnsafePickleError
from ptbin.options import ConvertOptions
from ptbin.reading.accounting import Accounting, account
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.containers.source import RandomReader
from ptbin.reading.contents import role_of_leftover
from ptbin.reading.keys import drop_entries, keep_writable, rename_entries
from ptbin.reading.left_out import list_left_out
from ptbin.reading.parts import accept_part, refuse_part
from ptbin.reading.pickle.verdicts import SafetyReport, judge_programs, refuse_unsafe_fragment
from ptbin.reading.search import Findings, find_state_dicts
from ptbin.reading.selection import WAYS_OUT, select_state_dicts
from ptbin.values.state_dict import Excluded, StateDict, storages_of

SHOWN_PATHS = 10


@dataclass(slots=True)
class Selected:
    """What a source gives under some options.

    Attributes:
        state_dicts: one, or with `options.split` one or more.
        findings: what the search found.
        accounting: where every storage of the source goes.
    """

    checkpoint: Checkpoint
    safety: SafetyReport
    state_dicts: list[StateDict]
    findings: Findings
    options: ConvertOptions
    accounting: Accounting = field(init=False)

    def __post_init__(self) -> None:
        self.account()

    @property
    def state_dict(self) -> StateDict:
        """The only one. Raises AmbiguousStateDictError where there are several."""
        if len(self.state_dicts) != 1:
            raise AmbiguousStateDictError(
                f"{self.checkpoint.uri}: {len(self.state_dicts)} state dicts; choose one with --select",
                tuple(found.path for found in self.state_dicts),
            )
        return self.state_dicts[0]

    @property
    def path(self) -> str:
        """Paths of the state dicts, as the manifest's `selected` has them."""
        return ", ".join(found.path for found in self.state_dicts)

    @property
    def notes(self) -> list[str]:
        """What a reader of the manifest should know of the state dicts."""
        return [note for found in self.state_dicts for note in found.notes]

    def account(self) -> None:
        """Count every storage, anew after the state dicts were changed.

        Raises:
            AmbiguousStateDictError: something that is not taken is of no known role.
        """
        explicit = bool(self.options.selected_paths) or self.options.flatten
        outside = list_left_out(
            self.checkpoint, self.state_dicts, self.findings, explicit=bool(self.options.selected_paths)
        )
        found = account(
            self.checkpoint,
            [entry for state_dict in self.state_dicts for entry in state_dict.entries],
            [*(item for s in self.state_dicts for item in s.excluded), *outside],
        )
        if found.unaccounted:
            _refuse_unaccounted(self, found, explicit=explicit)
        self.accounting = found


def _refuse_unaccounted(selected: Selected, found: Accounting, *, explicit: bool) -> None:
    nbytes = sum(item.nbytes for item in found.unaccounted)
    listed = ", ".join(f"{item.path} ({item.nbytes} bytes)" for item in found.unaccounted[:SHOWN_PATHS])
    more = len(found.unaccounted) - SHOWN_PATHS
    listed += f" and {more} more" if more > 0 else ""
    path = selected.path
    advice = WAYS_OUT
    if explicit:
        advice = "--select PATH, without --flatten, takes one state dict knowingly"
    elif len(selected.state_dicts) == 1:
        advice = f"--select {path} takes {path!r} and leaves the rest; {WAYS_OUT}"
    raise AmbiguousStateDictError(
        f"{selected.checkpoint.uri}: {nbytes} bytes next to {path!r} have no known role: {listed}; {advice}",
        tuple(candidate.path for candidate in selected.findings.candidates),
    )


def read_selected(reader: RandomReader, options: ConvertOptions) -> Selected:
    """Index the source, judge it and take the state dicts out of it.

    Raises:
        UnsafePickleError: verdict `unsafe`, unless `options.on_unsafe` is `extract`.
        NoStateDictError, AmbiguousStateDictError: nothing to take, or no way to tell what.
        UnsupportedTensorError: something in it that cannot be kept.
        IncompleteCheckpointError: parts are missing, or copies of the selected tensors differ.
    """
    checkpoint, safety = read_and_judge(reader, options)
    refuse_unsafe(safety, options, reader.uri)
    selected = select_from(checkpoint, safety, options)
    if checkpoint.replicas:
        from ptbin.merging.replicas import refuse_unequal

        entries = [entry for state_dict in selected.state_dicts for entry in state_dict.entries]
        taken = storages_of(entries)
        refuse_unequal(reader, (group for storage, group in checkpoint.replicas if id(storage) in taken))
    return selected


def read_and_judge(reader: RandomReader, options: ConvertOptions) -> tuple[Checkpoint, SafetyReport]:
    """The source's index, and the verdict on its pickles, which is not acted upon.

    Raises:
        UnsafePickleError: it is damaged, and `unsafe` by what it had said until then.
        CheckpointError: it cannot be read.
    """
    try:
        checkpoint = read_checkpoint(reader, options.limits, options.recipe, parts=options.parts)
    except CorruptArchiveError as error:
        if options.on_unsafe == "reject":
            refuse_unsafe_fragment(error, reader.uri)
        raise
    return checkpoint, judge_programs(checkpoint.programs)


def select_from(
    checkpoint: Checkpoint, safety: SafetyReport, options: ConvertOptions, findings: Findings | None = None
) -> Selected:
    """The state dicts of a checkpoint that was read, fit for writing; errors as `read_selected`."""
    if options.parts:
        accept_part(checkpoint)
    else:
        refuse_part(checkpoint)
    if placements := checkpoint.vocabulary.placements:
        meshes = Excluded("device meshes", "index_table", "ranks that distributed tensors lay on", placements)
        checkpoint.excluded = [*(item for item in checkpoint.excluded if item.path != meshes.path), meshes]
    findings = findings or find_state_dicts(checkpoint, options.limits)
    try:
        state_dicts = select_state_dicts(checkpoint, options, findings)
    except NoStateDictError as error:
        error.leftover = role_of_leftover(checkpoint.root)
        raise
    for state_dict in state_dicts:
        drop_entries(state_dict, options, checkpoint.uri)
        keep_writable(state_dict, checkpoint.uri, checkpoint.search)
        if options.recipe is not None:
            from ptbin.reading.recipe_steps import apply_recipe

            apply_recipe(state_dict, options.recipe, checkpoint)
    selected = Selected(checkpoint, safety, state_dicts, findings, options)
    for state_dict in state_dicts:
        rename_entries(state_dict, options, checkpoint.uri)
    return selected


def refuse_unsafe(safety: SafetyReport, options: ConvertOptions, uri: str) -> None:
    """Raise UnsafePickleError where the verdict is `unsafe` and the options do not say to go on."""
    if safety.verdict == "unsafe" and options.on_unsafe == "reject":
        raise UnsafePickleError(
            f"{uri}: the pickle is unsafe ({'; '.join(safety.findings[:5])}); nothing was run; "
            "--on-unsafe extract takes the weights all the same"
        )
