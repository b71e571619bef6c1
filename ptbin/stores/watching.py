"""What a listing asks about folders, links and what is not a file: may it go in, what was passed over.

Object stores hold keys and nothing else, so only stores with folders and links ask. Knows no rule: the base
class goes everywhere and stops at what it may not read; `catalog.entries` has the rule for SOURCE.
"""

from __future__ import annotations

from typing import Literal

from ptbin.errors import StorageError

__all__ = ["PassedOver", "Watch", "WatchQuietly"]

PassedOver = Literal["special_file", "dangling_link", "outside_link"]
"""Pipes, sockets and devices; links that lead nowhere, or out of the listed place and are not followed."""


class Watch:
    """Goes everywhere, follows every link, and raises where a folder cannot be read. Paths are relative."""

    def enters(self, folder: str) -> bool:
        """Whether the listing goes into `folder`."""
        del folder
        return True

    def follows(self, link: str, target: str) -> bool:
        """Whether a link is followed that leads out of the listed place, to `target`."""
        del link, target
        return True

    def passes(self, path: str, kind: PassedOver) -> None:
        """An entry is passed over."""

    def cannot_read(self, path: str, error: StorageError) -> None:
        """A folder, or an entry of one, cannot be looked at; the listing goes on where this returns."""
        del path
        raise error


class WatchQuietly(Watch):
    """Passes over what cannot be read."""

    def cannot_read(self, path: str, error: StorageError) -> None:
        """Nothing is raised."""
