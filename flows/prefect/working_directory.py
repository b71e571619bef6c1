"""The directory that a run of a deployment works in: a step of its `pull` section (deployments/prefect.yaml).

Paths in parameters may be relative to it. It is made where it is missing.
"""

from __future__ import annotations

import os
from pathlib import Path

from flows.environment import WORKDIR
from ptbin.errors import UsageError


def enter_working_directory(directory: str | None = None) -> dict[str, str]:
    """Make the directory and change into it, as Prefect's `set_working_directory` does, and say which it is.

    Args:
        directory: as the deployment has it; without one, `PTBIN_WORKDIR` where the run is; without that,
            the run stays in the directory that its worker gave it.

    Raises:
        UsageError: it can be neither made nor entered.
    """
    # What was deployed without the variable has its placeholder still.
    named = "" if directory is None or "{{" in directory else directory
    path = named or os.environ.get(WORKDIR) or os.getcwd()
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        os.chdir(path)
    except OSError as error:
        raise UsageError(
            f"the working directory {path} cannot be used by the worker's user ({error.strerror}): "
            "make it, or deploy with another PTBIN_WORKDIR"
        ) from error
    return {"directory": path}
