"""What a run returns to its caller: the same value from a flow and from a function without Prefect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptbin.errors import PtbinError


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to. Every field is plain data.

    Attributes:
        run_id: names the run's folder below `DEST/_ptbin/runs` and stands in the manifests that it wrote.
        kind: `convert`, `restore`, `sync`, `migrate` or `verify`.
        succeeded: whether nothing went wrong, but what is acknowledged or below `min_success`.
        message: the counts as one sentence.
        counts: how many checkpoints (of `migrate` versions, of `verify` manifests) ended in which way;
            bytes are counted here as well. The names are those of the `--json` summary.
        problems: a row for each problem, with `source`, `reason` and `detail`, new ones first.
        manifests: URIs of the manifests that it wrote.
        record: URI of the run record (run.json), `report`: of the page for people; empty where a run leaves
            none (`verify`), or where it could not be written.
        seconds: how long it took.
        interrupted: whether it was interrupted.
    """

    run_id: str
    kind: str
    succeeded: bool
    message: str
    counts: Mapping[str, int]
    problems: tuple[Mapping[str, str], ...] = ()
    manifests: tuple[str, ...] = ()
    record: str = ""
    report: str = ""
    seconds: float = 0.0
    interrupted: bool = False

    @classmethod
    def of(cls, kind: str, summary: Mapping[str, Any]) -> RunResult:
        """Out of the summary that a run leaves, with its `message` and `record` folder."""
        counts = {
            name: value for name, value in summary.items() if type(value) is int and name != "task_runs"
        }
        if isinstance(skipped := summary.get("skipped"), Mapping):
            counts["skipped"] = sum(skipped.values())
        issues = [{"source": issue["uri"], **issue} for issue in summary.get("issues", ())]
        folder = summary.get("record", "")
        return cls(
            run_id=summary.get("run_id", ""),
            kind=kind,
            succeeded=summary["succeeded"],
            message=summary["message"],
            counts=counts,
            problems=tuple(summary.get("problems", issues)),
            manifests=tuple(summary["manifests"]) if isinstance(summary.get("manifests"), list) else (),
            record=f"{folder}/run.json" if folder else "",
            report=summary.get("report", ""),
            seconds=summary["seconds"],
            interrupted=summary.get("interrupted", False),
        )


class RunFailedError(PtbinError):
    """A run over a whole store that came to its end and did not succeed; `result` says all about it."""

    reason = "run_failed"

    def __init__(self, result: RunResult) -> None:
        super().__init__(f"run {result.run_id}: {result.message}")
        self.result = result

    def __reduce__(self) -> tuple[type[RunFailedError], tuple[RunResult]]:
        return type(self), (self.result,)
