"""What a run over a whole store is asked to do: all that its plan depends on, as one frozen value. Pure.

The command line, the flows, `ptbin status` and `ptbin.convert_directory` make one each and hand it to
`ptbin.catalog.plan`; the run record keeps what it says about the files that a run looks at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from ptbin.catalog.globs import is_excluded, matches
from ptbin.catalog.planning import OutputRule
from ptbin.errors import UsageError
from ptbin.options import ConvertOptions, Naming
from ptbin.sources.companions import is_companion
from ptbin.writing.formats import OUTPUT_SUFFIXES

RunKind = Literal["convert", "restore", "sync", "migrate"]

NOTHING = {
    "convert": "no checkpoints to convert",
    "restore": "no weights to restore",
    "sync": "nothing to mirror",
    "migrate": "no models to migrate",
}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a run is asked to do; its plan depends on nothing else but the two stores.

    Attributes:
        options: as they were given; `force` of a mirror replaces foreign files, and redoes nothing.
        include: globs of the checkpoints that are looked at; of a mirror, `copied` are globs of the files
            that are copied as they are, as companions are.
        named: paths below SOURCE; no others are looked at. Where they `must_exist`, a missing one is a
            problem.
        distrust: nothing is up to date by times and ETags.
        compares: with `distrust`, outputs are compared with their sources by content.
        immutable, deletes, max_delete, backup_dir: of a mirror, see `ptbin sync`.

    Raises:
        UsageError: a limit on deletions without deletions.
    """

    source: str
    dest: str
    options: ConvertOptions = field(default_factory=ConvertOptions)
    kind: RunKind = "convert"
    naming: Naming = "replace"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    copy_links: bool = False
    named: tuple[str, ...] | None = None
    must_exist: bool = True
    distrust: bool = False
    compares: bool = False
    immutable: bool = False
    deletes: bool = False
    max_delete: int | None = None
    backup_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("source", "dest"):
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if self.max_delete is not None and not self.deletes:
            raise UsageError("--max-delete means nothing without --delete")

    @property
    def rule(self) -> OutputRule:
        """How outputs below DEST are named."""
        suffix = ".pt" if self.kind == "restore" else OUTPUT_SUFFIXES[self.options.format]
        return OutputRule(self.dest, self.naming, suffix, self.options.layout)

    @property
    def making(self) -> ConvertOptions:
        """The options of a single conversion in this run.

        In a mirror no conversion takes companions along: they are copied by themselves, and of two owners of
        one file each would undo what the other did.
        """
        return self.options.replace(layout="mirror") if self.kind == "sync" else self.options

    @property
    def planning(self) -> ConvertOptions:
        """The options that say what is up to date."""
        return self.making.replace(force=False) if self.kind == "sync" else self.making

    def copies(self, path: str) -> bool:
        """Whether a mirror copies the file at `path` below SOURCE as it is: a companion, or one of `copied`.

        What by its name may be a checkpoint is one of them only where `copied` says so, and then its content
        decides (`WorkList`).
        """
        if self.kind != "sync":
            return False
        return is_companion(path) or any(matches(path, glob) for glob in self.copied)

    @property
    def nothing(self) -> str:
        """What to say where there is nothing below SOURCE."""
        return NOTHING[self.kind]

    def takes(self, path: str) -> bool:
        """Whether the run would have found a file at `path` below SOURCE, if it were there."""
        if self.named is not None or is_excluded(path, self.exclude):
            return False
        return not self.include or any(matches(path, glob) for glob in self.include)

    def selection(self) -> dict[str, Any]:
        """For the run record: which files the run looks at and how outputs are named."""
        return {
            "include": list(self.include),
            "exclude": list(self.exclude),
            "copied": list(self.copied),
            "is_listed": self.named is not None,
            "copy_links": self.copy_links,
            "naming": self.naming,
            "layout": self.options.layout,
        }
