"""What wrappers put in front of parameter names, and the names without it. Pure."""

from __future__ import annotations

__all__ = ["wrapper_prefixes"]

# torch.compile wraps a module as `_orig_mod` wherever it stands; DataParallel and DistributedDataParallel
# wrap the whole model as `module`.
_COMPILED = "_orig_mod"
_PARALLEL = "module"


def wrapper_prefixes(names: list[str]) -> list[str]:
    """The names with `_orig_mod` taken out anywhere and `module` off the front where all carry it."""
    parts = [name.split(".") for name in names]
    while True:
        parts = [[p for p in name if p != _COMPILED] or name for name in parts]
        if not parts or not all(len(name) > 1 and name[0] == _PARALLEL for name in parts):
            return [".".join(name) for name in parts]
        parts = [name[1:] for name in parts]
