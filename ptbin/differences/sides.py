"""One of the two things to compare: what tensors it has, which share memory, and where their bytes are.

A side is a checkpoint of any container (`CheckpointSide`), read as a conversion would read it, or a manifest
(`manifest_side.ManifestSide`), which has digests instead of bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

from ptbin.errors import UnsupportedTensorError, UsageError
from ptbin.options import ConvertOptions
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.selected import read_selected
from ptbin.sources.opening import find_source
from ptbin.stores import Place, RangeReader, public_uri
from ptbin.values.dtypes import DType
from ptbin.values.state_dict import StateDict, tensors_of
from ptbin.values.tensors import SparseTensor, TensorRef

_OF_QUANTIZED = ("scales", "zero_points")


class SideTensor(NamedTuple):
    """What is known of a tensor without its bytes.

    Attributes:
        sha256: of its logical bytes, where a manifest states it.
        flags: as `TensorRef.flags`.
        quantizer: as `TensorRef.quantizer`, tensors in it replaced by None; those are compared by themselves.
        nbytes: of its logical bytes.
        key: equal for tensors of this side that have the same bytes at the same place.
    """

    dtype: DType
    shape: tuple[int, ...]
    sha256: str | None
    flags: tuple[str, ...]
    quantizer: tuple[Any, ...] | None
    nbytes: int
    key: Any


class Side(ABC):
    """What was given as A or B.

    Attributes:
        uri: fit for messages.
        tensors: by name, in order.
        ties: groups of names that share memory.
    """

    uri: str
    container: str
    tensors: dict[str, SideTensor]
    ties: list[tuple[str, ...]]

    @abstractmethod
    def view(self, name: str) -> TensorRef:
        """Where a tensor's bytes lie, for the readers of `open_weights`."""

    @abstractmethod
    def open_weights(self) -> RangeReader:
        """A new reader, pinned to what was read first.

        Raises:
            StorageError, SourceChangedError: it is not there, or is something else now.
        """

    def close(self) -> None:  # noqa: B027 - only checkpoints hold something open
        """Release what is open."""


class CheckpointSide(Side):
    """A checkpoint or an output: one file, shards by their index, a folder.

    Raises:
        CheckpointError: it cannot be read, or it is not clear which state dict is meant.
        UsageError: options that no comparison can have. StorageError: from the store.
    """

    def __init__(self, place: Place, options: ConvertOptions) -> None:
        if options.split:
            raise UsageError("split makes several outputs; a comparison takes one state dict: --select PATH")
        self._place = find_source(place)
        self._place.refuse_part(parts=options.parts)
        self._reader = self._place.open()
        self._identity = self._reader.identity
        self.uri = public_uri(self._reader.uri)
        try:
            with as_checkpoint_errors(self.uri):
                selected = read_selected(self._reader, options)
                self.container = selected.checkpoint.container
                self._views = _views(selected.state_dict, self.uri)
        except BaseException:
            self._reader.close()
            raise
        self.tensors = {
            name: SideTensor(
                view.dtype, view.shape, None, view.flags, quantizer_of(view), view.nbytes, view.layout_key()
            )
            for name, view in self._views.items()
        }
        self.ties = tie_groups(
            (id(view.storage), *view.span, name) for name, view in self._views.items() if view.numel
        )

    def view(self, name: str) -> TensorRef:
        return self._views[name]

    def open_weights(self) -> RangeReader:
        return self._place.open(expected=self._identity)

    def close(self) -> None:
        self._reader.close()


def _views(state_dict: StateDict, uri: str) -> dict[str, TensorRef]:
    views: dict[str, TensorRef] = {}
    for name, value in state_dict.entries:
        for label, view in tensors_of(name, value):
            part = label[len(name) :].rpartition("#")
            if isinstance(value, SparseTensor) or (part[1] and part[2] not in _OF_QUANTIZED):
                refuse_sparse(uri, name)
            views[label] = view
    return views


def refuse_sparse(uri: str, name: str) -> None:
    """Raise UnsupportedTensorError, with the way out."""
    raise UnsupportedTensorError(
        f"{uri}: {name!r} is sparse; the same values can lie there in several ways, and diff compares bytes; "
        "--drop REGEX leaves it out on both sides"
    )


def quantizer_of(view: TensorRef) -> tuple[Any, ...] | None:
    """The quantizer without its tensors."""
    if view.quantizer is None:
        return None
    return tuple(None if isinstance(item, TensorRef) else item for item in view.quantizer)


def tie_groups(spans: Iterable[tuple[Any, int, int, str]]) -> list[tuple[str, ...]]:
    """Names whose bytes overlap.

    Args:
        spans: (what stands for the storage, first byte, end, name).
    """
    by_storage: dict[Any, list[tuple[int, int, str]]] = {}
    for storage, first, end, name in spans:
        by_storage.setdefault(storage, []).append((first, end, name))
    groups: list[tuple[str, ...]] = []
    for views in by_storage.values():
        if len(views) == 1:
            continue
        views.sort()
        names: list[str] = []
        reached = -1
        before = ""
        for first, end, name in views:
            if first < reached:
                names = names or [before]
                names.append(name)
            elif names:
                groups.append(tuple(names))
                names = []
            before = name
            reached = max(reached, end)
        if names:
            groups.append(tuple(names))
    return groups
