"""The tasks of the verify flow: hold manifests against what is stored.

As in a conversion, what goes wrong with one manifest is its verdict and the batch goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ptbin.errors import PtbinError
from ptbin.options import VerifyLevel
from ptbin.proof.signatures import verify_signatures
from ptbin.proof.verification import verify_outputs
from ptbin.registries.verification import verify_records
from tasks.live import LiveRun, Ticket, enter_run, find_live_run
from tasks.outcomes import ManifestVerdict, one_line
from tasks.retrying import JITTER, RETRIES, RETRY_DELAYS, is_transient, worth_retrying

__all__ = ["check_records", "check_signatures", "verify_manifests"]


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
        issues, digests = verify_outputs(
            uri, level=level, storage_options=live.dest_options, progress=live.moved, note=True
        )
    except PtbinError as error:
        issue = {"reason": error.reason, "uri": uri, "detail": one_line(str(error))}
        return ManifestVerdict(uri, (issue,), transient=is_transient(error))
    except Exception as error:  # noqa: BLE001 - a fault of ours on one manifest must not stop the others
        detail = one_line(f"{type(error).__name__}: {error}")
        return ManifestVerdict(uri, ({"reason": "internal_error", "uri": uri, "detail": detail},))
    return ManifestVerdict(uri, tuple(issue.to_json() for issue in issues), digests=tuple(digests.items()))


@task(
    name="verify records",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def check_records(run_id: str, dest: str, digests: Mapping[str, tuple[str, str]]) -> list[dict[str, str]]:
    """Issues of checksum lists and registry records below `dest`."""
    live = find_live_run(run_id)
    return [issue.to_json() for issue in verify_records(dest, digests, storage_options=live.dest_options)]


@task(
    name="verify signatures",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def check_signatures(
    run_id: str, dest: str, public_key: str, manifests: Sequence[str]
) -> list[dict[str, str]]:
    """Issues of the signatures below `dest`."""
    live = find_live_run(run_id)
    found = verify_signatures(live.dest_at(dest), public_key, manifests, progress=live.moved)
    return [issue.to_json() for issue in found]
