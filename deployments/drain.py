"""Drain a work pool before its workers are restarted: nothing new begins, what runs is waited for.

    python deployments/drain.py ptbin-process --timeout 6h && systemctl restart ptbin-worker
    prefect work-pool resume ptbin-process

SIGTERM to a worker ends the runs in its hands (they tidy up, and the next run goes on from there); after a
drain there are none. Exit status: 0 nothing runs any more; 1 something still does; 2 there
is no such pool or server.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from flows.parsing import parse_duration
from ptbin.errors import UsageError

ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


async def drain(pool: str, seconds: float, poll_seconds: float = 2.0) -> int:
    """Pause the pool and wait; how many of its runs are still active after `seconds`.

    Nothing has to be active twice in a row: a worker that asked for work right before the pause has runs that
    it has not begun yet.
    """
    async with get_client() as client:
        await client.update_work_pool(pool, WorkPoolUpdate(is_paused=True))
        deadline = time.monotonic() + seconds
        was_empty = False
        while True:
            active = await client.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ACTIVE))
                ),
                work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
            )
            if (not active and was_empty) or time.monotonic() > deadline:
                return len(active)
            was_empty = not active
            if active:
                print(f"{len(active)} runs are active: {', '.join(run.name for run in active)}", flush=True)
            await asyncio.sleep(poll_seconds)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pool")
    parser.add_argument("--timeout", default="6h", help="how long to wait: 90, 45m, 6h")
    arguments = parser.parse_args()
    try:
        left = asyncio.run(drain(arguments.pool, parse_duration(arguments.timeout)))
    except UsageError as error:
        parser.error(str(error))
    except ObjectNotFound:
        parser.error(
            f"the server has no work pool {arguments.pool}; `prefect work-pool ls` lists those it has"
        )
    except httpx.HTTPError as error:
        parser.error(f"the Prefect server that PREFECT_API_URL names does not answer: {error}")
    except KeyboardInterrupt:
        print(f"interrupted; if {arguments.pool} was paused already, it stays so", file=sys.stderr)
        return 130
    if left:
        print(f"{left} runs of {arguments.pool} are still active; the pool stays paused", file=sys.stderr)
        return 1
    print(
        f"{arguments.pool} is paused and nothing runs; restart the workers, then: prefect work-pool resume",
        arguments.pool,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
