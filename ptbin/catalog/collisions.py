"""Jobs that want one place: outputs of one name, copies in the way of what lies next to an output, shards.

Decided by names alone, before anything is written. Being there first wins no such place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ptbin.catalog.jobs import Problem
from ptbin.catalog.jobtable import LEFT_ALONE, REFUSED, JobTable
from ptbin.catalog.planning import settle_collision
from ptbin.errors import OutputCollisionError
from ptbin.manifests.provenance import STATEMENT_SUFFIX
from ptbin.options import ConvertOptions
from ptbin.sources.leftovers import is_leftover
from ptbin.sources.output_names import SHARD_NUMBER, split_bases
from ptbin.sources.part_names import INDEX_SUFFIX


def suffixes_beside(options: ConvertOptions) -> list[str]:
    """Of the files that lie next to an output with these options, known before it is made."""
    index = [INDEX_SUFFIX] if options.format == "raw" or options.max_shard_size is not None else []
    return index + ([STATEMENT_SUFFIX] if options.provenance else [])


def settle_collisions(table: JobTable, options: ConvertOptions) -> list[Problem]:
    """Refuse the jobs that cannot all have their places; a problem for each. Under the table's lock.

    What is a leftover of training by its name (`optimizer.pt` next to `optimizer.bin`) gives way; that is not
    a problem.
    """
    problems = []
    shared = "SELECT place FROM jobs GROUP BY place HAVING count(*) > 1"
    for (place,) in table.db.execute(shared).fetchall():
        same = list(table.select("place = ?", (place,)))
        alone = [(number, job) for number, job in same if not job.copies and is_leftover(job.path)]
        table.db.executemany(
            "UPDATE jobs SET state = ? WHERE id = ?", [(LEFT_ALONE, number) for number, _ in alone]
        )
        same = [pair for pair in same if pair not in alone]
        if not same:
            continue
        wins, refused = settle_collision([job for _, job in same], table.rule)
        problems += refused
        losers = [(REFUSED, number) for number, job in same if job not in wins]
        table.db.executemany("UPDATE jobs SET state = ? WHERE id = ?", losers)
    return (
        problems
        + _refuse_beside(table, options)
        + _refuse_shards(table, options)
        + _refuse_parts(table, options)
    )


def _refuse_beside(table: JobTable, options: ConvertOptions) -> list[Problem]:
    """Copies that would go where an output's index or statement goes."""
    problems = []
    for suffix in suffixes_beside(options):
        shared = (
            "SELECT copied.id, made.path "
            "FROM jobs made JOIN jobs copied ON copied.place = made.place || ? "
            "WHERE copied.copies AND NOT made.copies AND made.certain "
            "AND copied.state != ? AND made.state != ?"
        )
        for number, path in table.db.execute(shared, (suffix, REFUSED, REFUSED)).fetchall():
            problems.append(_refuse_for(table, number, f"a file of the output of {path}"))
    return problems


def _refuse_shards(table: JobTable, options: ConvertOptions) -> list[Problem]:
    """Files that would go where a shard of another output may go, and those others."""
    if options.max_shard_size is None:
        return []
    return _refuse_inside(table, "%-of-%", lambda place: [SHARD_NUMBER.sub("", place)], "shard")


def _refuse_parts(table: JobTable, options: ConvertOptions) -> list[Problem]:
    """Files that would go where a part of another output may go (`a.generator.bin` of `a.bin`), and those
    others: the names of the parts are only known once the checkpoint is read.
    """
    return _refuse_inside(table, "%.%.%", split_bases, "part") if options.split else []


def _refuse_inside(
    table: JobTable, pattern: str, bases: Callable[[str], Iterable[str]], what: str
) -> list[Problem]:
    """Refuse files that may be a `what` of the outputs which `bases` derives from their place, and these."""
    refused: dict[int, str] = {}
    named = "SELECT id, place, path, copies FROM jobs WHERE place LIKE ? AND certain AND state != ?"
    whole = "SELECT id, path FROM jobs WHERE place = ? AND NOT copies AND certain AND state != ?"
    for number, place, path, copies in table.db.execute(named, (pattern, REFUSED)).fetchall():
        for base in bases(place):
            if base == place:
                continue
            for other, its_path in table.db.execute(whole, (base, REFUSED)).fetchall():
                refused[number] = f"a {what} of the output of {its_path}"
                if not copies:
                    refused[other] = f"the output of {path}, under the name of one of its {what}s"
    return [_refuse_for(table, number, why) for number, why in refused.items()]


def _refuse_for(table: JobTable, number: int, what: str) -> Problem:
    ((_, job),) = table.select("id = ?", (number,))
    table.db.execute("UPDATE jobs SET state = ? WHERE id = ?", (REFUSED, number))
    advice = "leave one out with --exclude" + ("" if job.copies else ", or use --naming append")
    detail = f"{job.path} is to go to {job.dest_uri}, which is in the way of {what}; {advice}"
    return Problem(job.source_uri, OutputCollisionError.reason, detail)
