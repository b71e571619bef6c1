"""Jobs that want one place: outputs of one name, copies in the way of what lies beside an output, shards.

Decided by names alone, before anything is written. Nobody wins such a place by being there first.
"""

from __future__ import annotations

from ptbin.catalog.finding import SHARD_NUMBER, split_bases
from ptbin.catalog.jobs import Problem
from ptbin.catalog.jobtable import LEFT_ALONE, REFUSED, JobTable
from ptbin.catalog.planning import settle_collision
from ptbin.errors import OutputCollisionError
from ptbin.manifests.provenance import STATEMENT_SUFFIX
from ptbin.options import ConvertOptions
from ptbin.sources.companions import is_companion
from ptbin.sources.folders import INDEX_SUFFIX

__all__ = ["settle_collisions", "suffixes_beside"]


def suffixes_beside(options: ConvertOptions) -> list[str]:
    """Of the files that lie beside an output with these options, known before it is made."""
    index = [INDEX_SUFFIX] if options.format == "raw" or options.max_shard_size is not None else []
    return index + ([STATEMENT_SUFFIX] if options.provenance else [])


def settle_collisions(table: JobTable, options: ConvertOptions) -> list[Problem]:
    """Refuse the jobs that cannot all have their places; a problem for each. Under the table's lock.

    What is a companion by its name (`optimizer.pt` next to `optimizer.bin`) gives way, and is no problem.
    """
    problems = []
    shared = "SELECT place FROM jobs GROUP BY place HAVING count(*) > 1"
    for (place,) in table.db.execute(shared).fetchall():
        same = list(table.select("place = ?", (place,)))
        alone = [(number, job) for number, job in same if not job.copies and is_companion(job.path)]
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
    refused: dict[int, str] = {}
    query = "SELECT id, place, path, copies FROM jobs WHERE place LIKE '%-of-%' AND certain AND state != ?"
    for number, place, path, copies in table.db.execute(query, (REFUSED,)).fetchall():
        whole = SHARD_NUMBER.sub("", place)
        if whole == place:
            continue
        query = "SELECT id, path FROM jobs WHERE place = ? AND NOT copies AND certain AND state != ?"
        for other, its_path in table.db.execute(query, (whole, REFUSED)).fetchall():
            refused[number] = f"a shard of the output of {its_path}"
            if not copies:
                refused[other] = f"the output of {path}, under the name of one of its shards"
    return [_refuse_for(table, number, what) for number, what in refused.items()]


def _refuse_parts(table: JobTable, options: ConvertOptions) -> list[Problem]:
    """Files that would go where a part of another output may go (`a.generator.bin` of `a.bin`), and those
    others: what the parts are called is only known once the checkpoint is read.
    """
    if not options.split:
        return []
    refused: dict[int, str] = {}
    query = "SELECT id, place, path, copies FROM jobs WHERE place LIKE '%.%.%' AND certain AND state != ?"
    for number, place, path, copies in table.db.execute(query, (REFUSED,)).fetchall():
        for base in split_bases(place):
            query = "SELECT id, path FROM jobs WHERE place = ? AND NOT copies AND certain AND state != ?"
            for other, its_path in table.db.execute(query, (base, REFUSED)).fetchall():
                refused[number] = f"a part of the output of {its_path}"
                if not copies:
                    refused[other] = f"the output of {path}, under the name of one of its parts"
    return [_refuse_for(table, number, what) for number, what in refused.items()]


def _refuse_for(table: JobTable, number: int, what: str) -> Problem:
    ((_, job),) = table.select("id = ?", (number,))
    table.db.execute("UPDATE jobs SET state = ? WHERE id = ?", (REFUSED, number))
    advice = "leave one out with --exclude" + ("" if job.copies else ", or use --naming append")
    detail = f"{job.path} is to go to {job.dest_uri}, which is in the way of {what}; {advice}"
    return Problem(job.source_uri, OutputCollisionError.reason, detail)
