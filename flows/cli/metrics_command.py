"""`ptbin metrics`: what monitoring wants to know of a destination, from its run records."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from flows.cli.help import GroupedCommand, PlaceType
from flows.cli.printing import print_json
from flows.cli.shared_options import Shared, shared_options
from ptbin.errors import StorageError
from ptbin.stores import public_uri

__all__ = ["metrics_command"]

EPILOG = """\b
Examples:
  ptbin metrics s3://models/weights
  ptbin metrics weights/ --textfile /var/lib/node_exporter/textfile/ptbin-weights.prom
  ptbin metrics weights/ --pushgateway http://gateway:9091

Gauges of the last run for each SOURCE, in OpenMetrics text that Prometheus's own format allows as well. The
file is written whole under another name and renamed; node_exporter reads only names that end in .prom.

Exit status: 0 written; 2 the call was wrong, or there is no DEST."""


@click.command("metrics", epilog=EPILOG, cls=GroupedCommand)
@click.argument("dest", type=PlaceType())
@click.option("--textfile", metavar="PATH", help="Write a file (for node_exporter) instead of printing.")
@click.option(
    "--last",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    metavar="N",
    help="Look back N runs, for other SOURCEs and the last success.",
)
@click.option("--pushgateway", metavar="URL", help="Push them to a Pushgateway instead of printing.")
@click.option("--otlp", is_flag=True, help="Send them to OpenTelemetry (OTEL_EXPORTER_OTLP_ENDPOINT).")
@shared_options
def metrics_command(
    dest: str, textfile: str | None, last: int, pushgateway: str | None, otlp: bool, **shared_values: Any
) -> int:
    """Print OpenMetrics text about the runs that wrote into DEST."""
    shared = Shared(**shared_values)
    from flows.metric_targets import Otlp, Pushgateway, Target, Textfile
    from ptbin.history.metrics import metrics_of_runs
    from ptbin.history.openmetrics import render
    from ptbin.history.records import iter_runs

    place = public_uri(dest)
    targets: list[Target] = [Textfile(textfile)] if textfile is not None else []
    if pushgateway is not None:
        targets.append(Pushgateway(pushgateway, {"dest": place}))
    if otlp:
        targets.append(Otlp())
    runs = iter_runs(dest, last=last, storage_options=shared.dest_options)
    found = metrics_of_runs(place, runs, datetime.now(UTC))
    for target in targets:
        try:
            target.send(found)
        except OSError as error:
            raise StorageError(f"metrics of {place} could not be sent: {error}") from error
    if shared.as_json:
        print_json({"dest": place, "openmetrics": render(found)})
    elif not targets:
        click.echo(render(found), nl=False)
    return 0
