"""How many files this process may open at once; with too few, Prefect's client waits for ever.

It holds connections to its server, and asks again where none can be opened, without an end and deaf to
signals. A run with 28 descriptors did not end; with 48 it did, with 16 workers on local files.
"""

from __future__ import annotations

import resource

from ptbin.errors import UsageError

LEAST_FILES = 64
WANTED_FILES = 4096
"""256 workers hold some files each, and 64 requests a connection each."""


def allow_open_files() -> None:
    """Raise the soft limit as far as the hard one and `WANTED_FILES` allow.

    Raises:
        UsageError: the hard limit is below `LEAST_FILES`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if wanted < LEAST_FILES:
        raise UsageError(
            f"this process may open {wanted} files at once, a run needs {LEAST_FILES} or more: "
            "raise the limit (ulimit -n 1024)"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
