"""A manifest as a side: types, shapes, digests and ties without a byte of weights.

The outputs next to it are opened only where digests cannot decide: one side has none, a tolerance was asked
for, or a quantized tensor's scale is wanted, which no manifest states.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ptbin.differences.sides import Side, SideTensor, quantizer_of, refuse_sparse, tie_groups
from ptbin.errors import (
    CorruptArchiveError,
    NoStateDictError,
    NotFoundInStoreError,
    OutputCollisionError,
    UsageError,
    VerificationError,
)
from ptbin.manifests.manifest import MANIFEST_SUFFIX, parse_manifest
from ptbin.options import ConvertOptions
from ptbin.proof.output import stored_tensor
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.keys import new_names
from ptbin.reading.selection import select_state_dict
from ptbin.sources.folders import INDEX_SUFFIX
from ptbin.stores import ListedObject, Place, RangeReader
from ptbin.stores.joined import JoinedReader, part_base
from ptbin.values.dtypes import BY_NAME
from ptbin.values.state_dict import iter_tensors
from ptbin.values.tensors import ByteRange, Storage, TensorRef, dense_strides, extent_of

MAX_MANIFEST_NBYTES = 2 << 30
"""A manifest of a million tensors is 300 MB."""
_SPARSE_INDICES = ("indices", "crow_indices", "ccol_indices")


def is_manifest(name: str) -> bool:
    """Whether a file of this name is a manifest, by its suffix."""
    return name.endswith(MANIFEST_SUFFIX) or (name.endswith(".json") and not name.endswith(INDEX_SUFFIX))


class ManifestSide(Side):
    """A manifest.

    Raises:
        VerificationError: it is not one, or its rows are not consistent.
        UsageError: options that choose a state dict. StorageError: from the store.
    """

    container = "manifest"

    def __init__(self, place: Place, options: ConvertOptions) -> None:
        if options.selected_paths or options.flatten or options.split:
            raise UsageError(f"{place.uri} is a manifest: it lists one output, there is nothing to select")
        self._limits = options.limits
        self._place = place
        self.uri = place.uri
        data = self._place.read_bytes(limit=MAX_MANIFEST_NBYTES)
        self._parts: tuple[ListedObject, ...] | None = None
        self._storages: dict[Any, Storage] = {}
        with as_checkpoint_errors(self.uri):
            self._manifest = parse_manifest(data, self.uri)
            del data
            self._rows: dict[str, dict[str, Any]] = {}
            for name, row in _named_rows(self._manifest, options, self.uri):
                if self._rows.setdefault(name, row) is not row:
                    raise OutputCollisionError(f"{self.uri}: two tensors would both be named {name!r}")
            self.tensors = {name: self._tensor(row) for name, row in self._rows.items()}
            self._refuse_sparse()
            self._add_quantizers()
            self.ties = tie_groups(
                (row["file"], row["offset"], row["offset"] + _extent(row, tensor), name)
                for (name, row), tensor in zip(self._rows.items(), self.tensors.values(), strict=True)
                if row["nbytes"]
            )

    def view(self, name: str) -> TensorRef:
        row, tensor = self._rows[name], self.tensors[name]
        number, output = next(
            (number, output)
            for number, output in enumerate(self._manifest["outputs"])
            if output["path"] == row["file"]
        )
        if tensor.nbytes > max(output["size"], self._limits.expanded_nbytes):
            raise VerificationError(
                f"{self.uri}: {name[:200]!r} is {tensor.nbytes} bytes, its file {output['size']}"
            )
        stride = tuple(row["stride"]) if row.get("stride") is not None else dense_strides(tensor.shape)
        storage = self._storages.get(tensor.key)
        if storage is None:
            place = ByteRange(part_base(number) + row["offset"], _extent(row, tensor), member=repr(name))
            storage = self._storages[tensor.key] = Storage(name, place.nbytes, place)
        return TensorRef(storage, tensor.dtype, tensor.shape, stride, flags=tensor.flags)

    def open_weights(self) -> RangeReader:
        """The outputs next to the manifest.

        Raises:
            NotFoundInStoreError: they are not there. CorruptArchiveError: they have another size.
        """
        if self._parts is None:
            self._parts = tuple(self._listed(output) for output in self._manifest["outputs"])
        return JoinedReader(self._place.parent, self._parts, uri=self.uri)

    def has_weights(self) -> bool:
        """Whether the outputs are next to the manifest."""
        try:
            self.open_weights().close()
        except NotFoundInStoreError:
            return False
        return True

    def _listed(self, output: Mapping[str, Any]) -> ListedObject:
        found = (self._place.parent / output["path"]).stat()
        if found.size != output["size"]:
            raise CorruptArchiveError(
                f"{found.uri}: {found.size} bytes, {self.uri} says {output['size']}; is it truncated?"
            )
        return ListedObject(output["path"], found.uri, found.size, found.identity)

    def _tensor(self, row: Mapping[str, Any]) -> SideTensor:
        """The row, once it makes sense."""
        try:
            stored = stored_tensor(row)
        except VerificationError as error:
            raise VerificationError(f"{self.uri}: {error}") from error
        sha256, lazy = row.get("sha256"), row.get("lazy", ())
        if not (sha256 is None or (type(sha256) is str and len(sha256) == 64)) or set(lazy) - {"conj", "neg"}:
            raise VerificationError(
                f"{self.uri}: the sha256 or lazy of tensor {row['name'][:200]!r} is not valid"
            )
        key = (row["file"], stored.offset, row["dtype"], stored.shape, stored.stride)
        return SideTensor(BY_NAME[row["dtype"]], stored.shape, sha256, tuple(lazy), None, stored.nbytes, key)

    def _refuse_sparse(self) -> None:
        for name in self.tensors:
            owner, mark, part = name.rpartition("#")
            if mark and part in _SPARSE_INDICES and f"{owner}#values" in self.tensors:
                refuse_sparse(self.uri, owner)

    def _add_quantizers(self) -> None:
        """Scales and zero points of quantized tensors, from the outputs' indices."""
        quantized = [name for name, tensor in self.tensors.items() if tensor.dtype.quantized]
        if not quantized:
            return
        found: dict[tuple[str, str], tuple[Any, ...] | None] = {}
        with self.open_weights() as reader:
            assert isinstance(reader, JoinedReader)
            for file in dict.fromkeys(self._rows[name]["file"] for name in quantized):
                state_dict = select_state_dict(read_checkpoint(reader.part(file)), ".")
                for label, view in iter_tensors(state_dict.entries):
                    found[file, label] = quantizer_of(view)
        for name in quantized:
            row = self._rows[name]
            place = (row["file"], row["name"])
            if place not in found:
                raise VerificationError(f"{self.uri}: {row['file']} has no tensor {row['name']!r}")
            self.tensors[name] = self.tensors[name]._replace(quantizer=found[place])


