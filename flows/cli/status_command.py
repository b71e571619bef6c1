"""`ptbin status`: what is due and what fails, without a run; no Prefect, no server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from flows.cli.command import Shared, command
from flows.cli.printing import SHOWN_ROWS, align, and_more
from flows.options import STATUS
from flows.parsing import build_options
from ptbin.stores import public_uri
from ptbin.values.options import Option

if TYPE_CHECKING:
    from ptbin.history.status import Status

KINDS = ("new", "changed", "failed", "refused", "known", "orphaned")
WORDS = {"up_to_date": "up to date", "left_alone": "left alone", "not_checkpoints": "not checkpoints"}
MEANINGS = {
    "new": "not converted yet",
    "changed": "the source, or the options, since they were converted",
    "failed": "as the last run left them; each run tries them again",
    "refused": "the listing alone refuses them",
    "known": "failures that are acknowledged",
    "orphaned": "outputs whose source is gone; `sync --delete` removes them",
}

EPILOG = """\b
Examples:
  ptbin status checkpoints/ weights/
  ptbin status s3://training/runs s3://models/weights --json | jq .counts
  ptbin status checkpoints/ weights/ --format safetensors

Lists both sides as a run does, writes nothing and reads no checkpoint. Without conversion options it takes
those of the last recorded run from SOURCE; with any of them, or with --sync, only the command line counts.

Exit status: 0 all in step; 1 something is new, changed, fails or is refused, and is not acknowledged;
2 the call was wrong."""


MIRRORS = Option("mirrors", "DEST is a mirror: other files count, too.", False, "flag", flag="--sync")


@command("status", ["source", "dest"], (*STATUS, MIRRORS), EPILOG)
def status_command(source: str, dest: str, asked: dict[str, Any], shared: Shared) -> int:
    """Show how far DEST is in step with SOURCE: what is new, changed, failed, left over."""
    options = build_options(asked)
    include, exclude = tuple(asked["include"]), tuple(asked["exclude"])
    from ptbin.catalog.request import RunRequest
    from ptbin.history.status import last_request, status_of
    from ptbin.runs.version_status import refuse_registries, version_status

    refuse_registries(source, dest)
    request = RunRequest(source, dest, options, naming=asked["naming"], include=include, exclude=exclude)
    if asked["mirrors"]:
        request = replace(request, kind="sync", include=(), copied=include)
    run, status = "", None
    if not _is_asked(asked):
        status = version_status(source, dest, shared.sides)
        if status is None and (found := last_request(source, dest, shared.sides)) is not None:
            request, run = found
    status = status or status_of(request, shared.sides, run=run)
    shared.answer(lambda: _to_json(source, dest, status), _lines(status))
    return 0 if status.is_in_step else 1


def _is_asked(names: Iterable[str]) -> bool:
    """Whether the command line names any of these options."""
    context = click.get_current_context()
    sources = (context.get_parameter_source(name) for name in names if name in context.params)
    return any(source is not None and source.name != "DEFAULT" for source in sources)


def _to_json(source: str, dest: str, status: Status) -> dict[str, Any]:
    return {
        "source": public_uri(source),
        "dest": public_uri(dest),
        "kind": status.kind,
        "as_run": status.run,
        "in_step": status.is_in_step,
        "counts": status.counts,
        "oldest_unconverted": status.oldest,
        "idle_acknowledgements": status.idle,
        **{kind: status.listed.get(kind, []) for kind in KINDS},
    }


def _lines(status: Status) -> list[str]:
    counts = [
        (WORDS.get(kind, kind), f"{count:,}", MEANINGS.get(kind, "") if count else "")
        for kind, count in status.counts.items()
        if count or kind in ("up_to_date", "new", "changed", "failed")
    ]
    lines = align(counts, right=[1], indent="")
    for kind in KINDS:
        if rows := [_row(row) for row in status.listed.get(kind, [])]:
            rows = [*rows[:SHOWN_ROWS], *and_more(status.counts[kind])]
            lines += ["", f"{kind}:", *(f"  {row}" for row in rows)]
    if status.idle:
        lines += ["", "acknowledged without effect:"]
        lines += [f"  {row['path']}, until {row['until']}: {row['why']}" for row in status.idle[:SHOWN_ROWS]]
    if status.oldest is not None:
        lines += ["", f"oldest unconverted: {status.oldest['path']}, since {_day(status.oldest['since'])}"]
    lines += ["", "all in step" if status.is_in_step else "not in step"]
    return [*lines, f"with the options of run {status.run}"] if status.run else lines


def _row(row: dict[str, str]) -> str:
    text = row["path"]
    if row.get("written"):
        text += f", written {_day(row['written'])}"
    if row.get("reason"):
        text += f": {row['reason']}"
    if row.get("since"):
        text += f" since {_day(row['since'])}"
    return text + (f" (until {row['until']}: {row['because']})" if row.get("because") else "")


def _day(moment: str) -> str:
    return moment.replace("T", " ").removesuffix(":00Z").removesuffix("Z")
