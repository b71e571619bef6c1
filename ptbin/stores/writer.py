"""Writing: one output, whole or nothing, of bytes that come from here and of what the store moves itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ptbin.errors import StorageError
from ptbin.stores.parts import Extent, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from ptbin.stores.reader import RangeReader
    from ptbin.stores.values import Identity


class CopyRefused(StorageError):  # noqa: N818 - an answer, not a fault
    """The store will not copy this by itself; the same bytes can still be streamed to a new writer."""


class Writer(ABC):
    """One output, appended to in order; leaving the `with` block without `commit()` aborts it."""

    bytes_copied: int
    """How many of `bytes_written` the store copied by itself, without their coming through this machine."""
    expected_crc32: int | None
    """CRC-32 of all that was written; set before `commit`: stores that can check it do, and then publish."""
    checks_crc32: bool = False
    """Known after `lay_out`: the store will compare the CRC-32 of what it keeps with `expected_crc32`."""
    identity: Identity | None = None
    """What was published, once `commit` returned; None where the store does not say it of its own accord."""

    acknowledged: bool = False
    """Known after `commit`: the store answered with the MD5 of the bytes that it was sent."""

    reached: Callable[[int], None] | None = None
    """Called with the number of bytes that are in place, by writers with a `descriptor`."""

    step_nbytes: int | None = None
    """How much should at most be moved between two such calls, where that is less than the writer's step."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bytes_written = 0
        self.bytes_copied = 0
        self.expected_crc32: int | None = None
        self._open = True

    @abstractmethod
    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`; it may be reused as soon as this returns."""

    @abstractmethod
    def _publish(self) -> None: ...

    @abstractmethod
    def _discard(self) -> None: ...

    scatters: ClassVar[bool] = False
    """Whether bytes may be put at any place, by several threads: `write_at`, then `advance`."""

    def write_at(self, position: int, data: memoryview) -> None:
        """Put bytes at a place that `advance` has yet to pass; only where `scatters`."""
        raise NotImplementedError

    def advance(self, nbytes: int) -> None:
        """The next `nbytes` have been put there by `write_at`."""
        raise NotImplementedError

    def moves_from(self, reader: RangeReader) -> bool:
        """Whether `copy_from` may work for ranges of `reader`; costs no request."""
        del reader
        return False

    def lay_out(self, stretches: Sequence[Extent]) -> list[Part]:
        """Foretell the whole output, and what of it could be copied; before the first byte, or not at all.

        Returns the parts in which the store wants it: a copied part is then one call of `copy_from`, all
        else is written. Empty where nothing is worth copying.
        """
        parts = []
        start = 0
        for stretch in stretches:
            parts.append(Part(start, stretch.nbytes, stretch.copyable))
            start += stretch.nbytes
        return parts

    def copy_from(self, reader: RangeReader, offset: int, nbytes: int) -> bool:
        """Append a range of `reader` by the cheapest kernel or server-side move.

        False: "cannot, please stream"; then nothing was appended.

        Raises:
            CopyRefused: here or in `commit`: the store would not; begin again with a writer that streams.
        """
        del reader, offset, nbytes
        return False

    def descriptor(self) -> int | None:
        """The open file that is written; None where there is none.

        What was written can be read from it before it is published. Another process may write to it: then
        nothing comes through `write`, and `take_back` follows when that process is done.
        """
        return None

    def held(self) -> bytearray | None:
        """All that was written, where it is in memory and `commit` sends it in one request; else None."""
        return None

    def flush_up_to(self, position: int) -> None:  # noqa: B027 - most writers have nothing to do then
        """The other process has written as far as `position`, as seen from outside."""

    def take_back(self) -> None:
        """What another process has written to the descriptor is the output."""
        raise NotImplementedError

    def settle(self) -> None:  # noqa: B027 - most writers have nothing under way
        """Wait until all that was handed over has arrived; only then is it known what was copied."""

    def commit(self) -> None:
        """Make the output visible, whole, under its name; where this fails, the writer is aborted."""
        if not self._open:
            raise ValueError(f"the writer of {self.uri} is closed")
        try:
            self._publish()
        except BaseException:
            self.abort()
            raise
        self._open = False

    def abort(self) -> None:
        """Forget what was written. Never raises for a failing store and never hides an earlier error."""
        if self._open:
            self._open = False
            self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
