"""Model registries behind one interface, and the migration of one into another.

    registry = open_registry("mlflow+http://127.0.0.1:5000")
    for model in registry.models(lambda name: True): ...

`values` are what registries hold, `base` is the interface, `folders`, `mlflow_registry` and `hub` keep it;
`planning` compares two of them, `contents` plans the files of one version, `transfer` moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ptbin.errors import UsageError
from ptbin.registries.base import Registration, Registry, RegistryError, VersionSite
from ptbin.registries.layouts import Layout, parse_layout
from ptbin.registries.planning import Migration, ModelPlan, Step, plan_migration, wanted_names
from ptbin.registries.values import Model, Version

__all__ = [
    "REGISTRIES",
    "Layout",
    "Migration",
    "Model",
    "ModelPlan",
    "Registration",
    "Registry",
    "RegistryError",
    "Step",
    "Version",
    "VersionSite",
    "is_registry_uri",
    "open_registry",
    "parse_layout",
    "plan_migration",
    "wanted_names",
]


Opener = Callable[[str, Mapping[str, Any] | None], Registry]


def _open_mlflow(uri: str, options: Mapping[str, Any] | None) -> Registry:
    from ptbin.registries.mlflow_registry import MlflowRegistry

    return MlflowRegistry(uri, options)


def _open_hub(uri: str, options: Mapping[str, Any] | None) -> Registry:
    from ptbin.registries.hub import HubRegistry

    return HubRegistry(uri, options)


REGISTRIES: dict[str, Opener] = {
    "mlflow+": _open_mlflow,
    "hf://": _open_hub,
}
"""How URIs begin, and who opens them: imported only then, their packages are optional. Any other URI is a
directory registry (`folders`).
"""


def is_registry_uri(uri: str) -> bool:
    """Whether the URI names a registry by itself; any other is a directory registry."""
    return uri.startswith(tuple(REGISTRIES))


def open_registry(uri: str, layout: str | None = None, options: Mapping[str, Any] | None = None) -> Registry:
    """The registry at `uri`. Asks nothing of it yet.

    Args:
        uri: `mlflow+http://HOST:PORT`, `mlflow+sqlite:///PATH.db`, `hf://OWNER`, or any storage URI.
        layout: of a directory registry, as `parse_layout` takes it; None: `mirror`.
        options: storage options.

    Raises:
        UsageError: any other URI, or a layout where there is none to choose.
    """
    if is_registry_uri(uri) and layout not in (None, "mirror"):
        raise UsageError(f"{uri}: a layout is for directory registries")
    for prefix, opener in REGISTRIES.items():
        if uri.startswith(prefix):
            return opener(uri, options)
    from ptbin.registries.folders import FolderRegistry

    return FolderRegistry(uri, parse_layout(layout or "mirror"), options)
