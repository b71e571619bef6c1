"""How a multipart upload is cut into parts where much of it can be copied inside the store. Pure.

An output is a sequence of stretches: bytes that must be uploaded, and runs that lie in a source object of
the same store. S3's rules: at most 10,000 parts, each of 5 MiB to 5 GiB, only the last may be smaller; a
copied part is one range of one object. So what is too short to be a part of its own (the lead-in of a file,
the bytes between two runs) borrows from the run behind it until it has 5 MiB, and those bytes go through
the client.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

__all__ = ["GIB", "MIB", "Extent", "Part", "PartRules", "plan_parts"]

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` of output, one behind the other; a copyable one is a single range of a single object."""

    nbytes: int
    copyable: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `start` to `start + nbytes` of the output, as one part."""

    start: int
    nbytes: int
    copied: bool


@dataclass(frozen=True, slots=True)
class PartRules:
    """What a store allows, and the sizes to aim at; all in bytes but `max_parts`.

    Attributes:
        copy_nbytes: of a copied part. Copies run beside each other, so smaller ones are faster until the
            requests themselves cost.
        upload_nbytes: of an uploaded part, which is held in memory.
        equal: every part but the last has the same size.
    """

    min_nbytes: int = 5 * MIB
    max_nbytes: int = 5 * GIB
    max_parts: int = 10_000
    copy_nbytes: int = 64 * MIB
    upload_nbytes: int = 8 * MIB
    equal: bool = False


def plan_parts(stretches: Sequence[Extent], rules: PartRules) -> list[Part]:
    """The parts, in order, that make up all stretches; none for an empty output.

    Where the parts would be too many, all sizes are doubled until they are not.

    Raises:
        ValueError: more bytes than the largest object has.
    """
    total = sum(stretch.nbytes for stretch in stretches)
    if total > rules.max_parts * rules.max_nbytes:
        raise ValueError(f"{total} bytes are more than {rules.max_parts} parts of {rules.max_nbytes}")
    joined = _joined(stretches)
    if rules.equal:
        return _equal_parts(joined, total, rules)
    least = rules.min_nbytes
    while True:
        parts = list(_unequal_parts(joined, least, rules))
        if len(parts) <= rules.max_parts:
            return parts
        least *= 2
        rules = replace(
            rules,
            copy_nbytes=min(rules.copy_nbytes * 2, rules.max_nbytes),
            upload_nbytes=min(rules.upload_nbytes * 2, rules.max_nbytes),
        )


def _joined(stretches: Sequence[Extent]) -> list[Extent]:
    """Neighbours that must be uploaded as one; runs stay apart, since each is another range."""
    joined: list[Extent] = []
    for stretch in stretches:
        if not stretch.nbytes:
            continue
        if joined and not stretch.copyable and not joined[-1].copyable:
            joined[-1] = Extent(joined[-1].nbytes + stretch.nbytes, copyable=False)
        else:
            joined.append(stretch)
    return joined


def _equal_parts(stretches: Sequence[Extent], total: int, rules: PartRules) -> list[Part]:
    size = max(2 * rules.upload_nbytes, -(-total // rules.max_parts))
    size = min(-(-size // MIB) * MIB, rules.max_nbytes) if size > MIB else size
    ends = itertools.accumulate(stretch.nbytes for stretch in stretches)
    runs = [(end - one.nbytes, end) for one, end in zip(stretches, ends, strict=True) if one.copyable]
    parts = []
    index = 0
    for start in range(0, total, size):
        end = min(start + size, total)
        while index < len(runs) and runs[index][1] < end:
            index += 1
        parts.append(Part(start, end - start, index < len(runs) and runs[index][0] <= start))
    return parts


def _unequal_parts(stretches: Sequence[Extent], least: int, rules: PartRules) -> Iterator[Part]:
    """`least`: a run is copied only if that many bytes of it are left."""
    position = 0  # where the bytes begin that no part holds yet
    waiting = 0  # how many of them are to be uploaded
    for index, stretch in enumerate(stretches):
        nbytes = stretch.nbytes
        borrowed = max(0, rules.min_nbytes - waiting) if waiting else 0
        last = index == len(stretches) - 1
        # The object's last part may be small, but a request for a few bytes is not worth its while.
        wanted = least if not last else min(least, rules.min_nbytes)
        if not stretch.copyable or nbytes - borrowed < wanted:
            waiting += nbytes
            continue
        waiting += borrowed
        yield from _cut(position, waiting, rules, rules.upload_nbytes, copied=False)
        position += waiting
        nbytes -= borrowed
        yield from _cut(position, nbytes, rules, rules.copy_nbytes, copied=True)
        position += nbytes
        waiting = 0
    yield from _cut(position, waiting, rules, rules.upload_nbytes, copied=False)


def _cut(start: int, nbytes: int, rules: PartRules, aim: int, *, copied: bool) -> Iterator[Part]:
    """Parts of about equal size near `aim`, none below the least size unless all of it is."""
    if not nbytes:
        return
    count = max(1, min(-(-nbytes // aim), nbytes // rules.min_nbytes))
    count = max(count, -(-nbytes // rules.max_nbytes))
    for number in range(count):
        first, end = nbytes * number // count, nbytes * (number + 1) // count
        yield Part(start + first, end - first, copied)
