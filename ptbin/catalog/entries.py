"""What becomes of entries below SOURCE that are not plain files: one rule for every command.

- Hidden ones, files and folders whose names begin with a dot, are passed over and counted: `.git/`,
  `.ipynb_checkpoints/`, `.DS_Store`. A glob that spells the dot (`--include '**/.snapshots/**'`) takes them,
  as in a shell, and so does a list of files. `.metadata` of a distributed checkpoint is a part of it.
- Pipes, sockets, devices, and links that lead nowhere are passed over and counted.
- Links that lead out of SOURCE are passed over, counted and named, unless they are to be followed.
- A folder that cannot be read, and a name that is not one (not UTF-8, with control characters), is a problem;
  the run goes on.
- What `exclude` takes away is none of these, and an excluded folder is not looked into.

Counts entries, not what lies below them: a hidden folder is one, on every store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ptbin.catalog.globs import is_excluded, matches
from ptbin.catalog.jobs import Problem
from ptbin.errors import StorageError
from ptbin.sources.folders import DCP_METADATA
from ptbin.stores import Watch
from ptbin.stores.base import PassedOver
from ptbin.values.names import shown_path

KINDS = {
    "hidden": ("hidden", "hidden"),
    "special_file": ("pipe, socket or device", "pipes, sockets or devices"),
    "dangling_link": ("link that leads nowhere", "links that lead nowhere"),
    "outside_link": (
        "link that leads out of SOURCE (--copy-links follows it)",
        "links that lead out of SOURCE (--copy-links follows them)",
    ),
}
"""What is passed over, and how to say it of one and of many."""

MAX_LISTED_PATHS = 100
NAMED = 5


class Entries(Watch):
    """Asked during one listing of SOURCE; afterwards it holds what was passed over, and the problems."""

    def __init__(
        self,
        *,
        shown: Sequence[str] = (),
        exclude: Sequence[str] = (),
        copy_links: bool = False,
        is_named: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`shown` are the globs that may take hidden entries; `is_named`: whether a list names a path."""
        self.uri_of: Callable[[str], str] = lambda path: path
        """The URI of a path below SOURCE; the listing sets it."""
        self.problems: list[Problem] = []
        self.counts: Counter[str] = Counter()
        self.passed: list[tuple[str, str]] = []
        """Kind and path of what was passed over, the first `MAX_LISTED_PATHS`."""
        self.kept: list[str] = []
        """Paths of links that were passed over: it is not known what lies below them."""
        self._shown = tuple(glob for glob in shown if glob.startswith(".") or "/." in glob)
        self._exclude = tuple(exclude)
        self._copy_links = copy_links
        self._is_named = is_named
        self._last_hidden = ""

    # -- asked by the store ------------------------------------------------------------------------

    def enters(self, folder: str) -> bool:
        """Not a hidden folder, unless something in it may be asked for, nor an excluded one."""
        if is_excluded(f"{folder}/", self._exclude):
            return False
        name = folder.rpartition("/")[2]
        if not name.startswith(".") or self._shown or self._is_named(folder):
            return True
        self._pass("hidden", folder)
        return False

    def follows(self, link: str, target: str) -> bool:
        """As `copy_links` says; a link that a list names is asked for."""
        del target
        return self._copy_links or self._is_named(link)

    def passes(self, path: str, kind: PassedOver) -> None:
        """Counted, unless it is excluded or hidden."""
        if is_excluded(path, self._exclude) or is_excluded(f"{path}/", self._exclude):
            return
        if kind in ("dangling_link", "outside_link"):
            self.kept.append(path)
        self._pass("hidden" if hidden_part(path) else kind, path)

    def cannot_read(self, path: str, error: StorageError) -> None:
        """A problem, unless it is excluded or hidden; the listing goes on."""
        if is_excluded(path, self._exclude) or is_excluded(f"{path}/", self._exclude):
            return
        self.problems.append(Problem(self.uri_of(path), error.reason, str(error)))

    # -- asked by the listing's reader -------------------------------------------------------------

    def takes(self, path: str) -> bool:
        """Whether a file is to be looked at: not a hidden one, unless it is asked for. Counts the others."""
        part = hidden_part(path)
        if not part or self._is_named(path) or any(matches(path, glob) for glob in self._shown):
            return True
        if part != self._last_hidden and not is_excluded(path, self._exclude):
            self._last_hidden = part
            self._pass("hidden", part)
        return False

    def _pass(self, kind: str, path: str) -> None:
        self.counts[kind] += 1
        if len(self.passed) < MAX_LISTED_PATHS:
            self.passed.append((kind, path))

    # -- asked afterwards ---------------------------------------------------------------------------

    def links_words(self) -> str:
        """Names of the links that lead out of SOURCE and were not followed; empty where there were none."""
        links = [path for kind, path in self.passed if kind == "outside_link"]
        if not links:
            return ""
        more = self.counts["outside_link"] - len(links[:NAMED])
        named = ", ".join(map(shown_path, links[:NAMED])) + (f" and {more} more" if more else "")
        return f"not followed, because they lead out of SOURCE: {named}; --copy-links follows such links"

    def hides(self, path: str) -> bool:
        """Whether this listing passed over what `path` below SOURCE may be: it is not known to be gone."""
        return bool(hidden_part(path)) or any(
            path == link or path.startswith(f"{link}/") for link in self.kept
        )


def nothing_below(source: str, entries: Entries, nothing: str = "no checkpoints to convert") -> str:
    """That there is nothing to do, and what was passed over."""
    words = skipped_words(entries.counts)
    return f"{nothing} below SOURCE: {source}" + (f"; passed over: {words}" if words else "")


def skipped_words(counts: Mapping[str, int]) -> str:
    """Counts by kind as words."""
    return ", ".join(
        f"{counts[kind]} {one if counts[kind] == 1 else many}"
        for kind, (one, many) in KINDS.items()
        if counts.get(kind)
    )


def hidden_part(path: str) -> str:
    """The part of a path up to the first hidden name in it; empty where there is none."""
    if not path.startswith(".") and "/." not in path:
        return ""
    parts = path.split("/")
    for number, part in enumerate(parts):
        if part.startswith(".") and part not in (DCP_METADATA, ".", ".."):
            return "/".join(parts[: number + 1])
    return ""
