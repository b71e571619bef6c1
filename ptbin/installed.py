"""Which packages are there, asked before anything is written.

ptbin's requirements are installed with it, but an environment may lack the large ones (torch, Prefect) and
still convert, inspect, load and compare. What does need one says so in one line. Nothing is imported here.
"""

from __future__ import annotations

import importlib.util

from ptbin.errors import UsageError

EXTRAS = {
    "distributed": "dask",
    "huggingface_hub": "hub",
    "mlflow": "mlflow",
    "prefect_dask": "dask",
    "prefect_ray": "ray",
    "ray": "ray",
}
"""Packages that an extra of ptbin brings, in versions that work together."""


class MissingPackageError(UsageError, ImportError):
    """A package that the call needs is not installed; nothing was written."""


def is_installed(package: str) -> bool:
    """Whether `import package` would find something; a few stat calls."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, put into sys.modules by hand
        return True


def require(package: str, purpose: str) -> None:
    """Raise MissingPackageError where `package`, which `purpose` needs, cannot be imported."""
    if not is_installed(package):
        raise MissingPackageError(missing_line(package, purpose))


def require_reader(output_format: str) -> None:
    """Raise MissingPackageError unless `--verify load` can open an output of this format."""
    require("torch", "--verify load")
    if output_format == "safetensors":
        require("safetensors", "--verify load of a .safetensors file")


def missing_line(package: str, purpose: str) -> str:
    """What is missing, for what, and how to get it."""
    wanted = f"'ptbin[{EXTRAS[package]}]'" if package in EXTRAS else package
    return f"{purpose} needs {package}, which is not installed here: python -m pip install {wanted}"
