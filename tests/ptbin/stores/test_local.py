from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from ptbin.errors import (
    AccessDeniedError,
    CorruptArchiveError,
    NotFoundInStoreError,
    SourceChangedError,
    StorageError,
)
from ptbin.stores import open_store
from ptbin.stores.local import LocalStore
from ptbin.stores.local_writer import LocalWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def store() -> LocalStore:
    return LocalStore()


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------ identity


def test_a_copy_that_keeps_the_time_counts_as_the_same(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"weights")
    shutil.copy2(tmp_path / "x", tmp_path / "y")
    assert store.stat(str(tmp_path / "y")).identity == store.stat(str(tmp_path / "x")).identity
    with store.open_reader(str(tmp_path / "x")) as reader:
        (tmp_path / "y").replace(tmp_path / "x")
        reader.check_unchanged()


def test_a_file_written_in_place_is_another_one(store: LocalStore, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old" * 1000)
    with store.open_reader(str(path)) as reader:
        time.sleep(0.02)
        with path.open("r+b") as file:
            file.write(b"new")
        with pytest.raises(SourceChangedError):
            reader.check_unchanged()


def test_a_file_cut_short_while_it_is_read_is_another_one(store: LocalStore, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0" * 1000)
    with store.open_reader(str(path)) as reader:
        os.truncate(path, 10)
        with pytest.raises(SourceChangedError):
            reader.read(0, 1000)
        with pytest.raises(SourceChangedError):
            store.open_writer(str(tmp_path / "y")).copy_from(reader, 0, 1000)


def test_a_file_that_gives_less_than_its_size_is_corrupt(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"0" * 1000)
    with store.open_reader(str(tmp_path / "x")) as reader:
        monkeypatch.setattr(os, "pread", lambda fd, n, at: b"")
        with pytest.raises(CorruptArchiveError, match="0 of 1000 bytes"):
            reader.read(0, 1000)


def test_short_reads_are_continued(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(1000)
    (tmp_path / "x").write_bytes(content)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 7), at))
    with store.open_reader(str(tmp_path / "x")) as reader:
        assert reader.read(3, 900) == content[3:903]


