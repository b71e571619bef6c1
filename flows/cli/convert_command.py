"""`ptbin convert`: one checkpoint by the engine directly, or a whole store through the Prefect flow."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import click

from flows.cli.destination import one_file
from flows.cli.listing_options import RetryingCommand, holding_list, named_paths
from flows.cli.plans import print_dry_run
from flows.cli.progress import showing_progress
from flows.cli.shared_options import Shared
from flows.cli.single import plan_one, run_one, single_job
from flows.cli.summary import JSON_KEYS, conversion_lines, tell_summary, untold
from flows.cli.two_places import two_places
from flows.options import CONVERT, chosen
from flows.wishes import refuse_secrets
from ptbin.errors import UsageError

__all__ = ["convert_command"]

EPILOG = """\b
Examples:
  ptbin convert run1/last.ckpt last.bin
  ptbin convert checkpoints/ weights/ --dry-run
  ptbin convert checkpoints/ weights/ --include 'run*/last.ckpt' --workers 4
  ptbin convert s3://models/checkpoints s3://models/weights --json > summary.json
  ptbin convert ema.pt ema.bin --select ema_state_dict --strip-prefix auto
  ptbin convert runs/step-900 model.safetensors --format safetensors --dtype bfloat16
  ptbin convert checkpoints/ hub/ --layout hf --max-shard-size 5GB
  ptbin convert in.pt s3://models/in.bin --dest-options @minio.json
  ptbin convert s3://training/runs s3://models/weights --retry-failed
  ls -t checkpoints | head | ptbin convert checkpoints/ weights/ --files-from -

SOURCE and DEST are local paths or any fsspec URL. One checkpoint goes to DEST if that ends in .bin, else
into DEST. Everything else (a directory, a prefix, a quoted glob) is converted below DEST through Prefect:
on the server of PREFECT_API_URL, or on one that is started for the run. A rerun converts only what is new
or changed.

Exit status: 0 all converted or up to date; 1 some were rejected or failed;
2 the call was wrong, nothing was written; 130 interrupted."""


@two_places("convert", CONVERT, EPILOG, cls=RetryingCommand)
def convert_command(source: str, dest: str, dry_run: bool, **values: Any) -> int:
    """Convert SOURCE, one checkpoint or a whole store of them, into DEST."""
    asked = chosen(CONVERT, values)
    shared = Shared.of(values)
    asked["files_from"] = click.get_current_context().with_resource(holding_list(asked["files_from"]))
    names_one = _names_one(dest, asked, shared)
    from flows.requests import convert_request

    request = convert_request(source, dest, asked)
    from ptbin import catalog
    from ptbin.catalog.dry_run import dry_run as plan_run
    from ptbin.catalog.dry_run import preview_job
    from ptbin.catalog.plan import Plan

    sides: dict[str, Any] = {"source_options": shared.source_options, "dest_options": shared.dest_options}
    catalog.check_call(source, dest, writes=not dry_run, **sides)
    single = single_job(request, shared, names_one=names_one)
    listing = {name: asked[name] for name in ("files_from", "retry_failed")}
    if single is not None:
        if any(value is not None for value in listing.values()):
            raise UsageError(
                f"SOURCE is one file, of which --files-from and --retry-failed cannot choose: {source}"
            )
        if dry_run:
            options = request.making
            look = partial(preview_job, options=options, **sides)
            return print_dry_run(plan_one(single, request, look, shared), shared)
        import ptbin

        summary, lines = run_one(single, request, partial(ptbin.convert, options=request.making), shared)
        return tell_summary(summary, JSON_KEYS, lines, shared)
    named = named_paths(source, dest, **listing, include=asked["include"], shared=shared)
    request = replace(request, named=tuple(named) if named is not None else None)
    if dry_run:
        with closing(Plan(request, **sides)) as plan:
            return print_dry_run(plan_run(plan), shared)
    refuse_secrets(source, dest)
    from flows.cli.on_prefect import run_prepared
    from ptbin.runs.record import new_run_id

    with showing_progress(shared) as listener:
        summary = run_prepared(request, new_run_id(), shared, listener, source=source, dest=dest, **asked)
    lines = conversion_lines(untold(summary, listener.told))
    return tell_summary(summary, JSON_KEYS, lines, shared)


def _names_one(dest: str, asked: dict[str, Any], shared: Shared) -> bool:
    """Whether DEST is the name of one output; where it is, its suffix settles a format that was left open.

    Raises:
        UsageError: a suffix that convert does not write, or that contradicts `--format`.
    """
    from ptbin.catalog.suffixes import OUTPUT_SUFFIXES

    suffix = one_file(dest, tuple(dict.fromkeys(OUTPUT_SUFFIXES.values())), shared.dest_options)
    if suffix is None:
        return False
    formats = [name for name, its_suffix in OUTPUT_SUFFIXES.items() if its_suffix == suffix]
    if asked["format"] not in formats:
        origin = click.get_current_context().get_parameter_source("format")
        if origin is not None and origin.name != "DEFAULT":
            raise UsageError(
                f"DEST ends in {suffix}, which --format {asked['format']} is not called: leave --format "
                "out, or name another DEST"
            )
        asked["format"] = formats[0]
    return True
