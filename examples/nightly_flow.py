"""A Prefect flow around ptbin's: convert, then verify what is new, then tell somebody what failed."""

from __future__ import annotations

import sys

from prefect import flow, task

import ptbin
from flows.convert import convert


@task
def tell(problems: list[str]) -> None:
    """Where a message would be sent."""
    for problem in problems:
        print("failed:", problem)


@flow
def nightly(source: str, dest: str) -> int:
    """How many checkpoints are new tonight; single failures are reported and do not fail the flow."""
    try:
        result = convert(source, dest)
    except ptbin.RunFailedError as error:  # the run came to its end all the same
        result = error.result
        tell([f"{problem['source']} ({problem['reason']})" for problem in result.problems])
    for manifest in result.manifests:
        assert ptbin.verify(manifest) == []
    return result.counts["converted"]


if __name__ == "__main__":
    print("new:", nightly(*sys.argv[1:]))
