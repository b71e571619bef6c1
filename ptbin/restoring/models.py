"""Weights into a model and the model into a file: what happens around the processes that run foreign code.

One process builds, loads and saves; a fresh one loads the file, and says what is in it. Every tensor must be
what it was in the model, and the weights must have been what the source holds. Both map their file, and tell
where a tensor lies in it instead of hashing it: this process compares the two files (`_compare`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptbin.conversion import Progress
from ptbin.errors import CheckpointError, ModelMismatchError, UsageError, VerificationError
from ptbin.manifests.vouching import OutputSite
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.search import find_state_dicts
from ptbin.reading.selection import select_state_dict
from ptbin.restoring.children import Child, python_path, start_child
from ptbin.restoring.facts import Fact, Facts, view_of
from ptbin.restoring.fitting import select_hint
from ptbin.restoring.options import RestoreOptions
from ptbin.restoring.output import Output
from ptbin.restoring.weights import Weights, open_weights
from ptbin.sources.opening import SourcePlace, find_source
from ptbin.stores import Place

NAMED = 5


def restore_model(
    source: Place,
    at: OutputSite,
    options: RestoreOptions,
    *,
    run_id: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Restore into a model and return the manifest. Errors as `ptbin.restore`."""
    with tempfile.TemporaryDirectory(prefix="ptbin-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        opened = find_source(source)
        weights = stack.enter_context(open_weights(source, options, folder, run_id=run_id, progress=progress))
        out = stack.enter_context(Output.begin(at, folder, options, progress))
        # Both at once: the second imports torch while the first one builds the model.
        building = stack.enter_context(
            start_child("ptbin.restoring.build", f"model {options.model}", pass_fds=out.passed)
        )
        checking = stack.enter_context(
            start_child("ptbin.restoring.check", "loading the restored file", pass_fds=out.passed)
        )
        answer = _build(building, opened, weights, out, options, folder)
        out.begin_hashing(stack)
        weights.check_given(answer["given"])
        found = _check(checking, out, options, answer, folder)
        out.wait()
        _compare(_wanted(answer, found, options), found, weights, out)
        changed = answer["lost"] + [
            name for name, fact in answer["loaded"].items() if not weights.is_given(name, fact)
        ]
        weights.read_rest()
        manifest = weights.manifest
        manifest["options"] = manifest["options"] | {"restore": options.to_json()}
        manifest["options_fingerprint"] = options.fingerprint()
        # It counts the weights that went in; the rows are of what ptbin finds in the file that torch made.
        manifest.pop("accounting", None)
        manifest["restored"] = {
            "initial": answer["initial"],
            "unused": answer["unused"],
            "changed": [name for name in answer["given"] if name in set(changed)],
        }
        manifest["tensors"] = out.rows(weights.source_names, found)
        out.publish(manifest)
    return manifest


def _build(
    child: Child, source: SourcePlace, weights: Weights, out: Output, options: RestoreOptions, folder: Path
) -> dict[str, Any]:
    """Let the child build, load and save.

    Raises:
        ModelMismatchError: the weights do not fit. UsageError: the caller's code cannot be used.
    """
    config = None
    if options.model == "transformers":
        data = (source.folder / "config.json").read_bytes()
        config = folder / "config"
        config.mkdir()
        (config / "config.json").write_bytes(data)
    named = [os.path.abspath(options.model_path)] if options.model_path is not None else []
    request = {
        "weights": weights.archive,
        "out": str(out.link),
        "expected": str(folder / "expected.pt"),
        "model": options.model,
        "args": options.model_args,
        # By order of precedence; the working folder only for a module that is found nowhere else.
        "folders": named + python_path(),
        "here": os.getcwd() if options.model_path is None else None,
        "as": options.form,
        "train": options.train,
        "example": options.example,
        "allow_missing": list(options.allow_missing),
        "allow_unexpected": list(options.allow_unexpected),
        "config": str(config) if config is not None else None,
    }
    answer = child.ask(request)
    if "mismatch" in answer:
        lines = [f"the weights do not fit {options.model}", *answer["mismatch"]]
        raise ModelMismatchError("\n".join([*lines, *_other_choice(source, options, *answer["names"])]))
    return answer


def _other_choice(
    source: SourcePlace, options: RestoreOptions, weights: Sequence[str], model: Sequence[str]
) -> list[str]:
    """The state dict of the source that would fit better than the one that was taken, if there is one."""
    with source.open() as reader:
        try:
            checkpoint = read_checkpoint(reader, options.conversion().limits)
            found = find_state_dicts(checkpoint, options.conversion().limits)
            names = {
                candidate.path: [name for name, _ in select_state_dict(checkpoint, candidate.path).entries]
                for candidate in found.candidates
            }
        except CheckpointError:
            return []
    return select_hint(names, weights, model)


def _check(
    child: Child, out: Output, options: RestoreOptions, built: Mapping[str, Any], folder: Path
) -> Facts:
    """A fresh process loads the file, answers the example's inputs as the model did, and says what is in it.

    Raises:
        VerificationError: it cannot be loaded, or the example's outputs differ.
    """
    request = {
        "file": str(out.link),
        "as": options.form,
        "folders": built["folders"],
        "modules": built["modules"],
        "expected": str(folder / "expected.pt") if built["has_outputs"] else None,
    }
    try:
        answer = child.ask(request)
    except UsageError as error:
        raise VerificationError(str(error)) from error
    if answer.get("same_outputs") is False:
        raise VerificationError(
            "the restored file, loaded again, answers the example inputs differently from the model"
        )
    facts: Facts = answer["facts"]
    return facts


def _wanted(built: Mapping[str, Any], found: Facts, options: RestoreOptions) -> Facts:
    """What must be in the file: everything of a module, of other forms what they keep."""
    wanted: Facts = built[{"module": "facts", "state-dict": "written"}.get(options.form, "state")]
    if options.form != "exported":
        return wanted
    # a tied tensor is kept under one of its names
    ties = [set(names) for names in built["ties"]]
    tied = {name for names in ties for name in names if names & found.keys()}
    return {name: fact for name, fact in wanted.items() if name in found or name not in tied}


def _compare(wanted: Facts, found: Facts, weights: Weights, out: Output) -> None:
    """Every tensor of the model is in the file, bit for bit.

    A tensor that is a record of the source in the model, and a record of the file in the fresh process, is
    compared by what the source states as CRC-32 and what the file has; any other by SHA-256.

    Raises:
        VerificationError: with the names of those that differ.
    """
    wrong = [label for label, fact in wanted.items() if not _is_same(fact, found.get(label), weights, out)]
    if wrong:
        names = ", ".join(wrong[:NAMED]) + (f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else "")
        raise VerificationError(f"the restored file, loaded again, differs from the model in {names}")


def _is_same(wanted: Fact, found: Fact | None, weights: Weights, out: Output) -> bool:
    if found is None or list(wanted[:2]) != list(found[:2]):
        return False
    own, copy = view_of(wanted), view_of(found)
    if own is not None and copy is not None:
        stated, had = weights.crc32_at(own.offset), out.crc32_at(copy.offset)
        same_place = (own.storage_offset, own.stride) == (copy.storage_offset, copy.stride)
        if stated is not None and stated == had and same_place:
            weights.mark_proven(own.offset)
            return True
    given = wanted[2] if own is None else weights.sha256_of(own)
    return bool(given == (found[2] if copy is None else out.sha256_of(copy)))
