"""Imports of the code that `--model` names: from the folders it lies in, and only where that code asks.

A child process starts isolated: neither its working folder nor PYTHONPATH is a place to import from. Putting
the model's folder on `sys.path` would undo that, because torch imports many modules late and some only if
they are there; a `sympy.py` next to the model would run. So a finder looks into these folders for two callers
only: for ptbin, by the names that the caller gave, and for modules that came from these folders.

Pure Python and standard library; imports neither torch nor the caller's code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType, ModuleType

_MACHINERY = ("<frozen importlib", os.path.dirname(importlib.__file__) + os.sep)
"""Where the frames of an import under way come from, between the `import` and the finder."""

_real_folder = cache(os.path.realpath)


class UserCode(MetaPathFinder):
    """The folders of the caller's code, first on the search path for that code and absent for all other.

    Modules of the standard library are never taken from there.
    """

    def __init__(self, folders: Sequence[str], names: Iterable[str] = ()) -> None:
        """`names`: top-level modules that any importer finds, because the caller named them."""
        self.folders: list[str] = []
        self.names = set(names)
        self._roots: tuple[str, ...] = ()
        for folder in folders:
            self.add_folder(folder)

    def add_folder(self, folder: str) -> None:
        """Search this one after the others."""
        self.folders.append(folder)
        self._roots += (os.path.join(os.path.realpath(folder), ""),)

    def is_found(self, name: str) -> bool:
        """Whether a module of that name would be found by now: here, or among what is installed."""
        top = name.partition(".")[0]
        return bool(PathFinder.find_spec(top, self.folders)) or importlib.util.find_spec(top) is not None

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder` has it; submodules are found by their own packages."""
        del target
        if path is not None or fullname in sys.stdlib_module_names:
            return None
        if fullname in self.names or self._is_asked_from_inside(sys._getframe(1)):  # noqa: SLF001 - see below
            return PathFinder.find_spec(fullname, self.folders)
        return None

    def load(self, name: str) -> ModuleType:
        """Import a module that the caller named.

        Raises:
            ImportError: it is not there, or what it imports is not.
        """
        self.names.add(name.partition(".")[0])
        return importlib.import_module(name)

    def loaded(self) -> list[str]:
        """Top-level modules that came from the folders until now."""
        tops = {name.partition(".")[0] for name, module in list(sys.modules.items()) if self._is_ours(module)}
        return sorted(tops)

    def _is_ours(self, module: ModuleType | None) -> bool:
        file = getattr(module, "__file__", None)
        return isinstance(file, str) and self._is_inside(file)

    def _is_asked_from_inside(self, frame: FrameType | None) -> bool:
        # The import system does not say who imports; the nearest frame outside of it does.
        while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
            frame = frame.f_back
        return frame is not None and self._is_inside(frame.f_code.co_filename)

    def _is_inside(self, file: str) -> bool:
        # Asked for each module of torch and transformers: thousands of files in few folders.
        if os.path.islink(file):
            return os.path.realpath(file).startswith(self._roots)
        return os.path.join(_real_folder(os.path.dirname(file)), "").startswith(self._roots)
