"""Listing a prefix of S3: in the order of the keys, and as fast as several requests at once allow.

A page holds a thousand keys and names the next one, so a plain listing is a chain of requests. Where the
first page is not the last, common prefixes ("folders") are asked for, level by level, and cut the keys into
ranges that are listed side by side. Keys come in order all the same. A prefix without folders is a chain
still.

Costs: a request per thousand keys, at most `MAX_SURVEY_REQUESTS` to find the ranges, and at most one more for
each of up to `MAX_RANGES` ranges, whose last page may reach into the next one. Memory: `SIDE_BY_SIDE` times
`PAGES` pages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ptbin.stores.reader import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from ptbin.stores.s3_client import S3Client

MAX_SURVEY_REQUESTS = 32
MAX_RANGES = 256
WANTED_RANGES = 64
"""As many ranges keep all requests busy: no deeper level is surveyed then."""
SIDE_BY_SIDE = 8
PAGES = 8

Entry = tuple[str, int, str]
"""Key, size in bytes, ETag."""


@dataclass
class _Range:
    """Keys behind `after`, before `end` (None: without end)."""

    after: str | None
    end: str | None
    token: str | None = None
    finished: bool = False
    under_way: Future[list[list[Entry]]] | None = field(default=None, repr=False)


class _Listing:
    def __init__(self, client: S3Client, uri: str, bucket: str, prefix: str, page_keys: int | None) -> None:
        self._client = client
        self._uri = uri
        self._asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
        if page_keys is not None:
            self._asked["MaxKeys"] = page_keys

    async def _ask(self, **more: Any) -> dict[str, Any]:
        return await self._client.acall("list_objects_v2", self._uri, **(self._asked | more))

    async def page(self, at: _Range) -> list[Entry]:
        """The range's next page, cut off at its end."""
        where = {"ContinuationToken": at.token} if at.token else {"StartAfter": at.after} if at.after else {}
        answer = await self._ask(**where)
        entries = [
            (entry["Key"], entry["Size"], str(entry.get("ETag") or "").strip('"'))
            for entry in answer.get("Contents", ())
        ]
        at.token = answer.get("NextContinuationToken")
        at.finished = not answer.get("IsTruncated")
        if at.end is not None and entries and not _before(entries[-1][0], at.end):
            entries = [entry for entry in entries if _before(entry[0], at.end)]
            at.finished = True
        return entries

    async def pages(self, at: _Range) -> list[list[Entry]]:
        """The next few pages, one behind the other."""
        found: list[list[Entry]] = []
        while not at.finished and len(found) < PAGES:
            found.append(await self.page(at))
        return found

    async def folders(self, prefix: str) -> list[str]:
        """The first thousand common prefixes below, each with its slash."""
        answer = await self._ask(Prefix=prefix, Delimiter="/")
        return [item["Prefix"] for item in answer.get("CommonPrefixes", ())]

    def boundaries(self) -> list[str]:
        """Where ranges may begin, in order; few where there are few folders."""
        found: set[str] = set()
        level = [self._asked["Prefix"]]
        left = MAX_SURVEY_REQUESTS
        while level and left > 0 and len(found) < WANTED_RANGES:
            asked, level = level[:left], []
            left -= len(asked)
            surveys = [self._client.start(partial(self.folders, prefix)) for prefix in asked]
            for survey in surveys:
                prefixes = wait_for(survey)
                level += prefixes
            found.update(level)
        ordered = sorted(found, key=str.encode)
        step = -(-len(ordered) // MAX_RANGES) or 1
        return ordered[::step]

    def run(self) -> Iterator[Entry]:
        first = _Range(None, None)
        entries = wait_for(self._client.start(partial(self.page, first)))
        yield from entries
        if first.finished:
            return
        last = entries[-1][0] if entries else ""
        starts = [start for start in self.boundaries() if _before(last, start)]
        # The first page's own chain goes on to the first boundary behind it.
        ranges = [first, *(_Range(start, None) for start in starts)]
        for one, following in zip(ranges, starts, strict=False):
            one.end = following
        yield from self._side_by_side(ranges)

    def _side_by_side(self, ranges: Sequence[_Range]) -> Iterator[Entry]:
        coming = deque(ranges)
        active: deque[_Range] = deque()
        try:
            while coming or active:
                while coming and len(active) < SIDE_BY_SIDE:
                    active.append(coming.popleft())
                    self._go_on(active[-1])
                head = active[0]
                assert head.under_way is not None
                pages = wait_for(head.under_way)
                if head.finished:
                    active.popleft()
                else:
                    self._go_on(head)
                for page in pages:
                    yield from page
        finally:
            for one in active:
                if one.under_way is not None:
                    one.under_way.cancel()

    def _go_on(self, at: _Range) -> None:
        at.under_way = self._client.start(partial(self.pages, at))


def _before(key: str, other: str) -> bool:
    """S3 orders keys by their UTF-8 bytes."""
    return key.encode() < other.encode()


def iter_entries(
    client: S3Client, uri: str, bucket: str, prefix: str, *, page_keys: int | None = None
) -> Iterator[Entry]:
    """Every key below the prefix, in order; `page_keys` for a page is the store's choice where None."""
    return _Listing(client, uri, bucket, prefix, page_keys).run()
