"""What every store promises, as one test class; each backend subclasses it and gives a `place`.

A place is a store and an empty directory or prefix in it. Tests here know no backend: what only one of
them does is tested in `tests/ptbin/stores`.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

import pytest

from ptbin.errors import (
    CorruptArchiveError,
    LimitExceededError,
    NotFoundInStoreError,
    SourceChangedError,
    StorageError,
)
from ptbin.stores import Identity, Store

__all__ = ["Place", "ReadingContract", "StoreContract"]

MIB = 1 << 20
# More than two parts or chunks of any backend's own size, and not a multiple of it.
LARGE = os.urandom(1 * MIB) * 19 + b"the end"


@dataclass(frozen=True)
class Place:
    store: Store
    root: str
    pins_every_read: bool = True
    """False: only `check_unchanged` tells, as on most of fsspec's filesystems."""
    has_folders: bool = True
    """False: keys and nothing else."""
    repeats: bool = False
    """Requests fail on their way and are made again, and counted again."""
    tick_s: float = 0.02
    """Of the clock that tells two states of an object apart."""

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self) -> list[str]:
        return [found.path for found in self.store.iter_objects(self.root)]


class ReadingContract:
    """What stores promise that are only read; subclasses define the fixture `place`.

    Its `store.write_bytes` may be the test's own.
    """

    def test_what_was_written_is_read_back(self, place: Place) -> None:
        place.store.write_bytes(place.path("run1/last.bin"), b"weights")
        assert place.store.read_bytes(place.path("run1/last.bin")) == b"weights"

    def test_an_empty_object_exists(self, place: Place) -> None:
        place.store.write_bytes(place.path("empty"), b"")
        assert place.store.stat(place.path("empty")).size == 0
        with place.store.open_reader(place.path("empty")) as reader:
            assert list(reader.iter_range(0, 0)) == []
            assert reader.read(0, 0) == b""
            assert reader.requests == 0

    def test_stat_listing_and_reader_agree(self, place: Place) -> None:
        path = place.path("a/x.bin")
        told = place.store.write_bytes(path, b"0123456789")
        stat = place.store.stat(path)
        assert told in (None, stat.identity)
        (listed,) = place.store.iter_objects(place.root)
        with place.store.open_reader(path) as reader:
            assert (reader.uri, reader.size, reader.identity) == (stat.uri, stat.size, stat.identity)
        assert (listed.uri, listed.size, listed.identity) == (stat.uri, stat.size, stat.identity)
        assert (listed.path, stat.size, stat.uri) == ("a/x.bin", 10, place.store.uri_of(path))
        assert Identity.from_json(stat.identity.to_json()) == stat.identity

    def test_a_missing_object_is_not_found(self, place: Place) -> None:
        for look in (place.store.stat, place.store.open_reader, place.store.read_bytes):
            with pytest.raises(NotFoundInStoreError, match="missing"):
                look(place.path("missing"))

    def test_a_directory_is_not_an_object(self, place: Place) -> None:
        place.store.write_bytes(place.path("directory/x"), b"x")
        for look in (place.store.stat, place.store.open_reader, place.store.read_bytes):
            with pytest.raises(NotFoundInStoreError):
                look(place.path("directory"))

    def test_is_directory(self, place: Place) -> None:
        place.store.write_bytes(place.path("directory/x"), b"x")
        assert place.store.is_directory(place.path("directory"))
        assert not place.store.is_directory(place.path("directory/x"))
        assert not place.store.is_directory(place.path("direct"))
        assert not place.store.is_directory(place.path("missing/deeper"))

    def test_reads_give_exactly_what_was_asked(self, place: Place) -> None:
        path = place.path("x")
        place.store.write_bytes(path, b"0123456789")
        with place.store.open_reader(path) as reader:
            assert reader.read(0, 10) == b"0123456789"
            assert reader.read(3, 4) == b"3456"
            assert reader.read(9, 1) == b"9"
            # A store may have brought all of it along at once.
            assert (reader.requests, reader.bytes_read) in ((3, 15), (1, 10))

    @pytest.mark.parametrize(
        ("offset", "nbytes"), [(0, 11), (10, 1), (11, 0), (-1, 2), (5, -1), (1 << 70, 1)]
    )
    def test_a_range_outside_of_the_object_is_corruption(
        self, place: Place, offset: int, nbytes: int
    ) -> None:
        place.store.write_bytes(place.path("x"), b"0123456789")
        with place.store.open_reader(place.path("x")) as reader:
            with pytest.raises(CorruptArchiveError):
                reader.read(offset, nbytes)
            with pytest.raises(CorruptArchiveError):
                list(reader.iter_ranges([(0, 1), (offset, nbytes)]))
            assert reader.requests == 0

    def test_a_large_object_streams_in_bounded_pieces(self, place: Place) -> None:
        path = place.path("large")
        place.store.write_bytes(path, LARGE)
        with place.store.open_reader(path) as reader:
            pieces = list(reader.iter_range(1, len(LARGE) - 1, chunk_nbytes=2 * MIB))
            assert max(map(len, pieces)) <= 2 * MIB
            assert b"".join(pieces) == LARGE[1:]
            assert place.repeats or reader.bytes_read == len(LARGE) - 1
            assert b"".join(reader.iter_range(0, len(LARGE))) == LARGE
            assert reader.read(0, len(LARGE)) == LARGE

    def test_many_ranges_come_in_order_and_share_requests(self, place: Place) -> None:
        place.store.write_bytes(place.path("x"), LARGE)
        ranges = [(0, 10), (20, 5), (25, 0), (25, 3 * MIB), (12 * MIB, 7), (4, 4)]
        with place.store.open_reader(place.path("x")) as reader:
            got: dict[int, bytes] = {}
            last = 0
            for index, piece in reader.iter_ranges(ranges, chunk_nbytes=2 * MIB):
                assert index >= last
                last = index
                got[index] = got.get(index, b"") + piece
            assert got == {i: LARGE[o : o + n] for i, (o, n) in enumerate(ranges) if n}
            if place.repeats:
                return
            # Two chunks for the neighbours, or one more where a gap of ten bytes starts a request.
            assert reader.requests <= 2 + 2 + (1 if reader.gap_nbytes == 0 else 0)
            assert reader.bytes_read <= sum(n for _, n in ranges) + 10

    def test_iteration_may_end_early(self, place: Place) -> None:
        place.store.write_bytes(place.path("x"), LARGE)
        with place.store.open_reader(place.path("x")) as reader:
            pieces = reader.iter_range(0, len(LARGE), chunk_nbytes=MIB)
            first = next(pieces)
            assert first
            assert first == LARGE[: len(first)]
            pieces.close()  # type: ignore[attr-defined]  # a generator, as all of them are
            assert reader.read(5, 5) == LARGE[5:10]

    def test_read_bytes_keeps_to_its_limit(self, place: Place) -> None:
        place.store.write_bytes(place.path("x"), b"0123456789")
        assert place.store.read_bytes(place.path("x"), limit=10) == b"0123456789"
        with pytest.raises(LimitExceededError):
            place.store.read_bytes(place.path("x"), limit=9)

    def test_a_listing_is_recursive_sorted_and_relative(self, place: Place) -> None:
        names = ["a/b/c.bin", "a/x.bin", "b.bin", "with space.bin", "ünï.bin", "[x]*?.bin", "50%20+1&=.bin"]
        for name in names:
            place.store.write_bytes(place.path(name), name.encode())
        found = list(place.store.iter_objects(place.root))
        assert sorted(one.path for one in found) == sorted(names)
        assert [one.path for one in found] == place.names()
        for one in found:
            assert place.store.read_bytes(place.path(one.path)) == one.path.encode()
        assert [one.path for one in place.store.iter_objects(place.path("a"))] == ["b/c.bin", "x.bin"]

    def test_a_listing_of_nothing_is_empty(self, place: Place) -> None:
        assert list(place.store.iter_objects(place.path("missing"))) == []

    def test_a_prefix_is_not_a_directory_of_the_same_beginning(self, place: Place) -> None:
        place.store.write_bytes(place.path("run1/x"), b"1")
        place.store.write_bytes(place.path("run10/x"), b"2")
        assert [one.path for one in place.store.iter_objects(place.path("run1"))] == ["x"]

    def test_unfinished_outputs_are_passed_over(self, place: Place) -> None:
        place.store.write_bytes(place.path(".x.bin.0123.ptbin-partial"), b"half")
        assert place.names() == []


