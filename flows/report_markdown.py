"""The essence of a run's report as Markdown, for the artifact in Prefect's UI. Pure: values in, text out.

The page itself lies in the destination; where no browser reaches that, this is what an operator sees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptbin.errors import short_detail
from ptbin.runs.outcomes import Outcome
from ptbin.runs.tally import Tally
from ptbin.runs.units import format_nbytes, format_seconds, left_out_words
from ptbin.values.names import visible

MAX_ROWS = 50


def render_markdown(tally: Tally, summary: Mapping[str, Any], uri: str, link: str | None) -> str:
    """Problems first, then amounts and places; `uri` is the page's, `link` what opens it in a browser."""
    lines = [f"**{_text(tally.message())}** in {format_seconds(summary['seconds'])}", ""]
    if link is not None:
        lines += [f"[The whole report]({link.replace(')', '%29').replace(' ', '%20')})", ""]
    lines += [
        f"From {_code(tally.source)} to {_code(tally.dest)}, run {_code(tally.run_id)}. Report: {_code(uri)}",
        "",
    ]
    lines += _table("What failed", tally.problems)
    lines += _table("Known failures", tally.known)
    if resolved := summary.get("resolved_problems"):
        lines += ["### Resolved since earlier runs", ""]
        lines += [
            f"- {_code(row['source'])}: {row['reason']}, since {row['since'][:10]}"
            for row in resolved[:MAX_ROWS]
        ]
        lines.append("")
    lines += ["| what | how much |", "|---|---|"]
    amounts = {
        "sources of what was converted": format_nbytes(summary["source_bytes"]),
        "read, proof included": format_nbytes(summary["read_bytes"]),
        "written": format_nbytes(summary["written_bytes"]),
        "copied in the store": format_nbytes(summary["copied_bytes"]) if summary.get("copied_bytes") else "",
        "left out": left_out_words(summary.get("left_out", {})),
    }
    lines += [f"| {name} | {amount} |" for name, amount in amounts.items() if amount]
    return "\n".join(lines) + "\n"


def _table(title: str, entries: Sequence[Outcome]) -> list[str]:
    if not entries:
        return []
    lines = [f"### {title}", "", "| checkpoint | since | reason | detail |", "|---|---|---|---|"]
    for entry in entries[:MAX_ROWS]:
        since = "**new**" if entry.age == "new" else entry.age
        detail = entry.because or short_detail(entry.path, entry.detail)
        lines.append(f"| {_code(entry.path)} | {since} | {_code(entry.reason)} | {_text(detail)} |")
    if len(entries) > MAX_ROWS:
        lines.append(f"| and {len(entries) - MAX_ROWS:,} more | | | |")
    return [*lines, ""]


def _code(text: str) -> str:
    """A code span that holds any text: names come out of foreign files and stores."""
    text = visible(" ".join(text.split())).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _text(text: str) -> str:
    """Plain text: nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", visible(" ".join(text.split())))