def _extent(row: Mapping[str, Any], tensor: SideTensor) -> int:
    """Bytes of the file that a tensor spans."""
    stride = row.get("stride")
    return tensor.nbytes if stride is None else tensor.dtype.nbytes_of(extent_of(tensor.shape, tuple(stride)))


def _named_rows(
    manifest: Mapping[str, Any], options: ConvertOptions, uri: str
) -> list[tuple[str, dict[str, Any]]]:
    """Rows under the names that are compared: of a split output behind the file's name, else as renamed."""
    files = {output["path"] for output in manifest["outputs"]}
    rows = manifest["tensors"]
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or row.get("file") not in files:
            raise VerificationError(f"{uri}: the manifest lists a tensor that is in none of its outputs")
    if not rows:
        raise VerificationError(f"{uri}: the manifest lists no tensors; name the output itself")
    if options.drop:
        rows = [row for row in rows if not _is_dropped(row["name"], options)]
        if not rows:
            raise NoStateDictError(f"{uri}: the rules drop every tensor")
    split = manifest["options"].get("split") is True
    names = [row["name"] for row in rows]
    if options.strip_prefix or options.rename:
        owners = [name.partition("#")[0] for name in names]
        parts = [name[len(owner) :] for name, owner in zip(names, owners, strict=True)]
        names = [new + part for new, part in zip(new_names(owners, options), parts, strict=True)]
    if split:
        names = [f"{row['file']}: {name}" for row, name in zip(rows, names, strict=True)]
    return list(zip(names, rows, strict=True))


def _is_dropped(name: str, options: ConvertOptions) -> bool:
    return any(re.search(pattern, name) for pattern in options.drop)
