"""`.bin` back to `.pt`: weights put into a model by a child process, proven, and only then published.

Without a model the output is a state dict, a splice as any other, and torch takes no part. With one, the
caller's code runs in child processes; what they saved is loaded once more in a fresh one, and its tensors
must have the digests that the weights have. Nothing appears at DEST before that.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ptbin.conversion import commit, convert, stage
from ptbin.errors import (
    CheckpointError,
    ModelMismatchError,
    NotFoundInStoreError,
    UsageError,
    VerificationError,
)
from ptbin.manifest import hex_crc32, utc_now
from ptbin.options import ConvertOptions
from ptbin.reading.selected import read_selected
from ptbin.restoring.children import python_path, run_child
from ptbin.sources import SourcePlace, find_source
from ptbin.state_dict import tensors_of
from ptbin.stores import Store, open_store
from ptbin.tensors import ByteRange, TensorRef
from ptbin.vouching import Place

__all__ = ["RestoreOptions", "SaveAs", "restore", "would_replace"]

SaveAs = Literal["state-dict", "module", "torchscript", "exported"]
Progress = Callable[[int], None]
CHUNK_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """What the restored file should be.

    Raises:
        UsageError: an unknown value, or one that needs a model where none is named.
    """

    model: str | None = None
    """`MODULE:CALLABLE` that builds the module, or `transformers`: the architecture of config.json."""
    model_args: dict[str, Any] | list[Any] | None = None
    """Keyword arguments, or positional ones."""
    model_path: str | None = None
    """Folder that is put first on the module search path of the child processes."""
    save_as: SaveAs | None = None
    """None: `module` where a model is named, else `state-dict`."""
    example: str | None = None
    """`MODULE:CALLABLE` that returns inputs, for `exported` and traced `torchscript`."""
    allow_missing: tuple[str, ...] = ()
    """Globs of names that the weights need not have."""
    allow_unexpected: tuple[str, ...] = ()
    """Globs of names that the model need not have."""
    select: str | None = None
    force: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.save_as is not None and self.save_as not in get_args(SaveAs):
            raise UsageError(f"as: {self.save_as!r} is not one of {', '.join(get_args(SaveAs))}")
        if self.model is None and self.save_as not in (None, "state-dict"):
            raise UsageError(f"--as {self.save_as} needs --model: only code can say what the module is")
        if self.model is not None and self.model != "transformers" and ":" not in self.model:
            raise UsageError(f"model: {self.model!r} is not of the form MODULE:CALLABLE")

    @property
    def form(self) -> SaveAs:
        return self.save_as or ("state-dict" if self.model is None else "module")

    def to_json(self) -> dict[str, Any]:
        """What shapes the output, as the manifest records it beside a conversion's options."""
        recorded = {key: value for key, value in asdict(self).items() if key not in ("force", "model_path")}
        return recorded | {"save_as": self.form}

    def conversion(self) -> ConvertOptions:
        return ConvertOptions(select=self.select, force=self.force)

    def fingerprint(self) -> str:
        if self.model is None:
            return self.conversion().fingerprint()
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), default=list)
        return hashlib.sha256(text.encode()).hexdigest()


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
    store, path = open_store(dest, dest_options)
    at = Place(store, path, None if options.force else "restored", is_free=is_free)
    at.check_vouched()
    with tempfile.TemporaryDirectory(prefix="ptbin-") as folder:
        weights, out = Path(folder) / "weights.bin", Path(folder) / "restored.pt"
        manifest = convert(
            source,
            str(weights),
            options.conversion(),
            source_options=source_options,
            run_id=run_id,
            progress=progress,
        )
        place = find_source(source, source_options)
        _build(place, weights, out, options, Path(folder))
        rows = _located(out, manifest)
        manifest["options"] = manifest["options"] | {"restore": options.to_json()}
        manifest["options_fingerprint"] = options.fingerprint()
        # It counts the weights that went in; the rows are of what ptbin finds in the file that torch made.
        manifest.pop("accounting", None)
        _publish(out, at, manifest, rows)
    return manifest


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
    store, path = open_store(dest, dest_options)
    Place(store, path, None if options.force else "restored").check_vouched()
    try:
        store.stat(path)
    except NotFoundInStoreError:
        return False
    return True


