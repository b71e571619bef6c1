"""The report of a run: one page, made of its run record, that needs nothing but itself.

The template escapes everything; names out of checkpoints are hostile until shown otherwise. The page works
without its script, as a plain table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptbin.errors import short_detail
from ptbin.runs.report_rows import MAX_DETAILED, details_of, history_bars, previous_facts, web_address
from ptbin.runs.units import format_nbytes, format_seconds
from ptbin.values.names import visible

if TYPE_CHECKING:
    from jinja2 import Environment

KINDS = ("weights", "optimizer", "other")
LISTED_FAILURES = 20
LARGEST = 12
"""Up to this many checkpoints get a bar each."""
OUTCOMES = {
    "failed": "failed",
    "rejected": "rejected",
    "known": "known failure",
    "not_tried": "not tried",
    "converted": "converted",
    "copied": "copied",
    "up_to_date": "up to date",
    "not_a_checkpoint": "no checkpoint",
    "left_alone": "left alone",
}
"""In the order in which the page shows them."""


def render_report(record: Mapping[str, Any]) -> str:
    """The page for a run record (the content of `run.json`); pure."""
    template = _environment().get_template("report.html.j2")
    return template.render(
        record=record,
        outcomes=OUTCOMES,
        counts=_counts(record),
        facts=_facts(record),
        bars=_bars(record["checkpoints"]),
        kinds=KINDS,
        left_out=_left_out(record["checkpoints"]),
        warnings=[row for row in record["checkpoints"] if _is_warning(row)],
        rows=_rows(record["checkpoints"], record.get("dest", "")),
        failures=_failures(record["checkpoints"]),
        resolved=record.get("resolved_problems", [])[:LISTED_FAILURES],
        history=history_bars(record),
        previous=previous_facts(record),
        prefect_url=web_address(record.get("prefect_url")),
        options={
            name: value for name, value in record.get("options", {}).items() if value not in (None, [], False)
        },
    )


def _environment() -> Environment:
    # Here, because a single conversion has no report, and would wait for these imports a tenth of its time.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ptbin.runs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters["nbytes"] = format_nbytes
    environment.filters["short"] = lambda detail, path: short_detail(path, detail)
    return environment


def _counts(record: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Outcome, its words, how many; those that did not come up only where one looks for them."""
    found = {
        "failed": record["failed"],
        "rejected": record["rejected"],
        "known": record.get("known", 0),
        "not_tried": record.get("not_tried", 0),
        "converted": record["converted"],
        "copied": record.get("copied", 0),
        "up_to_date": record["up_to_date"],
        "not_a_checkpoint": record.get("not_checkpoints", 0),
        "left_alone": record.get("left_alone", 0),
    }
    always = {"converted", "up_to_date", "rejected", "failed"}
    return [(key, words, found[key]) for key, words in OUTCOMES.items() if found[key] or key in always]


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, amount, what it means."""
    seconds = record["seconds"] or 0.0
    before, after = record["source_bytes"], record["written_bytes"]
    copied = record.get("copied_bytes", 0)
    facts = [
        ("before", format_nbytes(before), "the sources of what was converted or copied"),
        ("after", format_nbytes(after), f"{after / before:.0%} of it" if before else "nothing was written"),
        ("read", format_nbytes(record["read_bytes"]), "from the stores, proof included"),
        (
            "time",
            format_seconds(seconds),
            f"{format_nbytes(before / seconds)} of sources a second" if seconds else "",
        ),
    ]
    if copied:
        facts.append(("copied in the store", format_nbytes(copied), "never came through this machine"))
    for key, words in (("deleted", "deleted"), ("backed_up", "backed up"), ("kept", "gone, and kept")):
        if record.get(key):
            facts.append((words, f"{record[key]:,}", "files of the destination"))
    return facts


def _bars(checkpoints: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where the bytes of the converted sources went: all of them together, then the largest ones."""
    converted = [row for row in checkpoints if row["outcome"] == "converted" and row["size"]]
    if not converted:
        return []
    shares = [(row, _shares(row)) for row in converted]
    total = {kind: sum(share[kind] for _, share in shares) for kind in KINDS}
    largest = sorted(shares, key=lambda pair: -pair[0]["size"])[:LARGEST]
    widest = largest[0][0]["size"]
    bars = [_bar(f"all {len(converted)}", total, 1.0)]
    if len(converted) > 1:
        bars += [_bar(row["path"], share, row["size"] / widest) for row, share in largest]
    return bars


