"""Several things that one call does, each tried though others fail, and one error in the end. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ptbin.errors import PtbinError, StorageError
from ptbin.registries.base import RegistryError

__all__ = ["Attempts"]


class Attempts:
    """An alias that is refused must not keep the next one from being set."""

    def __init__(self) -> None:
        self._errors: list[PtbinError] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        try:
            yield
        except PtbinError as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        """Raises what went wrong, transient where trying again may mend some of it."""
        if not self._errors:
            return
        first, *others = self._errors
        if not others:
            raise first
        transient = any(isinstance(error, StorageError) and error.transient for error in self._errors)
        raise RegistryError("; ".join(str(error) for error in self._errors), transient=transient) from first
