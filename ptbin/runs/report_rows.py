"""The rows, links and plot of the report, out of the run record. Pure.

Links are relative to the page (`DEST/_ptbin/runs/<run>/report.html`), so that they hold wherever DEST is
served or moved to; each part of a path is quoted, so that no name makes an address of another kind.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from ptbin.runs.units import format_nbytes, format_seconds

TO_DEST = "../../../"
MAX_DETAILED = 2_000
"""Rows that open: more of them would make the page too large for a phone."""
BAR_HEIGHT = 60


def details_of(row: Mapping[str, Any], dest: str) -> list[dict[str, str]]:
    """What a row opens to: name, text and, where it leads somewhere, a relative link."""
    found: list[dict[str, str]] = []

    def add(name: str, text: str, link: str = "") -> None:
        found.append({"name": name, "text": text, "link": link})

    root = dest.rstrip("/") + "/"
    manifest = row.get("manifest", "")
    if manifest.startswith(root):
        below = manifest.removeprefix(root)
        for output in row.get("outputs", ()):
            path = posixpath.join(posixpath.dirname(below), output["path"])
            add("output", f"{path} ({format_nbytes(output['size'])})", _link(path))
            if output.get("sha256"):
                add("SHA-256", output["sha256"])
        add("manifest", below, _link(below))
    if row.get("tensors"):
        add("tensors", f"{row['tensors']:,}")
    if row.get("verdict"):
        add("verdict", row["verdict"])
    if row.get("globals"):
        add("globals", ", ".join(row["globals"]))
    if "weights_bytes" in row:
        add("taken", format_nbytes(row["weights_bytes"]))
        for role, nbytes in sorted(row.get("left_out", {}).items(), key=lambda pair: -pair[1]):
            add(f"left out: {role.replace('_', ' ')}", format_nbytes(nbytes))
    if row.get("because"):
        add("acknowledged", row["because"])
    if row.get("since"):
        add("since", row["since"])
    return found


def history_bars(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs before this one and itself, oldest first, as bars: what succeeded and what failed."""
    rows = [*record.get("history", ()), {**record, "is_this": True}]
    if len(rows) < 2:
        return []
    tallies = [
        (
            int(row.get("converted", 0) + row.get("copied", 0) + row.get("up_to_date", 0)),
            int(row.get("rejected", 0) + row.get("failed", 0)),
        )
        for row in rows
    ]
    most = max(1, *(good + bad for good, bad in tallies))
    bars = []
    for row, (good, bad) in zip(rows, tallies, strict=True):
        run_id = str(row.get("run_id", ""))
        day = str(row.get("began", ""))[:16].replace("T", " ")
        # A failure among a million is still seen.
        height = {"good": BAR_HEIGHT * good / most, "bad": max(BAR_HEIGHT * bad / most, 3.0) if bad else 0.0}
        seconds = format_seconds(row.get("seconds", 0) or 0)
        bars.append(
            {
                "title": f"{day}: {good:,} in step, {bad:,} failed, {seconds}",
                "link": "" if row.get("is_this") else f"../{quote(run_id, safe='')}/report.html",
                "is_this": bool(row.get("is_this")),
                **height,
            }
        )
    return bars


def previous_facts(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run before this one, and what has changed since: counts then and now."""
    if not record.get("previous_run") or not record.get("history"):
        return None
    before = record["history"][-1]
    names = {"converted": "converted", "up_to_date": "up to date", "rejected": "rejected", "failed": "failed",
             "known": "known failures"}  # fmt: skip
    changes = [
        (words, int(before.get(name, 0)), int(record.get(name, 0)))
        for name, words in names.items()
        if before.get(name, 0) != record.get(name, 0)
    ]
    return {
        "run_id": record["previous_run"],
        "link": f"../{quote(record['previous_run'], safe='')}/report.html",
        "began": str(before.get("began", "")).replace("T", " ").removesuffix("Z"),
        "changes": changes,
    }


def web_address(text: str | None) -> str:
    """The text if it is an address of the web; nothing else becomes a link."""
    return text if text is not None and text.startswith(("http://", "https://")) else ""


def _link(path: str) -> str:
    return TO_DEST + "/".join(quote(part, safe="") for part in path.split("/"))