class StoreContract(ReadingContract):
    """All of it."""

    def test_an_object_overwritten_while_it_is_read_is_noticed(self, place: Place) -> None:
        path = place.path("x")
        place.store.write_bytes(path, b"old" * 1000)
        time.sleep(place.tick_s)
        with place.store.open_reader(path) as reader:
            assert reader.read(0, 3) == b"old"
            reader.check_unchanged()
            place.store.write_bytes(path, b"new" * 1000)
            with pytest.raises(SourceChangedError, match="x"):
                reader.check_unchanged()
            if place.pins_every_read:
                with contextlib.suppress(SourceChangedError):
                    assert reader.read(3, 3) == b"old"

    def test_an_object_deleted_while_it_is_read_is_noticed(self, place: Place) -> None:
        path = place.path("x")
        place.store.write_bytes(path, b"old")
        with place.store.open_reader(path) as reader:
            place.store.delete(path)
            with pytest.raises(SourceChangedError, match="x"):
                reader.check_unchanged()

    def test_another_object_than_expected_is_refused(self, place: Place) -> None:
        path = place.path("x")
        place.store.write_bytes(path, b"old")
        expected = place.store.stat(path).identity
        place.store.open_reader(path, expected=expected).close()
        time.sleep(place.tick_s)
        place.store.write_bytes(path, b"new")
        assert place.store.stat(path).identity != expected
        with pytest.raises(SourceChangedError):
            place.store.open_reader(path, expected=expected)

    def test_nothing_is_visible_before_commit(self, place: Place) -> None:
        with place.store.open_writer(place.path("x"), size_hint=len(LARGE)) as writer:
            writer.write(LARGE)
            assert place.names() == []
            with pytest.raises(NotFoundInStoreError):
                place.store.stat(place.path("x"))
            writer.commit()
        assert place.names() == ["x"]

    @pytest.mark.parametrize("data", [b"", b"few", LARGE], ids=["nothing", "few", "large"])
    def test_an_abandoned_output_leaves_nothing(self, place: Place, data: bytes) -> None:
        with contextlib.suppress(KeyError), place.store.open_writer(place.path("x")) as writer:
            writer.write(data)
            raise KeyError
        with place.store.open_writer(place.path("y")) as writer:
            writer.write(data)
        writer = place.store.open_writer(place.path("z"))
        writer.abort()
        writer.abort()
        assert place.names() == []

    def test_an_abandoned_output_leaves_what_was_there(self, place: Place) -> None:
        place.store.write_bytes(place.path("x"), b"first")
        with place.store.open_writer(place.path("x"), size_hint=len(LARGE)) as writer:
            writer.write(LARGE)
        assert place.store.read_bytes(place.path("x")) == b"first"

    def test_an_output_replaces_what_was_there(self, place: Place) -> None:
        place.store.write_bytes(place.path("x"), b"a longer first one")
        place.store.write_bytes(place.path("x"), b"second")
        assert place.store.read_bytes(place.path("x")) == b"second"
        assert place.names() == ["x"]

    def test_an_output_comes_in_any_pieces(self, place: Place) -> None:
        with place.store.open_writer(place.path("x"), size_hint=len(LARGE)) as writer:
            for start in range(0, len(LARGE), 3 * MIB):
                writer.write(memoryview(LARGE)[start : start + 3 * MIB])
            assert writer.bytes_written == len(LARGE)
            writer.commit()
        assert place.store.read_bytes(place.path("x")) == LARGE

    def test_two_writers_of_one_name_do_not_mix(self, place: Place) -> None:
        with (
            place.store.open_writer(place.path("new/x")) as one,
            place.store.open_writer(place.path("new/x")) as two,
        ):
            one.write(b"one" * 1000)
            two.write(b"two" * 1000)
            one.abort()
            two.commit()
        assert place.store.read_bytes(place.path("new/x")) == b"two" * 1000

    def test_a_writer_takes_any_buffer_and_keeps_none(self, place: Place) -> None:
        buffer = bytearray(b"abcd")
        with place.store.open_writer(place.path("x")) as writer:
            writer.write(buffer)
            buffer[:] = b"efgh"
            writer.write(memoryview(buffer)[1:3])
            writer.write(b"")
            writer.write(memoryview(b"\x00\x01\x02\x03").cast("H"))
            writer.commit()
            assert writer.bytes_written == 10
        assert place.store.read_bytes(place.path("x")) == b"abcdfg\x00\x01\x02\x03"

    def test_a_writer_is_committed_once(self, place: Place) -> None:
        with place.store.open_writer(place.path("x")) as writer:
            writer.write(b"x")
            writer.commit()
            with pytest.raises(ValueError, match="closed"):
                writer.commit()
            writer.abort()
        assert place.store.read_bytes(place.path("x")) == b"x"

    def test_a_copy_moves_all_or_says_that_it_cannot(self, place: Place) -> None:
        place.store.write_bytes(place.path("source"), LARGE)
        with (
            place.store.open_reader(place.path("source")) as reader,
            place.store.open_writer(place.path("x")) as writer,
        ):
            writer.write(b"head")
            if writer.copy_from(reader, 5, len(LARGE) - 5):
                assert writer.bytes_written == 4 + len(LARGE) - 5
                assert reader.bytes_read == len(LARGE) - 5
            else:
                assert writer.bytes_written == 4
                assert reader.bytes_read == 0
                writer.write(LARGE[5:])
            writer.commit()
        assert place.store.read_bytes(place.path("x")) == b"head" + LARGE[5:]

    def test_a_directory_is_no_target(self, place: Place) -> None:
        if not place.has_folders:
            pytest.skip("keeps an object and a prefix of one name side by side")
        place.store.write_bytes(place.path("directory/x"), b"x")
        with pytest.raises(StorageError):
            place.store.write_bytes(place.path("directory"), b"y")
        assert place.names() == ["directory/x"]

    def test_a_listing_is_never_stale(self, place: Place) -> None:
        place.store.write_bytes(place.path("x"), b"1")
        assert [one.size for one in place.store.iter_objects(place.root)] == [1]
        place.store.write_bytes(place.path("x"), b"22")
        place.store.write_bytes(place.path("y"), b"333")
        assert [one.size for one in place.store.iter_objects(place.root)] == [2, 3]
        assert place.store.stat(place.path("x")).size == 2
        place.store.delete(place.path("x"))
        assert place.names() == ["y"]
        assert not place.store.is_directory(place.path("x"))

    def test_deleting_twice_is_no_error(self, place: Place) -> None:
        place.store.write_bytes(place.path("x"), b"x")
        place.store.delete(place.path("x"))
        place.store.delete(place.path("x"))
        assert place.names() == []

    def test_asking_whether_one_may_write_leaves_nothing(self, place: Place) -> None:
        place.store.check_writable(place.root)
        place.store.check_writable(place.path("deep/er/x.bin"))
        assert place.names() == []
        assert not place.store.is_directory(place.path("deep"))
        place.store.write_bytes(place.path("x.bin"), b"kept")
        place.store.check_writable(place.path("x.bin"))
        assert place.names() == ["x.bin"]
        assert place.store.read_bytes(place.path("x.bin")) == b"kept"
