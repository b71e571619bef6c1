"""The task of the verify flow: hold manifests against what is stored."""

from __future__ import annotations

from ptbin.options import VerifyLevel
from ptbin.runs.outcomes import Outcome
from ptbin.runs.verifying import verify_manifest
from tasks.batches import batch_task
from tasks.live import LiveRun

__all__ = ["verify_manifests"]


@batch_task("verify manifests")
def verify_manifests(live: LiveRun, uri: str, level: VerifyLevel) -> Outcome:
    """As `ptbin.runs.verifying.verify_manifest`."""
    return verify_manifest(live.dest_at(uri), level, live.moved)
