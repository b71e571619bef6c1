"""What of DEST a planned job would write over: for dry runs, found as the run itself finds it.

A job whose place a listing has shown to be free costs nothing. Of any other the run's own first half is done:
its source's index is read and each place that it takes is looked at, several jobs side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ptbin.catalog.jobs import Job, Problem, problem_of
from ptbin.conversion import would_replace
from ptbin.errors import OutputExistsError, PtbinError
from ptbin.options import ConvertOptions
from ptbin.sources.sidecars import change_of
from ptbin.stores import place_of
from ptbin.stores.copying import find_in_place

__all__ = ["Marked", "iter_marked", "look_at_job", "may_replace_copy"]

WIDTH = 8
"""How many jobs are looked at side by side: that is waiting for small answers."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A job, the files that it would replace (names next to its output), or why it would replace none."""

    job: Job
    replaces: tuple[str, ...] = ()
    problem: Problem | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of a dry run's document."""
        job = self.job
        return {
            "source": job.source_uri,
            "dest": job.dest_uri,
            "size": job.source_size,
            "replaces": bool(self.replaces),
            "replaced": list(self.replaces),
        }


def iter_marked(jobs: Iterable[Job], look: Callable[[Job], list[str]]) -> Iterator[Marked]:
    """The jobs in their order. `look` says what a job replaces; it may raise OutputExistsError.

    What else is wrong with a source is not for a mark: the run says it.
    """

    def mark(job: Job) -> Marked:
        if _is_free(job):
            return Marked(job)
        try:
            return Marked(job, tuple(look(job)))
        except OutputExistsError as error:
            return Marked(job, problem=problem_of(job.source_uri, error))
        except PtbinError:
            return Marked(job)

    with ThreadPoolExecutor(WIDTH) as pool:
        yield from pool.map(mark, jobs)


def _is_free(job: Job) -> bool:
    standing = job.standing
    return standing is not None and standing.size is None and (standing.alone or job.copies)


def look_at_job(
    job: Job,
    options: ConvertOptions,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """What a conversion or a copy would replace. Raises OutputExistsError where it would refuse to."""
    if not job.copies:
        return would_replace(
            job.source_uri,
            job.dest_uri,
            options,
            source_options=source_options,
            dest_options=dest_options,
            standing=job.standing,
        )
    found = find_in_place(
        place_of(job.source_uri, source_options),
        place_of(job.dest_uri, dest_options),
        may_replace_copy(job, options) or (lambda _: True),
        change=change_of(job.dest_uri.rpartition("/")[2], options.dtype),
    )
    return [job.dest_uri.rpartition("/")[2]] if found is None else []


def may_replace_copy(job: Job, options: ConvertOptions) -> Callable[[str], bool] | None:
    """Which file a copy may replace, by its identity: one that the index of finished work knows.

    None: any, or a listing has shown that there is none.
    """
    standing = job.standing
    if options.force or standing is None:
        return None
    if standing.size is None and "://" in job.dest_uri:
        return None  # which spares a request
    return lambda identity: standing.is_known_copy and identity == standing.identity
