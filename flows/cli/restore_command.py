"""`ptbin restore`: weights back into a `.pt`, one by the engine, or a whole store through the flow."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from flows.cli.carrying_out import carry_out
from flows.cli.command import Shared, command, dry_run_option
from flows.cli.destination import one_file
from flows.options import RESTORE
from flows.parsing import restore_options
from ptbin.errors import UsageError

if TYPE_CHECKING:
    from ptbin.catalog import Job
    from ptbin.preparing import Preview

EPILOG = """\b
Examples:
  ptbin restore last.bin last.pt
  ptbin restore weights/model.safetensors model.pt
  ptbin restore last.bin module.pt --model nets:make_net --model-args '{"width": 64}' --model-path src
  ptbin restore hub/bert bert.pt --model transformers
  ptbin restore last.bin net.pt2 --model nets:make_net --as exported --example nets:inputs
  ptbin restore s3://models/weights s3://models/restored --dry-run

SOURCE is one set of weights (a file, an index of shards, a folder), and DEST a file that ends in .pt, .pth,
.ckpt, .th or .pt2; where DEST is a directory, everything below SOURCE is restored into it, through Prefect.
A file at DEST is replaced only where ptbin restored it before and it is unchanged (or with --force). With
--model the code that you name is imported, in a process of its own; nothing else is.

Exit status: 0 all restored; 1 some were rejected (the report says which keys do not fit) or failed;
2 the call was wrong, nothing was written; 130 interrupted."""

ONE_OUTPUT = (".pt", ".pth", ".ckpt", ".pt2", ".th")


@command("restore", ["source", "dest"], (*RESTORE, dry_run_option()), EPILOG)
def restore_command(source: str, dest: str, asked: dict[str, Any], shared: Shared) -> int:
    """Restore SOURCE, weights that were taken out of checkpoints, into DEST."""
    import ptbin
    from flows.requests import restore_request
    from ptbin.restoring.restore import preview_restore

    names_one = _names_one(dest, asked, shared)
    options = restore_options(asked)
    request = restore_request(source, dest, asked)

    def look(job: Job) -> Preview:
        places = shared.sides.source_at(job.source_uri), shared.sides.dest_at(job.dest_uri)
        return preview_restore(*places, options, standing=job.standing)

    make = partial(ptbin.restore, options=options)
    return carry_out(request, asked, shared, names_one=names_one, make=make, look=look)


def _names_one(dest: str, asked: dict[str, Any], shared: Shared) -> bool:
    """Whether DEST is the name of one file; where it is, its suffix settles what `--as` leaves open.

    Raises:
        UsageError: a suffix that restore does not write, or that contradicts `--as`.
    """
    from ptbin.writing.formats import OUTPUT_SUFFIXES

    suffix = one_file(dest, ONE_OUTPUT, shared.dest_options, elsewhere=tuple(OUTPUT_SUFFIXES.values()))
    if suffix is None:
        return False
    if suffix == ".pt2":
        if asked["model"] is None or asked["save_as"] not in {None, "exported"}:
            raise UsageError("DEST ends in .pt2, an exported program: it needs --model, and --as exported")
        asked["save_as"] = "exported"
    return True
