"""Ids of runs: made by ptbin, or given by the caller of a run."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime

from ptbin.errors import UsageError

OWN_FORM = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
"""What `new_run_id` makes."""


def new_run_id() -> str:
    """`<UTC time>-<id>`: sorts by time, and names the run's folder and its manifests' `run_id`.

    The id's first three digits are the fraction of the second, for runs that follow one another in it.
    """
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{now.microsecond * 4096 // 1_000_000:03x}{uuid.uuid4().hex[:5]}"


# It becomes a folder's name in DEST, and it comes from the caller of the run.
_ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_id(run_id: str) -> str:
    """The id itself.

    Raises:
        UsageError: it is not made of letters, digits, dots, dashes and underscores.
    """
    if not _ALLOWED.fullmatch(run_id):
        raise UsageError(
            f"{run_id!r} is not a run id: at most 100 letters, digits, dots, dashes and underscores, "
            "the first one a letter or digit; leave it out to get a new one"
        )
    return run_id
