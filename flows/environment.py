"""The `PTBIN_...` variables that ptbin reads, and which look like one of them and are not.

Every option of the command line has one as well (`flows.cli.environment`). The deployments take some of their
values from variables of these names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

METRICS = "PTBIN_METRICS"
SERVED = "PTBIN_SERVED"
PRESIGN = "PTBIN_PRESIGN"
WORKDIR = "PTBIN_WORKDIR"
SETTINGS = (METRICS, SERVED, PRESIGN, WORKDIR)

OF_DEPLOYMENTS = (
    "PTBIN_ARRIVALS_TOKEN",
    "PTBIN_DEST",
    "PTBIN_DEST_OPTIONS",
    "PTBIN_SOURCE",
    "PTBIN_SOURCE_OPTIONS",
    "PTBIN_TEXTFILES",
)
"""Of deployments/: in prefect.yaml, the units of systemd, the Compose and Kubernetes files, the guide."""

PREFIX = "PTBIN_"
LIKENESS = 0.7
"""`FROCE`, `MAX_WORKERS` and `FORCE`, `WORKERS` are that like; what is less so is somebody's own variable."""
CLOSE_LIKENESS = 0.85
"""Where only some names are known: `METRIC` is so like `METRICS`, `METRICS_ALL`, an option, is not."""
reported_names: set[str] = set()
"""Misspelled variables that this process has reported: once each."""


def unread_line(names: Iterable[str], known: Collection[str], *, likeness: float = LIKENESS) -> str:
    """A line about the names that are almost a known one; empty where there is none.

    Each is reported once in a process.
    """
    found = sorted(
        name
        for name in names
        if name.upper().startswith(PREFIX) and name not in known and name not in reported_names
    )
    if not found:
        return ""
    from difflib import get_close_matches

    rests = {name.removeprefix(PREFIX): name for name in known}
    parts = []
    for name in found:
        near = get_close_matches(name.upper().removeprefix(PREFIX), rests, n=1, cutoff=likeness)
        if near:
            reported_names.add(name)
            parts.append(f"{name} is set, which ptbin does not read: did you mean {rests[near[0]]}?")
    return " ".join(parts)