def _build(place: SourcePlace, weights: Path, out: Path, options: RestoreOptions, folder: Path) -> None:
    """Let the child build, compare, load and save; then let another one load the file."""
    config = None
    if options.model == "transformers":
        data = place.store.read_bytes(f"{place.folder}/config.json")
        config = folder / "config"
        config.mkdir()
        (config / "config.json").write_bytes(data)
    request = {
        "weights": str(weights),
        "out": str(out),
        "model": options.model,
        "args": options.model_args,
        "folders": _folders_of_code(options),
        "here": os.getcwd() if options.model_path is None else None,
        "as": options.form,
        "example": options.example,
        "allow_missing": list(options.allow_missing),
        "allow_unexpected": list(options.allow_unexpected),
        "config": str(config) if config is not None else None,
    }
    answer = run_child("ptbin.restoring.build", request, f"model {options.model}")
    if "mismatch" in answer:
        report = "\n".join([f"the weights do not fit {options.model}", *answer["mismatch"]])
        raise ModelMismatchError(report)
    _check(out, options, answer)


def _folders_of_code(options: RestoreOptions) -> list[str]:
    """Where the caller's modules may lie, by order of precedence."""
    named = [os.path.abspath(options.model_path)] if options.model_path is not None else []
    return named + python_path()


def _check(file: Path, options: RestoreOptions, built: Mapping[str, Any]) -> None:
    """A fresh process loads the file; every tensor of the weights must be in it, bit for bit.

    `built` is what the building process answered: digests, and the modules of the caller's that it loaded.

    Raises:
        VerificationError: it cannot be loaded, or a tensor differs.
    """
    wanted: dict[str, str] = built["digests"]
    request = {
        "file": str(file),
        "as": options.form,
        "folders": built.get("folders", []),
        "modules": built.get("modules", []),
    }
    neutral = options.model is None
    doing = "loading the restored file"
    try:
        found = run_child("ptbin.restoring.check", request, doing, neutral=neutral)["digests"]
    except UsageError as error:
        raise VerificationError(str(error)) from error
    wrong = [name for name, digest in wanted.items() if name in found and found[name] != digest]
    lost = [name for name in wanted if name not in found and "#" not in name]
    if wrong or (lost and options.form != "state-dict"):
        names = ", ".join((wrong or lost)[:5])
        raise VerificationError(f"the restored file, loaded again, differs from the weights in {names}")


def _located(out: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the manifest for the tensors, where ptbin's own reader finds them in the restored file."""
    store, path = open_store(str(out))
    try:
        with store.open_reader(path) as reader:
            state_dict = read_selected(reader, ConvertOptions(on_unsafe="extract")).state_dict
    except CheckpointError:
        return []
    of_weights = {row["name"]: row for row in manifest["tensors"]}
    rows = []
    for name, value in state_dict.entries:
        for label, tensor in tensors_of(name, value):
            known = of_weights.get(label)
            if known is None or not isinstance(tensor.storage.place, ByteRange):
                continue
            row = {k: known[k] for k in ("name", "source_name", "dtype", "shape", "nbytes", "sha256")}
            rows.append(row | {"offset": tensor.storage.place.offset + tensor.span[0]} | _stride(tensor))
    return rows


def _stride(tensor: TensorRef) -> dict[str, Any]:
    return {} if tensor.contiguous else {"stride": list(tensor.stride)}


def _publish(out: Path, at: Place, manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    store, path = at.store, at.path
    name = path.rpartition("/")[2]
    size = out.stat().st_size
    sha256, crc = hashlib.sha256(), 0
    with out.open("rb") as file, store.open_writer(path, size_hint=size) as writer:
        while piece := file.read(CHUNK_NBYTES):
            sha256.update(piece)
            crc = zlib.crc32(piece, crc)
            writer.write(piece)
        manifest["outputs"] = [
            {"path": name, "size": size, "sha256": sha256.hexdigest(), "crc32": hex_crc32(crc)}
        ]
        manifest["tensors"] = [row | {"file": name} for row in rows]
        manifest["finished_at"] = utc_now()
        manifest["bytes_written"] = size
        manifest["verification"] = {"level": "load", "status": "verified", "at": utc_now()}
        at.check(name, size, crc)
        at.withdraw_manifest(coming=manifest)
        writer.commit()
    _read_back(store, path, sha256.hexdigest())
    at.write_manifest(manifest)


def _read_back(store: Store, path: str, wanted: str) -> None:
    digest = hashlib.sha256()
    with store.open_reader(path) as reader:
        for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
            digest.update(piece)
    if digest.hexdigest() != wanted:
        store.delete(path)
        raise VerificationError(f"{store.uri_of(path)}: what is stored is not what was written")
