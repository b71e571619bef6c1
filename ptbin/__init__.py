"""ptbin: PyTorch checkpoints to clean weights, without loading them and without running their code.

    import ptbin
    manifest = ptbin.convert("run1/last.ckpt", "weights/last.bin")
    issues = ptbin.verify("weights/last.bin.manifest.json")
    result = ptbin.convert_directory("checkpoints", "weights")

The engine: pure Python, no torch (but for `verify="load"`), no Prefect, no environment, no printing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ptbin.version import __version__

if TYPE_CHECKING:
    from ptbin import catalog, errors
    from ptbin.conversion import Published, commit, convert, publish, stage
    from ptbin.differences.diff import diff
    from ptbin.differences.values import Difference
    from ptbin.inspection import inspect
    from ptbin.loading import load
    from ptbin.manifests.draft import Draft
    from ptbin.options import ConvertOptions, Limits
    from ptbin.proof.verification import Issue, verify
    from ptbin.restoring.options import RestoreOptions
    from ptbin.restoring.restore import restore
    from ptbin.runs.directories import convert_directory
    from ptbin.runs.result import RunFailedError, RunResult
    from ptbin.runs.verifying import verify_directory

__all__ = [
    "ConvertOptions",
    "Difference",
    "Draft",
    "Issue",
    "Limits",
    "Published",
    "RestoreOptions",
    "RunFailedError",
    "RunResult",
    "__version__",
    "catalog",
    "commit",
    "convert",
    "convert_directory",
    "diff",
    "errors",
    "inspect",
    "load",
    "publish",
    "restore",
    "stage",
    "verify",
    "verify_directory",
]

# Resolved on first use: `import ptbin` alone costs a few milliseconds.
_HOMES = {
    "ConvertOptions": "ptbin.options",
    "Limits": "ptbin.options",
    "Draft": "ptbin.manifests.draft",
    "convert": "ptbin.conversion",
    "stage": "ptbin.conversion",
    "commit": "ptbin.conversion",
    "publish": "ptbin.conversion",
    "Published": "ptbin.conversion",
    "Difference": "ptbin.differences.values",
    "diff": "ptbin.differences.diff",
    "inspect": "ptbin.inspection",
    "load": "ptbin.loading",
    "RestoreOptions": "ptbin.restoring.options",
    "restore": "ptbin.restoring.restore",
    "RunFailedError": "ptbin.runs.result",
    "RunResult": "ptbin.runs.result",
    "convert_directory": "ptbin.runs.directories",
    "verify_directory": "ptbin.runs.verifying",
    "Issue": "ptbin.proof.verification",
    "verify": "ptbin.proof.verification",
}


def __getattr__(name: str) -> Any:
    if name in ("catalog", "errors"):
        return importlib.import_module(f"ptbin.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ptbin' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