def test_only_regular_files_are_read_and_replaced(store: LocalStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/null"):
        with pytest.raises(StorageError, match="not a regular file"):
            store.open_reader(path)
        with pytest.raises(StorageError, match="not a regular file"):
            store.open_writer(path)
    assert list(store.iter_objects(str(tmp_path))) == []
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_nul_in_a_name_is_a_clear_error(store: LocalStore) -> None:
    with pytest.raises(StorageError):
        store.open_reader("/tmp/a\0b")


# ------------------------------------------------------------------------------------------------- listing


def test_links_are_followed_but_not_in_circles(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "link").symlink_to("a/x")
    assert [found.path for found in store.iter_objects(str(tmp_path))] == ["a/x", "b/x", "link"]


@pytest.mark.starts_processes
def test_a_deep_tree_is_listed(store: LocalStore, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):  # deeper than Python's recursion limit; each path shorter than PATH_MAX
        os.mkdir("d", dir_fd=directory)
        inner = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    try:
        (found,) = store.iter_objects(str(tmp_path))
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # too deep for pytest's own cleaning
    assert found.path == "d/" * 1200 + "x"


def test_a_directory_that_may_not_be_read_is_not_passed_over(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("closed"):
            raise PermissionError(errno.EACCES, "denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(AccessDeniedError, match="closed"):
        list(store.iter_objects(str(tmp_path)))


# ------------------------------------------------------------------------------------------------- writing


def test_modes_follow_the_umask(store: LocalStore, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        store.write_bytes(str(tmp_path / "x"), b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_parents_are_made_and_taken_back(store: LocalStore, tmp_path: Path) -> None:
    with store.open_writer(str(tmp_path / "a/b/c/x")) as writer:
        writer.write(b"x")
    assert below(tmp_path) == []
    (tmp_path / "a").mkdir()
    with store.open_writer(str(tmp_path / "a/b/c/x")):
        (tmp_path / "a/b/other").touch()
    assert below(tmp_path) == ["a", "a/b", "a/b/other"]


def test_an_aborting_neighbour_does_not_take_our_directory(store: LocalStore, tmp_path: Path) -> None:
    one = store.open_writer(str(tmp_path / "new/one"))
    two = store.open_writer(str(tmp_path / "new/two"))
    two.write(b"2")
    one.abort()
    two.commit()
    assert below(tmp_path) == ["new", "new/two"]


@pytest.mark.parametrize("unnamed", [True, False])
def test_the_longest_name_can_be_written_and_a_longer_one_is_refused_early(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE")
    longest = str(tmp_path / ("ü" * 125 + ".bin"))
    for _ in range(2):  # the second time over an existing file
        store.write_bytes(longest, b"x")
    with pytest.raises(StorageError, match="shorter name"):
        store.open_writer(longest + "xx")
    assert len(below(tmp_path)) == 1


def test_a_parent_that_is_a_file_is_refused(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        store.open_writer(str(tmp_path / "file/x"))
    with pytest.raises(StorageError, match="not a directory"):
        store.check_writable(str(tmp_path / "file/deeper/x"))
    assert below(tmp_path) == ["file"]


FILL = """
import sys
from ptbin.stores import open_store
store, path = open_store(sys.argv[1])
with store.open_writer(path) as writer:
    for _ in range(8):
        writer.write(bytes(1 << 20))
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    sys.stdin.readline()
"""


@pytest.mark.starts_processes
def test_a_killed_writer_leaves_no_output(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    process = subprocess.Popen(
        [sys.executable, "-c", FILL, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert not target.exists()
    assert list(LocalStore().iter_objects(str(tmp_path))) == []
    if hasattr(os, "O_TMPFILE"):
        assert below(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.starts_processes
def test_a_full_disk_is_a_storage_error_and_leaves_nothing(
    store: LocalStore, tmp_path: Path, small_disk: Path
) -> None:
    with store.open_writer(str(small_disk / "sub/x")) as writer:
        writer.write(bytes(MIB))
        with pytest.raises(StorageError, match="free some space") as caught:
            writer.write(bytes(2 * MIB))
    assert not caught.value.transient
    assert below(small_disk) == []
    (tmp_path / "source").write_bytes(bytes(4 * MIB))
    with (
        store.open_reader(str(tmp_path / "source")) as reader,
        store.open_writer(str(small_disk / "sub/x")) as writer,
    ):
        with pytest.raises(StorageError, match="free some space"):
            writer.copy_from(reader, 0, 4 * MIB)
        assert reader.bytes_read <= 4 * MIB
    assert below(small_disk) == []
    with store.open_writer(str(small_disk / "x")) as writer:  # the space is free again
        writer.write(bytes(MIB))
        writer.commit()


@pytest.mark.starts_processes
def test_a_copy_between_filesystems_arrives(store: LocalStore, tmp_path: Path, small_disk: Path) -> None:
    content = os.urandom(MIB)
    (tmp_path / "source").write_bytes(content)
    with (
        store.open_reader(str(tmp_path / "source")) as reader,
        store.open_writer(str(small_disk / "x")) as writer,
    ):
        assert writer.copy_from(reader, 1, MIB - 1)
        writer.commit()
    assert (small_disk / "x").read_bytes() == content[1:]


@pytest.mark.starts_processes
def test_a_read_only_place_is_refused_early(store: LocalStore, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(AccessDeniedError, match="read-only"):
        store.check_writable(str(small_disk / "x.bin"))
    with pytest.raises(AccessDeniedError, match="read-only"):
        store.open_writer(str(small_disk / "sub/x.bin"))


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_commit_that_fails_leaves_what_was_there(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store.write_bytes(str(tmp_path / "x"), b"first")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "made up")

    with store.open_writer(str(tmp_path / "x")) as writer:
        writer.write(b"second")
        monkeypatch.setattr(os, step, fails)
        with pytest.raises(StorageError, match="device"):
            writer.commit()
    monkeypatch.undo()
    assert below(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"first"


# ------------------------------------------------------------------------------------------------- copying


@pytest.mark.parametrize(
    "answers",
    [
        [OSError(errno.EXDEV, "x")],
        [OSError(errno.EINVAL, "x")],
        [OSError(errno.ENOSYS, "x")],
        [OSError(errno.EOPNOTSUPP, "x")],
        [OSError(errno.EPERM, "x")],
        [0],
        [1000, OSError(errno.EXDEV, "x")],
        [1000, 0],
        [17, 4000, OSError(errno.EIO, "x")],
    ],
    ids=str,
)
def test_what_the_kernel_does_not_copy_is_streamed(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[int | OSError]
) -> None:
    content = os.urandom(3 * MIB)
    (tmp_path / "source").write_bytes(content)
    real, script = os.copy_file_range, iter(answers)

    def copy_file_range(source: int, target: int, count: int, offset_src: int | None = None) -> int:
        answer = next(script)
        if isinstance(answer, OSError):
            raise answer
        return real(source, target, answer, offset_src) if answer else 0

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    with (
        store.open_reader(str(tmp_path / "source")) as reader,
        store.open_writer(str(tmp_path / "x")) as writer,
    ):
        writer.write(b"head")
        assert writer.copy_from(reader, 5, 2 * MIB)
        writer.write(b"tail")
        assert writer.bytes_written == 2 * MIB + 8
        assert reader.bytes_read == 2 * MIB
        writer.commit()
    assert next(script, None) is None
    assert (tmp_path / "x").read_bytes() == b"head" + content[5 : 5 + 2 * MIB] + b"tail"


def test_the_kernel_copies_where_it_can(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(40 * MIB)
    (tmp_path / "source").write_bytes(content)
    monkeypatch.setattr(os, "pread", None)
    with (
        store.open_reader(str(tmp_path / "source")) as reader,
        store.open_writer(str(tmp_path / "x")) as writer,
    ):
        assert writer.copy_from(reader, 0, reader.size)
        writer.commit()
    assert (tmp_path / "x").read_bytes() == content


def test_a_fault_met_by_the_early_flush_is_not_lost(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a failed write-back once; the last flush would see a clean file."""

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "made up")

    monkeypatch.setattr(os, "fdatasync", fails)
    with store.open_writer(str(tmp_path / "x")) as writer:
        for _ in range(5):
            writer.write(bytes(8 * MIB))
        with pytest.raises(StorageError):
            writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_reserved_output_has_only_the_size_written(store: LocalStore, tmp_path: Path) -> None:
    with store.open_writer(str(tmp_path / "x"), size_hint=64 * MIB) as writer:
        writer.write(b"short")
        writer.commit()
    assert (tmp_path / "x").read_bytes() == b"short"


def test_partial_writes_are_continued(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    with store.open_writer(str(tmp_path / "x")) as writer:
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:3])))
        writer.write(b"0123456789")
        monkeypatch.undo()
        writer.commit()
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_a_writer_without_proc_uses_a_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptbin.stores.local_writer.proc_is_mounted", lambda: False)
    with LocalWriter(str(tmp_path / "x")) as writer:
        writer.write(b"x")
        (name,) = below(tmp_path)
        assert name.startswith(".x.")
        assert name.endswith(".ptbin-partial")
        writer.commit()
    assert below(tmp_path) == ["x"]


# ----------------------------------------------------------------------------------------------- open_store


def test_every_spelling_of_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("x/y", "./x/y", f"{tmp_path}/x/y", f"file://{tmp_path}/x/y", "~/x/y", "x//y/"):
        store, path = open_store(spelling)
        assert isinstance(store, LocalStore)
        assert path == store.uri_of(path) == f"{tmp_path}/x/y"


@pytest.mark.starts_processes
def test_the_local_path_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from ptbin.stores import open_store\n"
        f"store, path = open_store({str(tmp_path / 'x')!r})\n"
        "store.write_bytes(path, b'x'); store.stat(path); store.read_bytes(path)\n"
        "list(store.iter_objects(path))\n"
        "heavy = {'fsspec', 's3fs', 'boto3', 'botocore', 'aiobotocore', 'asyncio', 'ctypes', 'random'}\n"
        "sys.stdout.write(' '.join(sorted(heavy & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_a_missing_directory_is_told_from_a_forbidden_one(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not store.is_directory(str(tmp_path / "missing"))

    def denied(path: str) -> None:
        raise PermissionError(errno.EACCES, "denied", path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", denied)
        with pytest.raises(AccessDeniedError):
            store.is_directory(str(tmp_path / "x"))
    with pytest.raises(NotFoundInStoreError), contextlib.ExitStack() as stack:
        stack.enter_context(store.open_reader(str(tmp_path / "missing")))


def test_a_small_file_takes_two_flushes_and_what_need_not_last_none(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    store.write_bytes(str(tmp_path / "lasting"), b"x")
    assert len(flushed) == 2  # the file, and the folder that names it
    store.write_bytes(str(tmp_path / "passing"), b"x", lasting=False)
    assert len(flushed) == 2
    assert (tmp_path / "passing").read_bytes() == b"x"


def test_a_link_that_leads_nowhere_or_round_is_replaced(store: LocalStore, tmp_path: Path) -> None:
    for name, target in (("nowhere", "absent"), ("round", "round")):
        link = tmp_path / name
        link.symlink_to(target)
        store.write_bytes(str(link), b"x")
        assert link.read_bytes() == b"x"
        assert not link.is_symlink()
