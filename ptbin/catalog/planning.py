"""Where each checkpoint's output goes. Pure: no store is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptbin.catalog.jobs import Found, Job, Problem
from ptbin.errors import OutputCollisionError
from ptbin.options import Layout, Naming
from ptbin.sources.part_names import INDEX_SUFFIX
from ptbin.sources.suffixes import CHECKPOINT_SUFFIXES, suffix_of
from ptbin.stores import ListedObject
from ptbin.values.names import bad_name, is_plain_path, shown_path
from ptbin.writing.formats import OUTPUT_SUFFIXES, OutputFormat

NAMED = 5
"""How many of the files that collide are named in each problem."""

OUTPUT_SUFFIX = ".bin"

# Stems under which Hugging Face folders keep their weights: the folder is the model, not the file.
_HF_STEMS = ("model", "pytorch_model", "adapter_model")


def plan_outputs(
    found: Iterable[Found],
    dest: str | os.PathLike[str],
    *,
    naming: Naming = "replace",
    format: OutputFormat = "torch",  # noqa: A002 - as ConvertOptions calls it
    layout: Layout = "mirror",
    suffix: str | None = None,
) -> tuple[list[Job], list[Problem]]:
    """Where each checkpoint's output goes, and those that would share one (none of them is converted).

    Pure. `replace` puts `.bin` in the place of the suffix, `append` behind it. Layout `hf` gives each
    checkpoint a folder, unless it lies in one under a name of Hugging Face's already. `suffix` is that of
    the outputs where they are of another kind (`.pt`).
    """
    rule = OutputRule(os.fspath(dest), naming, suffix or OUTPUT_SUFFIXES[format], layout)
    jobs: dict[str, list[Job]] = {}
    problems: list[Problem] = []
    for item in found:
        planned_one = rule.apply(item)
        if isinstance(planned_one, Problem):
            problems.append(planned_one)
        else:
            jobs.setdefault(rule.place_of(planned_one), []).append(planned_one)
    planned: list[Job] = []
    for same in jobs.values():
        wins, refused = settle_collision(same, rule)
        planned.extend(wins)
        problems.extend(refused)
    return planned, problems


@dataclass(frozen=True, slots=True)
class OutputRule:
    """How outputs below DEST are named; see `plan_outputs`."""

    dest: str
    naming: Naming = "replace"
    suffix: str = OUTPUT_SUFFIX
    layout: Layout = "mirror"
    folds_case: bool = True
    """Whether DEST takes names that differ only in case for one; where that is not known, it may."""

    @property
    def base(self) -> str:
        return self.dest.rstrip("/") or self.dest

    def apply(self, item: Found) -> Job | Problem:
        """Where this one goes, or why it may not go anywhere."""
        if (problem := _unsafe_path(item.path, item.uri)) is not None:
            return problem
        output = relative_output(item.path, self.naming, self.suffix, self.layout)
        return Job(item.uri, item.size, f"{self.base}/{output}", item.path, item.certain, item.identity)

    def copy(self, item: ListedObject) -> Job | Problem:
        """Where a file goes that is to be there as it is."""
        if (problem := _unsafe_path(item.path, item.uri)) is not None:
            return problem
        return Job(
            item.uri, item.size, f"{self.base}/{item.path}", item.path, True, item.identity, copies=True
        )

    def beside_weights(self, path: str, output: str) -> str | None:
        """Where in layout `hf` a second copy of a file of SOURCE goes, for weights put at `output`.

        None where the weights' folder is not one that this layout adds: there the first copy serves.
        """
        if self.layout != "hf":
            return None
        folder = output.rpartition("/")[0]
        above, slash, name = path.rpartition("/")
        if not folder or folder.rpartition("/")[0] != above:
            return None
        del slash
        return f"{folder}/{name}"

    def relative(self, job: Job) -> str:
        """Path of the job's output below DEST."""
        return job.dest_uri[len(self.base) + 1 :]

    def place_of(self, job: Job) -> str:
        """Equal for two jobs that would write one file."""
        return self.fold(self.relative(job))

    def fold(self, path: str) -> str:
        """Equal for two paths below DEST that are one file there."""
        return path.casefold() if self.folds_case else path


def _unsafe_path(path: str, uri: str) -> Problem | None:
    parts = path.split("/")
    for number, part in enumerate(parts):
        if why := bad_name(part):
            # Of a folder, once for all that lies in it.
            after = "/".join(parts[number + 1 :])
            place = shown_path(uri.removesuffix(f"/{after}") + "/" if after else uri)
            return Problem(place, "unsafe_path", f"the name {part!a} {why}; rename it first")
    if not is_plain_path(path):
        return Problem(uri, "unsafe_path", f"{path!r} is not a plain relative path; rename the object first")
    return None


def settle_collision(same: Sequence[Job], rule: OutputRule) -> tuple[list[Job], list[Problem]]:
    """Of jobs that map to one output, what is done all the same, and what is refused."""
    if len(same) == 1:
        return list(same), []
    # Files that only their content could make a checkpoint do not stand in the way of certain ones.
    certain = [job for job in same if job.certain]
    if len(certain) == 1:
        return certain, []
    problems = []
    for job in certain or same:
        others = [other.path for other in same if other is not job]
        named = ", ".join(others[:NAMED]) + (
            f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        )
        problems.append(
            Problem(
                job.source_uri,
                OutputCollisionError.reason,
                f"{job.path} and {named} both map to {job.dest_uri}; {_advice(same, rule)}",
            )
        )
    return [], problems


def _advice(same: Sequence[Job], rule: OutputRule) -> str:
    """What to do about jobs of one place, with the options that are given already."""
    if len({rule.fold(job.path) for job in same}) < len(same):
        return "DEST takes names that differ only in case for one: rename one, or leave it out by --exclude"
    appended = {
        rule.fold(job.path if job.copies else relative_output(job.path, "append", rule.suffix, rule.layout))
        for job in same
    }
    if rule.naming == "replace" and len(appended) == len(same):
        return "--naming append keeps them apart"
    return "leave one out with --exclude"


def relative_output(
    path: str, naming: Naming, output_suffix: str = OUTPUT_SUFFIX, layout: Layout = "mirror"
) -> str:
    """Path of the output below DEST for a checkpoint at `path` below SOURCE."""
    path = path.removesuffix(INDEX_SUFFIX)
    folder, slash, name = path.rpartition("/")
    if layout == "hf":
        stem = name.rpartition(".")[0]
        adapter = stem == "adapter_model"
        own = "adapter_model" if adapter else "model" if output_suffix == ".safetensors" else "pytorch_model"
        if stem in _HF_STEMS:
            return f"{folder}{slash}{own}{output_suffix}"
        inside = path if naming == "append" else relative_output(path, naming, "")
        return f"{inside}/{own}{output_suffix}"
    if naming == "append":
        return f"{path}{output_suffix}"
    stem = name[: -len(".tar")] if name.lower().endswith((".pth.tar", ".pt.tar", ".ckpt.tar")) else name
    suffix = suffix_of(stem)
    if suffix in CHECKPOINT_SUFFIXES:
        stem = stem[: -len(suffix)]
    return f"{folder}{slash}{stem}{output_suffix}"
