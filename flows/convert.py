"""The convert flow: every checkpoint below SOURCE becomes a proven output below DEST.

List, pass over what is up to date, cut the rest into batches, write each, prove each, collect, leave a
run record, publish a table, and end in a state whose message counts. One checkpoint's fault never stops
the others. All state that a rerun needs lies in DEST (outputs and their manifests); Prefect's caching is
not used, because it would answer for outputs that are gone.

Costs on Prefect's side: at most about 400 task runs and one artifact, however many checkpoints there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.access import DEFAULT_REQUESTS, RunSettings, join_run, running
from flows.conversion import Conversion
from flows.fanout import unexamined
from flows.parameters import described
from flows.run_record import new_run_id
from flows.runners import RunnerName
from flows.selection import Selection, named_files
from flows.tally import Tally
from flows.wishes import MAX_WORKERS, build_options, parse_duration, refuse_secrets
from ptbin import catalog
from ptbin.catalog import OutputRule
from ptbin.catalog.entries import nothing_below
from ptbin.catalog.globs import root_of
from ptbin.catalog.suffixes import OUTPUT_SUFFIXES
from ptbin.errors import UsageError
from ptbin.options import FileDigest, Layout, Naming, OnUnsafe, OutputFormat, VerifyLevel
from tasks.listing import list_checkpoints, work_of

__all__ = ["convert"]


@flow(
    name="convert",
    flow_run_name="{source} to {dest}",
    # Wide enough for any `workers`; the fan-out itself never has more in flight than it was told.
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS),  # type: ignore[arg-type]
    persist_result=False,
)
@described
def convert(
    source: str,
    dest: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    copy_links: bool = False,
    format: OutputFormat = "torch",  # noqa: A002 - the name on the command line and in manifests
    layout: Layout = "mirror",
    naming: Naming = "replace",
    select: str | Sequence[str] | None = None,
    flatten: bool = False,
    split: bool = False,
    strip_prefix: str | None = None,
    rename: Sequence[str] = (),
    drop: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    tie_by_value: bool = False,
    recipe: str | None = None,
    parts: bool = False,
    on_unsafe: OnUnsafe = "reject",
    verify: VerifyLevel = "checksum",
    file_digest: FileDigest = "sha256",
    provenance: bool = False,
    force: bool = False,
    files_from: str | Sequence[str] | None = None,
    retry_failed: str | None = None,
    fail_fast: bool = False,
    runner: RunnerName = "threads",
    runner_address: str | None = None,
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | None = None,
    max_requests: Annotated[int, Field(ge=1)] = DEFAULT_REQUESTS,
    deadline: str | float | None = None,
    min_success: Annotated[float, Field(gt=0, le=1)] | None = None,
    source_options: str | None = None,
    dest_options: str | None = None,
    run_id: str | None = None,
) -> State[Any]:
    """Convert every checkpoint below `source` into `dest`.

    `source_options` and `dest_options` name where storage options lie (`block:NAME`, `env:NAME`); `rename`
    takes `OLD=NEW`. Ends Completed, or Failed where a checkpoint was rejected or failed that nobody
    acknowledged.
    """
    options = build_options(
        format=format,
        rename=rename,
        drop=drop,
        select=select,
        flatten=flatten,
        split=split,
        strip_prefix=strip_prefix,
        layout=layout,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tie_by_value=tie_by_value,
        recipe=recipe,
        parts=parts,
        on_unsafe=on_unsafe,
        verify=verify,
        file_digest=file_digest,
        provenance=provenance,
        force=force,
    )
    refuse_secrets(source, dest, *([files_from] if isinstance(files_from, str) else []))
    settings = RunSettings(
        runner,
        runner_address,
        workers,
        max_requests,
        parse_duration(deadline) if deadline is not None else None,
        source_options,
        dest_options,
    )
    with join_run(run_id or new_run_id(), source_options, dest_options) as live:
        catalog.check_call(source, dest, source_options=live.source_options, dest_options=live.dest_options)
        named = named_files(
            dest,
            root_of(source, live.source_options),
            files_from=files_from,
            retry_failed=retry_failed,
            include=include,
            dest_options=live.dest_options,
        )
        with running(live, dest, settings) as run:
            rule = OutputRule(dest, naming, OUTPUT_SUFFIXES[options.format], options.layout)
            problems = list_checkpoints(
                live.run_id,
                source,
                unexamined(rule),
                unexamined(options),
                list(include),
                list(exclude),
                named=unexamined(named),
                must_exist=retry_failed is None,
                copy_links=copy_links,
            )
            if named is None and not problems and not work_of(live).count():
                raise UsageError(nothing_below(source, work_of(live).entries))
            tally = Tally(live.run_id, source, dest, min_success=min_success)
            conversion = Conversion(run, options, tally, fail_fast)
            conversion.selection = Selection(
                tuple(include), tuple(exclude), is_listed=named is not None, copy_links=copy_links
            )
            return conversion.carry_out(problems)
