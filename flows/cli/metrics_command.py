"""`ptbin metrics`: what monitoring wants to know of a destination, from its run records."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from flows.cli.command import Shared, command
from flows.cli.printing import print_json
from ptbin.errors import StorageError
from ptbin.stores import public_uri
from ptbin.values.options import Option

EPILOG = """\b
Examples:
  ptbin metrics s3://models/weights
  ptbin metrics weights/ --textfile /var/lib/node_exporter/textfile/ptbin-weights.prom
  ptbin metrics weights/ --pushgateway http://gateway:9091

Gauges of the last run for each SOURCE, in OpenMetrics text that Prometheus's own format allows as well. The
file is written whole under another name and renamed; node_exporter reads only names that end in .prom.

Exit status: 0 written; 2 the call was wrong, or there is no DEST."""


OPTIONS = (
    Option("textfile", "Write a file (for node_exporter) instead of printing.", metavar="PATH"),
    Option("last", "Look back N runs, for other SOURCEs and the last success.", 50, "count", metavar="N"),
    Option("pushgateway", "Push them to a Pushgateway instead of printing.", metavar="URL"),
    Option("otlp", "Send them to OpenTelemetry (OTEL_EXPORTER_OTLP_ENDPOINT).", False, "flag"),
)


@command("metrics", ["dest"], OPTIONS, EPILOG)
def metrics_command(dest: str, asked: dict[str, Any], shared: Shared) -> int:
    """Print OpenMetrics text about the runs that wrote into DEST."""
    from flows.metric_targets import Otlp, Pushgateway, Target, Textfile, send_in_time
    from ptbin.history.metrics import metrics_of_runs
    from ptbin.history.openmetrics import render
    from ptbin.history.records import iter_runs

    place = public_uri(dest)
    targets: list[Target] = [Textfile(asked["textfile"])] if asked["textfile"] is not None else []
    if asked["pushgateway"] is not None:
        targets.append(Pushgateway(asked["pushgateway"], {"dest": place}))
    if asked["otlp"]:
        targets.append(Otlp())
    runs = iter_runs(dest, last=asked["last"], storage_options=shared.dest_options)
    found = metrics_of_runs(place, runs, datetime.now(UTC))
    for target in targets:
        try:
            send_in_time(target, found)
        except OSError as error:
            raise StorageError(f"metrics of {place} could not be sent: {error}") from error
    if shared.as_json:
        print_json({"dest": place, "openmetrics": render(found)})
    elif not targets:
        click.echo(render(found), nl=False)
    return 0