def _left_out(checkpoints: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Bytes of tensors that were left out, by role as people read it, largest first."""
    found: Counter[str] = Counter()
    for row in checkpoints:
        found.update(row.get("left_out", {}))
    return [(role.replace("_", " "), nbytes) for role, nbytes in found.most_common() if nbytes]


def _shares(row: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by kind; they add up to the source's size."""
    left_out = row.get("left_out", {})
    weights = min(row.get("weights_bytes", 0), row["size"])
    optimizer = min(left_out.get("optimizer", 0), row["size"] - weights)
    return {"weights": weights, "optimizer": optimizer, "other": row["size"] - weights - optimizer}


def _bar(name: str, share: Mapping[str, int], width: float) -> dict[str, Any]:
    total = sum(share.values()) or 1
    parts = [
        {"kind": kind, "nbytes": share[kind], "percent": 100 * share[kind] / total}
        for kind in KINDS
        if share[kind]
    ]
    return {"name": name, "nbytes": total, "width": max(100 * width, 2), "parts": parts}


def _words(row: Mapping[str, Any]) -> str:
    words = OUTCOMES.get(row["outcome"], row["outcome"])
    if row.get("novelty") == "new":
        return f"new: {words}"
    return f"{words} since {row['since'][:10]}" if row.get("since") else words


def _is_warning(row: Mapping[str, Any]) -> bool:
    return row.get("verdict") == "unsafe" or row.get("reason") == "unsafe_pickle"


def _failures(checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page begins with: the failures that are not acknowledged, new ones first."""
    found = sorted(
        (row for row in checkpoints if row["outcome"] in {"rejected", "failed"}),
        key=lambda row: (row.get("novelty") != "new", row["path"]),
    )
    shown = [
        {
            "path": row["path"],
            "is_new": row.get("novelty") == "new",
            "since": row.get("since", "")[:10],
            "reason": row.get("reason", ""),
            "detail": short_detail(row["path"], row.get("detail", "")),
        }
        for row in found[:LISTED_FAILURES]
    ]
    new = sum(row.get("novelty") == "new" for row in found)
    return {"shown": shown, "more": len(found) - len(shown), "new": new, "count": len(found)}


def _rows(checkpoints: Sequence[Mapping[str, Any]], dest: str) -> list[dict[str, Any]]:
    """New problems first, then the others, then by path."""
    opens = len(checkpoints) <= MAX_DETAILED
    order = list(OUTCOMES)
    rows = []
    for row in checkpoints:
        written = row.get("written_bytes", sum(output["size"] for output in row.get("outputs", ())))
        rows.append(
            {
                "path": row["path"],
                "outcome": row["outcome"],
                "words": _words(row),
                "is_new": row.get("novelty") == "new",
                "size": row["size"],
                "written": written,
                "seconds": row.get("seconds", 0.0),
                "tensors": row.get("tensors", 0),
                "reason": row.get("reason", ""),
                "detail": short_detail(row["path"], row.get("detail", "")),
                "unsafe": row.get("verdict") == "unsafe",
                "details": details_of(row, dest) if opens or row.get("reason") else [],
            }
        )
    rank = {name: number for number, name in enumerate(order)}
    return sorted(
        rows,
        key=lambda row: (not row["is_new"], not row["reason"], rank.get(row["outcome"], 99), row["path"]),
    )
