"""The command line, `ptbin`.

Starts small: a command imports what it needs when it runs, so that `inspect` and single-file
`convert` need neither Prefect nor torch nor rich.
"""

from __future__ import annotations

from flows.cli import started  # first: its clock begins
from flows.cli.app import main

__all__ = ["main", "started"]
