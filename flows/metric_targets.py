"""Where metrics are sent: a text file, a Pushgateway, a collector of OpenTelemetry.

`PTBIN_METRICS` names them for runs, separated by spaces: `textfile:/var/lib/node_exporter/ptbin.prom`,
`pushgateway:http://gateway:9091`, `otlp` (the official SDK, set by its own `OTEL_EXPORTER_OTLP_*` variables).
"""

from __future__ import annotations

import base64
import http.client
import math
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from ptbin.errors import UsageError
from ptbin.history.openmetrics import Family, render
from ptbin.installed import MissingPackageError, missing_line
from ptbin.stores import place_of

PUSH_SECONDS = 10.0
ANSWER_SECONDS = 20.0
"""A target may take that long, whatever it sends meanwhile."""


class Target(Protocol):
    """Takes families, and what they were before no longer holds."""

    def send(self, found: Sequence[Family]) -> None:
        """Raises OSError where it cannot be reached."""


def send_in_time(target: Target, found: Sequence[Family]) -> None:
    """Send them, for a caller that waits: a socket's timeout holds for each byte that drips in.

    What does not end is left to a thread that ends with the process.

    Raises:
        OSError: it cannot be reached, or takes too long; PtbinError: as the target raises it.
    """
    sent = Future[None]()

    def send() -> None:
        try:
            target.send(found)
            sent.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            sent.set_exception(error)

    threading.Thread(target=send, name="ptbin-metrics", daemon=True).start()
    try:
        sent.result(ANSWER_SECONDS)
    except TimeoutError as error:
        if sent.done():
            raise
        raise OSError(f"it did not end within {ANSWER_SECONDS:.0f} s") from error


class Textfile:
    """A file that is written whole under another name and renamed."""

    def __init__(self, path: str) -> None:
        if not Path(path).parent.is_dir():
            raise UsageError(f"metrics: there is no folder {Path(path).parent} for {path}")
        self._place = place_of(path)

    def send(self, found: Sequence[Family]) -> None:
        self._place.write_bytes(render(found).encode())


class Pushgateway:
    """A group of Prometheus's Pushgateway, replaced at each push (PUT); `group` is its grouping key.

    A user and password in the address are sent as a header (basic authentication), and shown nowhere.
    """

    def __init__(self, url: str, group: Mapping[str, str]) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable or not url.isascii() or not url.isprintable() or " " in url:
            raise UsageError("metrics: a Pushgateway's address reads http://HOST:PORT, or https://HOST")
        user, found, self._shown = parts.netloc.rpartition("@")
        self._headers = {"Content-Type": "text/plain; version=0.0.4"}
        if found:
            token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        place = parts._replace(netloc=self._shown).geturl().rstrip("/")
        key = [f"{name}@base64/{_base64(value)}" for name, value in group.items()]
        self._url = "/".join([place, "metrics/job/ptbin", *key])

    def send(self, found: Sequence[Family]) -> None:
        request = urllib.request.Request(  # noqa: S310 - http, as checked
            self._url, render(found).encode(), self._headers, method="PUT"
        )
        try:
            with urllib.request.urlopen(request, timeout=PUSH_SECONDS):  # noqa: S310 - as above
                pass
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"the Pushgateway at {self._shown}: {getattr(error, 'reason', error)}") from error


class Otlp:
    """A collector of OpenTelemetry, by its SDK: gauges of the same names."""

    def __init__(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
            from opentelemetry.sdk.resources import Resource
        except ImportError as error:
            text = missing_line("opentelemetry-exporter-otlp-proto-http", "metrics to OpenTelemetry")
            raise MissingPackageError(text) from error

        class Exporter(OTLPMetricExporter):
            """Keeps what became of the last export: the SDK logs a failure and goes on."""

            last = MetricExportResult.SUCCESS

            def export(self, *arguments: Any, **options: Any) -> MetricExportResult:
                self.last = super().export(*arguments, **options)
                return self.last

        self._exporter = Exporter()
        # Sent when we say so: without an interval the reader has no thread.
        reader = PeriodicExportingMetricReader(self._exporter, export_interval_millis=math.inf)
        resource = Resource.create({"service.name": "ptbin"})
        self._provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        self._meter = self._provider.get_meter("ptbin")
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}

    def send(self, found: Sequence[Family]) -> None:
        for family in found:
            if family.full_name not in self._samples:
                self._meter.create_observable_gauge(
                    family.full_name, [self._observe(family.full_name)], description=family.help
                )
            self._samples[family.full_name] = family.samples
        flushed = self._provider.force_flush(int(PUSH_SECONDS * 1000))
        if not flushed or self._exporter.last.name != "SUCCESS":
            raise OSError("the collector did not take them")

    def _observe(self, name: str) -> Any:
        from opentelemetry.metrics import Observation

        def observe(_: Any) -> Iterable[Observation]:
            return [Observation(value, labels) for labels, value in self._samples[name]]

        return observe


def parse_targets(text: str, group: Mapping[str, str]) -> list[Target]:
    """The targets that `PTBIN_METRICS` names.

    Raises:
        UsageError: another kind, a folder that is not there, a package that is missing.
    """
    found: list[Target] = []
    for word in text.split():
        kind, _, rest = word.partition(":")
        if kind == "textfile" and rest:
            found.append(Textfile(rest))
        elif kind == "pushgateway" and rest:
            found.append(Pushgateway(rest, group))
        elif word == "otlp":
            found.append(Otlp())
        else:
            raise UsageError(
                f"PTBIN_METRICS: {kind!r} is not a target; textfile:PATH, pushgateway:URL and otlp are"
            )
    return found


def _base64(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode() or "="
