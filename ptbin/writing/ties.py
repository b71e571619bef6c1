"""Joining tensors that are equal bit for bit, as if the source had tied them.

Wrappers separate what was one: a gathered copy of `lm_head` next to the embedding, say. Only matrices of more
than one distinct value are joined: that two biases, or two fresh adapters, are all zeros means nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from ptbin.errors import UnsupportedTensorError
from ptbin.values.segments import Recipe
from ptbin.values.state_dict import StateDict
from ptbin.values.tensors import ByteRange, TensorRef
from ptbin.writing.formats.dense import dense_recipes

ReadRecipe = Callable[[Recipe], Iterable[bytes]]


def tie_equal_tensors(state_dict: StateDict, read: ReadRecipe) -> None:
    """Let the later of two equal tensors view the storage of the first.

    Reads the tensors that another one resembles by type, shape and, where the container states one, CRC-32.

    Args:
        read: the bytes of a recipe (`splice.iter_recipe`).
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (_, value) in enumerate(state_dict.entries):
        if isinstance(value, TensorRef) and _may_be_tied(value):
            key = (value.dtype.name, value.shape, _known_crc32(value))
            alike.setdefault(key, []).append(index)
    for indices in _comparable(alike):
        first: dict[str, int] = {}
        for index in indices:
            name, tensor = state_dict.entries[index]
            digest = _digest(tensor, read)
            if digest is None:
                continue
            owner = first.setdefault(digest, index)
            kept_name, kept = state_dict.entries[owner]
            if owner != index and kept.layout_key() != tensor.layout_key():
                state_dict.entries[index] = (name, kept)
                source_name = state_dict.source_names.get(name, name)
                reason = f"equal to {kept_name!r}, stored once (tie_by_value)"
                state_dict.leave_out(source_name, "duplicate", reason, tensor)


def _may_be_tied(tensor: TensorRef) -> bool:
    return len(tensor.shape) > 1 and tensor.numel > 1 and not tensor.flags and tensor.quantizer is None


def _comparable(alike: dict[tuple[object, ...], list[int]]) -> list[list[int]]:
    """Groups that may hold equal tensors: one without a known CRC-32 may equal any of its type and shape."""
    groups: list[list[int]] = []
    by_form: dict[tuple[object, ...], list[tuple[object, list[int]]]] = {}
    for (dtype, shape, crc), indices in alike.items():
        by_form.setdefault((dtype, shape), []).append((crc, indices))
    for forms in by_form.values():
        if any(crc is None for crc, _ in forms):
            groups.append(sorted(index for _, indices in forms for index in indices))
        else:
            groups.extend(indices for _, indices in forms)
    return [group for group in groups if len(group) > 1]


def _known_crc32(tensor: TensorRef) -> int | None:
    """CRC-32 of the tensor's own bytes, where it fills its record in order."""
    place = tensor.storage.place
    if isinstance(place, ByteRange) and tensor.contiguous and place.nbytes == tensor.nbytes:
        return None if tensor.storage.big_endian else place.crc32
    return None


def _digest(tensor: TensorRef, read: ReadRecipe) -> str | None:
    """SHA-256 of the logical bytes; None where all elements are the same, or cannot be put in order."""
    try:
        recipes = dense_recipes(tensor)
    except UnsupportedTensorError:
        return None
    digest = hashlib.sha256()
    itemsize = tensor.dtype.itemsize
    first = b""
    position = 0
    constant = True
    for recipe in recipes:
        for piece in read(recipe):
            digest.update(piece)
            first += piece[: itemsize - len(first)]
            if constant and len(first) == itemsize:
                phase = position % itemsize
                expected = first * ((phase + len(piece)) // itemsize + 1)
                constant = bytes(piece) == expected[phase : phase + len(piece)]
            position += len(piece)
    return None if constant else digest.hexdigest()
