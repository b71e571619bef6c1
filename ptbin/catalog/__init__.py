"""Questions about whole stores: which checkpoints are there, what becomes of each, what is done already.

`finding` lists, `planning` says where outputs go (pure), `finished` and `worklist` know what is up to date,
`jobtable` holds it, `collisions` refuses what wants one place,
`checks` refuses calls that cannot work. Listings are streams; what a run must remember of them lies on disk.
"""

from ptbin.catalog.checks import check_call
from ptbin.catalog.finding import find_checkpoints, find_manifests, find_one, find_orphans
from ptbin.catalog.finished import is_up_to_date
from ptbin.catalog.jobs import Found, Job, Problem, is_rejection, problem_of
from ptbin.catalog.planning import OutputRule, plan_outputs, relative_output

__all__ = [
    "Found",
    "Job",
    "OutputRule",
    "Problem",
    "check_call",
    "find_checkpoints",
    "find_manifests",
    "find_one",
    "find_orphans",
    "is_rejection",
    "is_up_to_date",
    "plan_outputs",
    "problem_of",
    "relative_output",
]
