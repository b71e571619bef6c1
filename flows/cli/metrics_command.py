"""`ptbin metrics`: what monitoring wants to know of a destination, from its run records."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from flows.cli.printing import print_json
from flows.cli.shared_options import Shared, shared_options
from ptbin.errors import UsageError
from ptbin.stores import open_store, public_uri

__all__ = ["metrics_command"]

EPILOG = """\b
Examples:
  ptbin metrics s3://models/weights
  ptbin metrics weights/ --textfile /var/lib/node_exporter/textfile/ptbin-weights.prom

Gauges of the last run for each SOURCE, in OpenMetrics text that Prometheus's own format allows as well. The
file is written whole under another name and renamed; node_exporter reads only names that end in .prom.

\b
Exit status: 0 written; 2 the call was wrong, or there is no DEST."""


@click.command("metrics", epilog=EPILOG)
@click.argument("dest")
@click.option("--textfile", metavar="PATH", help="Write a file (for node_exporter) instead of printing.")
@click.option(
    "--last",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    metavar="N",
    help="Look back N runs, for other SOURCEs and the last success.",
)
@shared_options
def metrics_command(dest: str, textfile: str | None, last: int, **shared_values: Any) -> int:
    """Print OpenMetrics text about the runs that wrote into DEST."""
    shared = Shared(**shared_values)
    from ptbin.history.metrics import render_metrics
    from ptbin.history.records import iter_runs

    runs = iter_runs(dest, last=last, storage_options=shared.dest_options)
    text = render_metrics(public_uri(dest), runs, datetime.now(UTC))
    if textfile is not None:
        _write_whole(Path(textfile), text)
    elif shared.as_json:
        print_json({"dest": public_uri(dest), "openmetrics": text})
    else:
        click.echo(text, nl=False)
    return 0


def _write_whole(path: Path, text: str) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"--textfile {path}: there is no folder {path.parent}")
    store, place = open_store(str(path))
    store.write_bytes(place, text.encode())
