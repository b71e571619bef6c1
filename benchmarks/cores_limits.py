"""What a machine can do with one large file: `python cores_limits.py FOLDER GIB THREADS,... JSON`.

GB/s of SHA-256 and CRC-32 on several threads, of one SHA-256 over all of it, and of copies in several
streams, each in the ways that Python offers. Needs the standard library alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MIB = 1 << 20
PIECE = 64 * MIB
BLOCK = 2 * MIB


def blocks(descriptor: int, start: int, nbytes: int, buffer: bytearray) -> Iterator[memoryview]:
    view = memoryview(buffer)
    end = start + nbytes
    while start < end:
        got = os.preadv(descriptor, [view[: min(len(buffer), end - start)]], start)
        yield view[:got]
        start += got


def windows(descriptor: int, start: int, nbytes: int, step: int = 16 * MIB) -> Iterator[memoryview]:
    end = start + nbytes
    while start < end:
        size = min(step, end - start)
        with mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as mapped:
            view = memoryview(mapped)
            yield view
            view.release()
        start += size


def hash_read(descriptor: int, start: int, nbytes: int) -> None:
    digest, crc = hashlib.sha256(), 0
    for view in blocks(descriptor, start, nbytes, bytearray(BLOCK)):
        digest.update(view)
        crc = zlib.crc32(view, crc)


def hash_mapped(descriptor: int, start: int, nbytes: int) -> None:
    digest, crc = hashlib.sha256(), 0
    for view in windows(descriptor, start, nbytes):
        for at in range(0, len(view), BLOCK):
            digest.update(view[at : at + BLOCK])
            crc = zlib.crc32(view[at : at + BLOCK], crc)


def one_digest(descriptor: int, size: int, how: str) -> None:
    digest = hashlib.sha256()
    if how == "mapped":
        for view in windows(descriptor, 0, size):
            digest.update(view)
        return
    if how == "read":
        for view in blocks(descriptor, 0, size, bytearray(BLOCK)):
            digest.update(view)
        return
    buffers = [bytearray(BLOCK) for _ in range(3)]
    with ThreadPoolExecutor(1) as ahead:

        def fetch(turn: int) -> memoryview:
            start = turn * BLOCK
            if start >= size:
                return memoryview(b"")
            view = memoryview(buffers[turn % 3])
            return view[: os.preadv(descriptor, [view[: min(BLOCK, size - start)]], start)]

        coming = [ahead.submit(fetch, 0), ahead.submit(fetch, 1)]
        turn = 2
        while len(view := coming.pop(0).result()):
            digest.update(view)
            coming.append(ahead.submit(fetch, turn))
            turn += 1


def copy_range(source: int, target: int, start: int, nbytes: int) -> None:
    end = start + nbytes
    while start < end:
        start += os.copy_file_range(source, target, min(16 * MIB, end - start), start, start)


def copy_into_map(source: int, target: int, start: int, nbytes: int) -> None:
    end = start + nbytes
    while start < end:
        size = min(16 * MIB, end - start)
        with mmap.mmap(target, size, mmap.MAP_SHARED, mmap.PROT_WRITE, offset=start) as mapped:
            os.preadv(source, [mapped], start)
        start += size


def copy_pwrite(source: int, target: int, start: int, nbytes: int) -> None:
    buffer = bytearray(BLOCK)
    for view in blocks(source, start, nbytes, buffer):
        os.pwrite(target, view, start)
        start += len(view)


def in_threads(threads: int, size: int, work: Callable[[int, int], None]) -> float:
    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(work, start, min(PIECE, size - start)) for start in range(0, size, PIECE)]:
            job.result()
    return size / 1e9 / (time.monotonic() - began)


def main(folder: Path, gib: float, counts: list[int], place: Path) -> None:
    folder.mkdir(parents=True)
    size = int(gib * 1024) * MIB
    found: dict[str, dict[str, float]] = {}
    try:
        with (folder / "file").open("w+b") as file:
            piece = os.urandom(PIECE)
            for _ in range(0, size, PIECE):
                file.write(piece)
            file.truncate(size)
            file.flush()
            fd = file.fileno()
            for how in ("read", "mapped", "read ahead"):
                began = time.monotonic()
                one_digest(fd, size // 2, how)
                rate = size / 2e9 / (time.monotonic() - began)
                found.setdefault(f"one SHA-256, {how}", {})["1"] = round(rate, 2)
            for n in counts:
                for name, work in (("read", hash_read), ("mapped", hash_mapped)):
                    part = min(size, n * size // 4)
                    rate = in_threads(n, part, functools.partial(work, fd))
                    found.setdefault(f"SHA-256 + CRC-32, {name}", {})[str(n)] = round(rate, 2)
            for n in counts:
                for title, copying, fallocate in (
                    ("copy_file_range", copy_range, False),
                    ("copy_file_range, reserved", copy_range, True),
                    ("pread into a map", copy_into_map, False),
                    ("pread, pwrite", copy_pwrite, False),
                ):
                    with (folder / "copy").open("w+b") as copy:
                        out = copy.fileno()
                        if fallocate:
                            os.posix_fallocate(out, 0, size)
                        else:
                            os.ftruncate(out, size)
                        began = time.monotonic()
                        in_threads(n, size, functools.partial(copying, fd, out))
                        os.fsync(out)
                        rate = size / 1e9 / (time.monotonic() - began)
                    (folder / "copy").unlink()
                    found.setdefault(title, {})[str(n)] = round(rate, 2)
                    print(title, n, round(rate, 2), flush=True)
    finally:
        shutil.rmtree(folder)
        place.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), [int(n) for n in sys.argv[3].split(",")], Path(sys.argv[4]))
