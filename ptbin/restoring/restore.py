"""`.bin` back to `.pt`: a state dict by a splice, or a model by the caller's code in processes of its own.

Without a model the output is a state dict, a splice as any other, and torch takes no part. With one, `models`
has it built and proven. Nothing appears at DEST before that, and nothing there is replaced that a manifest
does not vouch for as restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptbin.conversion import Progress, commit, stage
from ptbin.errors import NotFoundInStoreError, UsageError
from ptbin.restoring.models import restore_model
from ptbin.restoring.options import RestoreOptions
from ptbin.stores import open_store
from ptbin.vouching import Place

__all__ = ["restore", "would_replace"]


def restore(
    source: str,
    dest: str,
    options: RestoreOptions | None = None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
    is_free: bool = False,
) -> dict[str, Any]:
    """Restore one set of weights and return the manifest of the restored file.

    Args:
        source: `.bin` of format torch or raw, safetensors, an index of shards, or a folder.
        dest: the `.pt`; its manifest goes beside it.
        is_free: nothing is at `dest`, as a listing has shown; spares a request.

    Raises:
        OutputExistsError: a file is there that no manifest of `restore` vouches for, without `options.force`.
        ModelMismatchError: keys are missing, unexpected or of another shape; nothing was written.
        CheckpointError, VerificationError, StorageError, UsageError: as `ptbin.convert`.
    """
    options = options or RestoreOptions()
    if dest.lower().endswith(".safetensors"):
        raise UsageError(f"{dest}: restore makes files for torch; ptbin convert makes .safetensors")
    if options.model is None:
        draft = stage(
            source,
            dest,
            options.conversion(),
            source_options=source_options,
            dest_options=dest_options,
            run_id=run_id,
            progress=progress,
            guard="restored",
            is_free=is_free,
        )
        draft.manifest["options"]["restore"] = options.to_json()
        return commit(draft, source_options=source_options, dest_options=dest_options, progress=progress)
    at = _place_of(dest, options, dest_options, is_free=is_free)
    at.check_vouched()
    return restore_model(source, at, options, source_options=source_options, run_id=run_id, progress=progress)


def would_replace(
    dest: str,
    options: RestoreOptions,
    dest_options: Mapping[str, Any] | None = None,
    *,
    is_free: bool = False,
) -> bool:
    """Whether `restore` would replace a file at `dest`; for dry runs. Writes nothing.

    Raises:
        OutputExistsError: it would refuse to.
    """
    if is_free:
        return False
    at = _place_of(dest, options, dest_options)
    at.check_vouched()
    try:
        at.store.stat(at.path)
    except NotFoundInStoreError:
        return False
    return True


def _place_of(
    dest: str, options: RestoreOptions, dest_options: Mapping[str, Any] | None, *, is_free: bool = False
) -> Place:
    store, path = open_store(dest, dest_options)
    return Place(store, path, None if options.force else "restored", is_free=is_free)
