"""The options of all flows and commands, each declared once: name, kind, default, description.

Those of the engine come from its own options objects. The flows' forms (`flows.forms`) and the command line
with its help (`flows.cli.options`) are made from these tables; a new conversion option is one field of
`ptbin.options.ConvertOptions` and shows up in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from flows.parsing import MAX_WORKERS, parse_duration
from ptbin.options import FILES, FORM, PROOF, ConvertOptions
from ptbin.restoring.options import RestoreOptions
from ptbin.values.options import Option, option, options_of

RUN = "How the run goes"
MIRROR = "The mirror"
REGISTRIES = "The registries"

LAST = "last"
"""Of `--retry-failed`: all that fails as the last run which looked at it left it."""
RunnerName = Literal["threads", "processes", "dask", "ray"]

_ENGINE = options_of(ConvertOptions)
_RESTORING = options_of(RestoreOptions)

CONTENT = tuple(entry for name, entry in _ENGINE.items() if name not in {"layout", "force"})
"""What is in an output, and how far it is proven."""

_of_mirror = partial(Option, group=MIRROR)
_of_registries = partial(Option, group=REGISTRIES)

NAMING = Option(
    "naming",
    "last.ckpt becomes last.bin, or last.ckpt.bin.",
    "replace",
    "choice",
    ("replace", "append"),
    group=FORM,
)
PLACING = (_ENGINE["layout"], NAMING)

INCLUDE = Option("include", "Only paths below SOURCE that match.", (), "list", metavar="GLOB", group=FILES)
EXCLUDE = Option("exclude", "Not those that match.", (), "list", metavar="GLOB", group=FILES)

COPY_LINKS = Option(
    "copy_links",
    "Follow symbolic links that lead out of SOURCE; else they are passed over and named.",
    False,
    "flag",
    group=FILES,
)


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a run is carried out, whatever it does."""

    fail_fast: bool = option(False, "Begin nothing new after the first problem.", group=RUN)
    workers: int | None = option(
        None,
        "Batches worked on at once: one a core (2 to 16), or as many as the cluster has threads.",
        kind="count",
        metavar="N",
        most=MAX_WORKERS,
        group=RUN,
    )
    runner: RunnerName = option(
        "threads", "What works on them: threads, processes, a Dask or a Ray cluster.", group=RUN
    )
    runner_address: str | None = option(
        None,
        "A running Dask scheduler or Ray head (tcp://HOST:8786, ray://HOST:10001).",
        metavar="ADDR",
        group=RUN,
    )
    max_requests: int = option(
        64, "Requests to S3 under way at once, of the whole run.", kind="count", metavar="N", group=RUN
    )
    deadline: float | None = option(
        None, "Stop the run after that long: 90, 45m, 6h, 1h30m.", kind="duration", group=RUN
    )
    min_success: float | None = option(
        None,
        "Succeed if that share of the checkpoints does (0.99), acknowledged failures aside.",
        kind="share",
        metavar="SHARE",
        group=RUN,
    )
    source_options: str | None = None
    dest_options: str | None = None

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> RunSettings:
        """Out of a flow's parameters, which may have others as well; a deadline becomes seconds.

        Raises:
            UsageError: a deadline that is not a duration.
        """
        found = {entry.name: asked[entry.name] for entry in fields(cls) if entry.name in asked}
        if found.get("deadline") is not None:
            found["deadline"] = parse_duration(found["deadline"])
        return cls(**found)


_RUN = options_of(RunSettings)
RUNNER = tuple(_RUN[name] for name in ("workers", "runner", "runner_address"))
JUDGING = (_RUN["min_success"],)
RUNNING = tuple(entry for entry in _RUN.values() if entry not in JUDGING)

CONVERT = (
    *(INCLUDE, EXCLUDE, COPY_LINKS),
    *CONTENT,
    *PLACING,
    _ENGINE["force"],
    Option(
        "files_from",
        "Only these paths below SOURCE: a file with one a line; on a command line - reads standard input.",
        kind="paths",
        metavar="FILE",
        group=FILES,
    ),
    Option(
        "retry_failed",
        "Only what fails now (last), or what failed in the run with this id (see `ptbin runs`).",
        metavar="[RUN]",
        group=FILES,
    ),
    *RUNNING,
    *JUDGING,
)

MIRRORING = (
    replace(EXCLUDE, help="Neither convert, copy nor delete these."),
    _of_mirror(
        "delete",
        "Delete from DEST what SOURCE no longer has; never when anything failed.",
        False,
        "flag",
    ),
    _of_mirror(
        "max_delete",
        "If more are gone than that, delete none.",
        kind="count",
        metavar="N",
        least=0,
    ),
    _of_mirror(
        "checksum",
        "Compare by content, outputs too; times and ETags are not believed.",
        False,
        "flag",
    ),
    _of_mirror("immutable", "Never change what is there; what differs is a failure.", False, "flag"),
    _of_mirror("backup_dir", "First copy there what is written over or deleted.", metavar="PLACE"),
)
"""What `sync` does beyond converting."""

SYNC = (
    replace(INCLUDE, help="Copy these files too."),
    COPY_LINKS,
    *MIRRORING,
    replace(_ENGINE["force"], help="Replace files in the way that ptbin did not make."),
    *CONTENT,
    *PLACING,
    *RUNNING,
    *JUDGING,
)

MIGRATE = (
    _of_registries(
        "layout",
        "Of DEST where it is a directory registry: mirror, hf, triton, a template such as "
        "models/{name}/v{version}, or both, hf:{name}. Of SOURCE where only that is one.",
        metavar="LAYOUT",
    ),
    _of_registries("source_layout", "Of SOURCE, likewise.", metavar="LAYOUT"),
    replace(INCLUDE, help="Only models of such names."),
    replace(EXCLUDE, help="No models of such names."),
    _of_registries(
        "versions",
        "Of each model: all, the latest one, those that have an alias.",
        "all",
        "choice",
        ("all", "latest", "aliased"),
    ),
    *CONTENT,
    *RUNNING,
)

RESTORE = (*_RESTORING.values(), INCLUDE, EXCLUDE, NAMING, *RUNNING)

STATUS = (INCLUDE, EXCLUDE, *CONTENT, *PLACING)

INSPECT = tuple(_ENGINE[name] for name in ("select", "flatten", "split", "recipe"))

VERIFY = (
    Option(
        "level",
        "Compare digests, or also open each output with torch (load).",
        "checksum",
        "choice",
        ("checksum", "load"),
        group=PROOF,
    ),
    Option(
        "public_key",
        "Also check every model.sig (OpenSSF model-signing) with this key, and that all is signed.",
        metavar="PEM",
        group=PROOF,
    ),
    *RUNNER,
)


def chosen(options: Iterable[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that belong to these options, by name; a list for each tuple."""
    found = {}
    for entry in options:
        value = values[entry.name]
        found[entry.name] = list(value) if isinstance(value, tuple) else value
    return found
