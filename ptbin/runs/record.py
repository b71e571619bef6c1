"""The files that a run leaves in DEST under `_ptbin/runs/<run id>/`. Pure: values in, bytes out.

- `SHA256SUMS`: a line for each output of this run, for `sha256sum -c`. Paths are relative to DEST, so
  that DEST can be moved: `cd DEST && sha256sum -c _ptbin/runs/<run id>/SHA256SUMS`.
- `report.html`: the record as a page for people; it needs nothing but itself.
- `run.json`: the summary, the options and every checkpoint's outcome; written last.

Storage options are in none of them.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from ptbin.installed import is_installed
from ptbin.manifests.checksums import CHECKSUM_LIST, checksum_line
from ptbin.runs.outcomes import Outcome
from ptbin.runs.report import render_report
from ptbin.runs.tally import Tally

LISTS = (
    "deleted_paths", "initial", "problems", "known_problems", "resolved_problems", "versions", "manifests",
)  # fmt: skip
"""Of a summary, what grows with the number of checkpoints."""


def record_folder(dest: str, run_id: str) -> str:
    """URI of the folder with a run's record, report and SHA256SUMS."""
    return f"{dest.rstrip('/')}/_ptbin/runs/{run_id}"


def record_files(
    tally: Tally,
    summary: Mapping[str, Any],
    *,
    options: Mapping[str, Any],
    flow_run_id: str | None,
    selection: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    ended: datetime | None = None,
) -> dict[str, bytes]:
    """Name and content of each file, in the order to write them.

    `facts` are those of `ptbin.runs.facts`. In `run.json` the lists come last, however long they are:
    `ptbin.history.records` reads only what is in front of them. No checksum list
    where nothing was converted: `sha256sum -c` calls an empty one an error.
    """
    ended = ended or datetime.now(UTC)
    began = ended - timedelta(seconds=summary["seconds"])
    record = {
        "schema_version": 1,
        "kind": tally.kind,
        **{name: value for name, value in summary.items() if name not in LISTS},
        "began": began.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "ended": ended.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "message": tally.message(),
        "succeeded": tally.succeeded,
        "interrupted": tally.interrupted,
        "not_checkpoints": tally.count("not_a_checkpoint"),
        "not_tried": tally.count("not_tried"),
        "not_listed": tally.not_listed,
        "by_reason": _by_reason(tally.entries),
        "oldest_unconverted": _oldest_unconverted(tally),
        "prefect_flow_run_id": flow_run_id,
        **(facts or {}),
        "options": dict(options),
        "selection": dict(selection) if selection is not None else None,
        **{name: summary[name] for name in LISTS if name in summary},
        "checkpoints": [_entry_json(entry) for entry in _in_order(tally.entries)],
    }
    files = {}
    lines = sha256sums(tally.entries, tally.place)
    if lines or manifests_by_tensor(tally.entries):
        files[CHECKSUM_LIST] = lines.encode()
    if is_installed("jinja2"):  # without Prefect it may be missing; the record says as much
        files["report.html"] = render_report(record).encode()
    files["run.json"] = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def sha256sums(entries: Iterable[Outcome], dest: str) -> str:
    """Lines as GNU `sha256sum` writes and reads them, sorted by path."""
    root = dest.rstrip("/") + "/"
    lines = []
    for entry in entries:
        if entry.converted is None:
            continue
        folder = posixpath.dirname(entry.converted.manifest_uri.removeprefix(root))
        for output in entry.converted.outputs:
            if output.sha256 is not None:  # none where nothing was to be proven
                lines.append((posixpath.join(folder, output.path), output.sha256))  # noqa: PERF401
    return "".join(checksum_line(path, digest) for path, digest in sorted(lines))


def manifests_by_tensor(entries: Iterable[Outcome]) -> list[str]:
    """Manifests of outputs whose checksum lines are their tensors' (`manifests.checksums.tensor_lines`)."""
    return [
        entry.converted.manifest_uri
        for entry in entries
        if entry.converted is not None and any(output.by_tensor for output in entry.converted.outputs)
    ]


def _by_reason(entries: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    """How many ended in each outcome for each reason."""
    found: dict[str, Counter[str]] = {}
    for entry in entries:
        if entry.reason:
            found.setdefault(entry.kind, Counter())[entry.reason] += 1
    return {outcome: dict(sorted(reasons.items())) for outcome, reasons in sorted(found.items())}


def _oldest_unconverted(tally: Tally) -> dict[str, str] | None:
    """Of what fails, known or not: where it is, and since when it waits (`Unconverted.waits_since`)."""
    rows = [row for row in tally.ledger.found.values() if row.is_failure]
    oldest = min(rows, key=lambda row: row.waits_since, default=None)
    return {"path": oldest.path, "since": oldest.waits_since} if oldest is not None else None


def _in_order(entries: Iterable[Outcome]) -> list[Outcome]:
    return sorted(entries, key=lambda entry: entry.path)


def _entry_json(entry: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": entry.path,
        "source": entry.source,
        "size": entry.nbytes,
        "outcome": entry.kind,
    }
    if entry.seconds:
        row["seconds"] = round(entry.seconds, 3)
    if entry.reason:
        row |= {"reason": entry.reason, "detail": entry.detail}
        if entry.novelty:
            row |= {"novelty": entry.novelty, "since": entry.since}
        if entry.because:
            row["because"] = entry.because
    elif entry.kind == "left_alone" or (entry.kind == "copied" and entry.detail):
        row["detail"] = entry.detail
    if entry.converted is not None:
        row |= {
            "manifest": entry.converted.manifest_uri,
            "tensors": entry.converted.tensors,
            "read_bytes": entry.converted.read_nbytes,
            "written_bytes": entry.converted.written_nbytes,
            "copied_bytes": entry.converted.copied_nbytes,
            "weights_bytes": entry.converted.weights_nbytes,
            "left_out": entry.converted.left_out,
            "verdict": entry.converted.verdict,
            "globals": list(entry.converted.unsafe_globals),
            "outputs": [
                {"path": output.path, "size": output.size, "sha256": output.sha256}
                for output in entry.converted.outputs
            ],
        }
    return row
