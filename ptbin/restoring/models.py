"""Weights into a model and the model into a file: what happens around the processes that run foreign code.

One process builds, loads and saves; a fresh one loads the file, and says what is in it. Every tensor must be
what it was in the model, and the weights must have been what the source holds. A local output is written in
its place, without a name, and gets the name when it is proven; for another store it is written to the
temporary folder and sent from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptbin.conversion import Progress
from ptbin.errors import CheckpointError, ModelMismatchError, UsageError, VerificationError
from ptbin.manifest import hex_crc32, identity_text, utc_now
from ptbin.options import ConvertOptions
from ptbin.reading.checkpoint import read_checkpoint
from ptbin.reading.search import find_state_dicts
from ptbin.reading.selected import read_selected
from ptbin.reading.selection import select_state_dict
from ptbin.restoring.children import Child, python_path, start_child
from ptbin.restoring.fitting import select_hint
from ptbin.restoring.options import RestoreOptions
from ptbin.restoring.weights import Weights, open_weights
from ptbin.sources import SourcePlace, find_source
from ptbin.state_dict import tensors_of
from ptbin.stores import Writer
from ptbin.tensors import ByteRange, TensorRef
from ptbin.vouching import Place

if TYPE_CHECKING:
    from ptbin.stores import Store

__all__ = ["restore_model"]

CHUNK_NBYTES = 4 << 20
NAMED = 5
_KINDS = {"exported": ".pt2"}
"""Suffixes that torch asks for."""


def restore_model(
    source: str,
    at: Place,
    options: RestoreOptions,
    *,
    source_options: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Restore into a model and return the manifest. Errors as `ptbin.restore`."""
    with tempfile.TemporaryDirectory(prefix="ptbin-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        place = find_source(source, source_options)
        weights = stack.enter_context(
            open_weights(
                source, options, folder, source_options=source_options, run_id=run_id, progress=progress
            )
        )
        out = stack.enter_context(_Output.begin(at, folder, options))
        # Both at once: the second imports torch while the first one builds the model.
        building = stack.enter_context(
            start_child("ptbin.restoring.build", f"model {options.model}", pass_fds=out.passed)
        )
        checking = stack.enter_context(
            start_child("ptbin.restoring.check", "loading the restored file", pass_fds=out.passed)
        )
        answer = _build(building, place, weights, out, options, folder)
        out.begin_hashing(stack)
        _check(checking, out, options, answer, folder)
        weights.compare(answer["given"], answer["views"])
        manifest = weights.manifest
        manifest["options"] = manifest["options"] | {"restore": options.to_json()}
        manifest["options_fingerprint"] = options.fingerprint()
        # It counts the weights that went in; the rows are of what ptbin finds in the file that torch made.
        manifest.pop("accounting", None)
        manifest["restored"] = {key: answer[key] for key in ("initial", "unused", "changed")}
        out.publish(manifest, lambda: _located(at.store, at.path, answer["inner"] | answer["facts"], weights))
    return manifest


class _Output:
    """The file under way: where the child processes write and read it, and how it gets to its place."""

    def __init__(self, at: Place, writer: Writer, link: Path, descriptor: int | None) -> None:
        self._at, self._writer = at, writer
        self.link = link
        """The path by which children reach it."""
        self.descriptor = descriptor
        self._sha256: Future[str] | None = None
        self._crc32: Future[int] | None = None

    @classmethod
    @contextlib.contextmanager
    def begin(cls, at: Place, folder: Path, options: RestoreOptions) -> Iterator[_Output]:
        # torch calls an archive's top folder after the file it writes to: one name, whatever DEST is called.
        link = folder / ("restored" + _KINDS.get(options.form, ".pt"))
        with at.store.open_writer(at.path, copies=False) as writer:
            descriptor = writer.lend()
            if descriptor is not None:
                link.symlink_to(f"/proc/self/fd/{descriptor}")
            yield cls(at, writer, link, descriptor)

    @property
    def passed(self) -> tuple[int, ...]:
        """Descriptors that a child needs."""
        return () if self.descriptor is None else (self.descriptor,)

    def begin_hashing(self, stack: contextlib.ExitStack) -> None:
        """Hash the whole file, which is written by now, on threads that `stack` ends."""
        pool = stack.enter_context(ThreadPoolExecutor(2))

        def sha256() -> str:
            digest = hashlib.sha256()
            for piece in self._pieces():
                digest.update(piece)
            return digest.hexdigest()

        def crc32() -> int:
            crc = 0
            for piece in self._pieces():
                crc = zlib.crc32(piece, crc)
            return crc

        self._sha256, self._crc32 = pool.submit(sha256), pool.submit(crc32)

    def _pieces(self) -> Iterator[bytes]:
        with self.link.open("rb") as file:
            while piece := file.read(CHUNK_NBYTES):
                yield piece

    def publish(self, manifest: dict[str, Any], located: Any) -> None:
        """Give the file its place, its manifest last."""
        store, path = self._at.store, self._at.path
        name = path.rpartition("/")[2]
        assert self._sha256 is not None
        assert self._crc32 is not None
        sha256, crc, size = self._sha256.result(), self._crc32.result(), self.link.stat().st_size
        if self.descriptor is not None:
            self._writer.take_back()
        else:
            for piece in self._pieces():
                self._writer.write(piece)
        manifest["outputs"] = [{"path": name, "size": size, "sha256": sha256, "crc32": hex_crc32(crc)}]
        manifest["tensors"] = []
        manifest["finished_at"] = utc_now()
        manifest["bytes_written"] = size
        manifest["bytes_copied_in_store"] = 0
        manifest["verification"] = {"level": "load", "status": "verified", "at": utc_now()}
        self._at.check(name, size, crc)
        self._at.withdraw_manifest((name, size, crc))
        self._writer.commit()
        if seen := identity_text(self._writer.identity):
            manifest["verification"]["identities"] = {name: seen}
        if self.descriptor is None:
            _read_back(store, path, sha256)
        manifest["tensors"] = [row | {"file": name} for row in located()]
        self._at.write_manifest(manifest)


def _build(
    child: Child, place: SourcePlace, weights: Weights, out: _Output, options: RestoreOptions, folder: Path
) -> dict[str, Any]:
    """Let the child build, load and save.

    Raises:
        ModelMismatchError: the weights do not fit. UsageError: the caller's code cannot be used.
    """
    config = None
    if options.model == "transformers":
        data = place.store.read_bytes(f"{place.folder}/config.json")
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
        raise ModelMismatchError("\n".join([*lines, *_other_choice(place, options, *answer["names"])]))
    return answer


def _other_choice(
    place: SourcePlace, options: RestoreOptions, weights: Sequence[str], model: Sequence[str]
) -> list[str]:
    """The state dict of the source that would fit better than the one that was taken, if there is one."""
    with place.open() as reader:
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
    child: Child, out: _Output, options: RestoreOptions, built: Mapping[str, Any], folder: Path
) -> None:
    """A fresh process loads the file; every tensor of the model must be in it, bit for bit.

    Raises:
        VerificationError: it cannot be loaded, a tensor differs, or the example's outputs do.
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
    wanted: dict[str, str] = built["facts"]
    found: dict[str, str] = answer["facts"]
    if options.form != "module":
        ties = [set(names) for names in built["ties"]]
        wanted = built["state"] if options.form != "state-dict" else built["written"]
        if options.form == "exported":  # a tied tensor is kept under one of its names
            tied = {name for names in ties for name in names if names & found.keys()}
            wanted = {name: text for name, text in wanted.items() if name in found or name not in tied}
    wrong = [label for label in wanted if found.get(label) != wanted[label]]
    if wrong:
        names = ", ".join(wrong[:NAMED]) + (f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else "")
        raise VerificationError(f"the restored file, loaded again, differs from the model in {names}")
    if answer.get("same_outputs") is False:
        raise VerificationError(
            "the restored file, loaded again, answers the example inputs differently from the model"
        )


def _located(store: Store, path: str, facts: Mapping[str, str], weights: Weights) -> list[dict[str, Any]]:
    """Rows of the manifest for the tensors, where ptbin's own reader finds them in the restored file."""
    try:
        with store.open_reader(path) as reader:
            state_dict = read_selected(reader, ConvertOptions(on_unsafe="extract")).state_dict
    except CheckpointError:
        return []
    rows = []
    for name, value in state_dict.entries:
        for label, tensor in tensors_of(name, value):
            digest = facts.get(label, "").rpartition(" ")[2]
            if not digest or not isinstance(tensor.storage.place, ByteRange):
                continue
            row = {
                "name": label,
                "source_name": weights.source_names.get(label, label),
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                "nbytes": tensor.nbytes,
                "sha256": digest,
                "offset": tensor.storage.place.offset + tensor.span[0],
            }
            rows.append(row | _stride(tensor))
    return rows


def _stride(tensor: TensorRef) -> dict[str, Any]:
    return {} if tensor.contiguous else {"stride": list(tensor.stride)}


def _read_back(store: Store, path: str, wanted: str) -> None:
    digest = hashlib.sha256()
    with store.open_reader(path) as reader:
        for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
            digest.update(piece)
    if digest.hexdigest() != wanted:
        store.delete(path)
        raise VerificationError(f"{store.uri_of(path)}: what is stored is not what was written")
