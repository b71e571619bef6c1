"""What the flows' parameters mean, in one place: Prefect's UI makes forms of it.

Prefect takes descriptions from a docstring's `Args:` and from nowhere else, so `described` writes that
section for a flow's function from this table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["DESCRIPTIONS", "described"]

Function = TypeVar("Function", bound=Callable[..., Any])

DESCRIPTIONS = {
    "source": "Where the files are: a path on the worker's machine or an fsspec URL (s3://bucket/prefix).",
    "dest": "Where the results go or are: a path or any fsspec URL.",
    "include": "Globs on the path below SOURCE: only these (sync: copy these too). run*/last.ckpt",
    "copy_links": "Follow symbolic links that lead out of SOURCE; else they are passed over and named.",
    "exclude": "Globs on the path below SOURCE: not these.",
    "format": "torch: as pytorch_model.bin; raw: bare tensors and a JSON index; safetensors.",
    "layout": "mirror: SOURCE's folders; hf: names that transformers looks for; of migrate: see --help.",
    "naming": "replace: last.ckpt becomes last.bin; append: last.ckpt.bin.",
    "select": "The state dict to take where a checkpoint holds several, as `inspect` lists them; or a list.",
    "flatten": "Make one state dict of nested mappings, names joined by dots.",
    "split": "Give each state dict of a checkpoint an output of its own: last.PATH.bin.",
    "strip_prefix": "Take this off all names; auto: module. and _orig_mod.",
    "rename": "Regular-expression replacements on tensor names, each OLD=NEW.",
    "drop": "Leave out tensors whose names match one of these regular expressions.",
    "dtype": "Cast floating-point tensors to this type, such as float16 or bfloat16.",
    "max_shard_size": "Cut larger outputs into shards: 5GB, 500MiB, ...",
    "parts": "Take single parts of checkpoints (rank files, shards) as they are; the manifest says so.",
    "recipe": "How parts make a whole and how tensors are named and cut: a shipped recipe's name, or JSON.",
    "tie_by_value": "Store equal matrices once, as tied.",
    "on_unsafe": "Pickles that can only be meant to run code: reject, or extract the weights all the same.",
    "verify": "Proof before an output counts: none, checksum (read it back), load (also open it with torch).",
    "level": "checksum: compare digests; load: also open each output with torch.",
    "force": "Do again what is up to date; restore: replace whatever lies at DEST.",
    "files_from": "Look at these files alone: paths below SOURCE, or a file that has one a line.",
    "retry_failed": "Look only at what failed: in the run of that id, or (last) as runs left it.",
    "fail_fast": "Begin nothing new after the first problem.",
    "runner": "What works on the batches: threads or processes of the worker, a Dask or a Ray cluster.",
    "runner_address": "A running Dask scheduler or Ray head, such as tcp://dask-scheduler:8786.",
    "workers": "Batches at once; empty: one a core (2 to 16), or as many as the cluster has threads.",
    "max_requests": "Requests to S3 under way at once, of the whole run.",
    "min_success": "Succeed if that share of the checkpoints does (0.99), acknowledged failures aside.",
    "deadline": "Stop the run after that long: seconds, or 45m, 6h, 1h30m.",
    "source_options": "Where SOURCE's storage options lie: block:NAME, block:KIND/NAME or env:NAME.",
    "dest_options": "Where DEST's storage options lie: block:NAME, block:KIND/NAME or env:NAME.",
    "run_id": "Leave empty. The name of the run's folder in DEST, given by callers that watch the run.",
    "delete": "Delete from DEST what runs put there and SOURCE no longer has; never when anything failed.",
    "max_delete": "If more outputs than that are gone from SOURCE, delete none.",
    "checksum": "Compare by content; times and ETags are not believed. Reads all weights and outputs.",
    "immutable": "Never change what is there: an output that differs is a failure.",
    "backup_dir": "A place for copies of what is written over or deleted, beside SOURCE and DEST.",
    "source_layout": "Of a directory registry: mirror, hf, triton, or a template such as {name}/{version}.",
    "versions": "Of each model: all versions, the latest, or those that have an alias.",
    "file_digest": "none: no SHA-256 of whole files of weights, which takes long where they are huge.",
    "provenance": "Write an in-toto statement with SLSA provenance beside each output.",
    "public_key": "Path on the worker of a PEM key: also check every model.sig, and that all is signed.",
    "model": "What builds the module: MODULE:CALLABLE on the worker, or transformers. Its code is run.",
    "model_args": "Arguments for it: an object of keyword arguments, or an array of positional ones.",
    "model_path": "The folder in which its module lies.",
    "save_as": "What to save: state-dict, module, torchscript or exported.",
    "example": "MODULE:CALLABLE that returns example inputs, for exported and traced modules.",
    "train": "Trace or export in training mode; a module keeps the mode that its code gives it.",
    "allow_missing": "Globs of tensor names that the weights need not have.",
    "allow_unexpected": "Globs of tensor names that the model need not have.",
}


def described(function: Function) -> Function:
    """Append an `Args:` section with the meaning of each parameter to the function's docstring."""
    lines = [f"    {name}: {DESCRIPTIONS[name]}" for name in inspect.signature(function).parameters]
    function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *lines, ""])
    return function
