"""The task of the verify flow: hold manifests against what is stored.

As in a conversion, what goes wrong with one manifest is its verdict and the batch goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

import ptbin
from ptbin.errors import PtbinError
from ptbin.options import VerifyLevel
from tasks.live import LiveRun, Ticket, enter_run
from tasks.outcomes import ManifestVerdict, one_line
from tasks.retrying import is_transient

__all__ = ["verify_manifests"]


@task(
    name="verify manifests",
    task_run_name="verify {label}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def verify_manifests(
    ticket: Ticket, label: str, manifest_uris: Sequence[str], level: VerifyLevel
) -> list[ManifestVerdict]:
    """Read back what each manifest vouches for; one verdict per manifest, in order."""
    del label
    live = enter_run(ticket)
    return [_verify(live, uri, level) for uri in manifest_uris]


def _verify(live: LiveRun, uri: str, level: VerifyLevel) -> ManifestVerdict:
    live.moved(0)
    try:
        issues = ptbin.verify(
            uri,
            level=level,
            storage_options=live.dest_options,
            source_options=live.source_options,
            progress=live.moved,
        )
    except PtbinError as error:
        issue = {"reason": error.reason, "uri": uri, "detail": one_line(str(error))}
        return ManifestVerdict(uri, (issue,), transient=is_transient(error))
    except Exception as error:  # noqa: BLE001 - a fault of ours on one manifest must not stop the others
        detail = one_line(f"{type(error).__name__}: {error}")
        return ManifestVerdict(uri, ({"reason": "internal_error", "uri": uri, "detail": detail},))
    return ManifestVerdict(uri, tuple(issue.to_json() for issue in issues))
