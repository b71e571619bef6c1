"""How a run ends: its record is written into DEST, and its summary says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ptbin.catalog import Problem
from ptbin.errors import StorageError
from ptbin.manifests.checksums import CHECKSUM_LIST, tensor_lines
from ptbin.options import ConvertOptions
from ptbin.runs.facts import facts_of_run
from ptbin.runs.outcomes import one_line
from ptbin.runs.record import manifests_by_tensor, record_files, record_folder
from ptbin.runs.tally import Tally
from ptbin.stores import NO_OPTIONS, Place, Sides

Do = Callable[[str, Callable[[], None]], None]
"""Has something written that has a name; a flow makes a task run of it."""


def end_run(
    tally: Tally,
    options: ConvertOptions,
    *,
    began: float,
    selection: Mapping[str, Any] | None,
    do: Do,
    sides: Sides = NO_OPTIONS,
    **prefect: str | None,
) -> dict[str, Any]:
    """Write the run record; the summary, with `message`, `record` (its folder; empty: it was not written).

    Args:
        began: when the run did, by `time.monotonic`.
        do: has the files of the record written.
        prefect: the run's id and page there (`flow_run_id`, `prefect_url`).
    """
    seconds = time.monotonic() - began
    summary = tally.summary(seconds)
    home = sides.dest_at(tally.place)
    folder = record_folder(tally.place, tally.run_id)
    files = record_files(
        tally,
        summary,
        options=options.to_json() | {"verify": options.verify},
        flow_run_id=prefect.get("flow_run_id"),
        selection=selection,
        facts=facts_of_run(tally, sides, prefect_url=prefect.get("prefect_url")),
    )
    by_tensor = [sides.dest_at(uri) for uri in manifests_by_tensor(tally.entries)]
    try:
        do("write run record", lambda: write_record_files(sides.dest_at(folder), files, home, by_tensor))
    except StorageError as error:
        # What was converted stays converted: a rerun finds it by its manifests, not by this record.
        tally.run_problems.append(Problem(folder, error.reason, one_line(f"run record: {error}")))
        summary = tally.summary(seconds)
        folder = ""
    return summary | {
        "message": tally.message(),
        "record": folder,
        "report": f"{folder}/report.html" if folder and "report.html" in files else "",
        "succeeded": tally.succeeded,
        "interrupted": tally.interrupted,
    }


def write_record_files(
    folder: Place, files: Mapping[str, bytes], dest: Place, by_tensor: Sequence[Place]
) -> None:
    """Write each file whole, in order; `run.json` comes last, so its presence means the others are there.

    `by_tensor`: manifests below `dest` of outputs without a SHA-256 of their own; the checksum list names
    their tensors'.
    """
    for name, data in files.items():
        if name == CHECKSUM_LIST and by_tensor:
            data += tensor_lines(by_tensor, dest).encode()
        (folder / name).write_bytes(data)
