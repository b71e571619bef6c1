"""The strictest proof: torch itself loads the output, and every tensor equals the source's, byte for byte.

`torch.load(weights_only=True)` is the only call by which the engine's own process opens a file with torch;
torch below 2.10 is refused (CVE-2026-24747), and nothing ever falls back to `weights_only=False`. (The child
processes of `restore --model`, which run the caller's code anyhow, load what they have just written.)
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptbin.errors import UsageError, VerificationError
from ptbin.installed import require_reader
from ptbin.manifests.manifest import rows_by_file
from ptbin.options import ConvertOptions
from ptbin.proof.loaded import iter_loaded_tensors
from ptbin.proof.logical import iter_logical_bytes
from ptbin.reading.selected import read_selected
from ptbin.sources.opening import find_source
from ptbin.stores import Identity, Place, RangeReader
from ptbin.values.dtypes import DType
from ptbin.values.state_dict import StateDict, iter_tensors

if TYPE_CHECKING:
    from ptbin.manifests.draft import Draft

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.[^.]+$)")


def prove_by_loading(draft: Draft, source: Place, dest: Place) -> None:
    """Compare the output as torch loads it with the source.

    Raises:
        VerificationError: torch cannot load it, or a tensor differs.
        SourceChangedError: the source is no longer the one converted.
    """
    options = ConvertOptions.from_json(draft.manifest["options"], verify="load", limits=draft.limits)
    identity = Identity.from_json(draft.manifest["source"]["identity"])
    with find_source(source).open(identity) as reader:
        selected = read_selected(reader, options)
        for rows, state_dict in zip(rows_by_state_dict(draft.manifest), selected.state_dicts, strict=True):
            _compare_state_dict(dest, draft.manifest, rows, state_dict, reader)
        reader.check_unchanged()


def rows_by_state_dict(manifest: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The manifest's rows, those of each state dict together: a split output has the files of each one by
    one.
    """
    if not manifest["options"].get("split"):
        return [manifest["tensors"]]
    stems: dict[str, list[dict[str, Any]]] = {}
    for row in manifest["tensors"]:
        stems.setdefault(_SHARD.sub("", row["file"]), []).append(row)
    return list(stems.values())


def _compare_state_dict(
    dest: Place,
    manifest: Mapping[str, Any],
    rows: list[dict[str, Any]],
    state_dict: StateDict,
    reader: RangeReader,
) -> None:
    by_name = {row["name"]: row for row in rows}
    with open_output(dest, {**manifest, "tensors": rows}) as loaded:
        wanted = dict(iter_tensors(state_dict.entries))
        found = dict(iter_loaded_tensors(loaded))
        in_order = manifest["options"]["format"] != "torch" or list(found) == list(by_name)
        if found.keys() != by_name.keys() or not in_order:
            raise VerificationError(f"{dest.uri}: torch loads other names than the source has")
        for name, tensor in found.items():
            ref = wanted[name]
            target = by_name[name]["dtype"]
            stream = iter_logical_bytes(ref, reader)
            if target != ref.dtype.name:
                stream = _cast_by_torch(stream, ref.dtype, target)
            _compare(dest.uri, name, tensor, target, ref.shape, stream)


def _cast_by_torch(stream: Iterator[bytes], source: DType, target: str) -> Iterator[bytes]:
    """The stream's elements as `torch.Tensor.to` casts them."""
    import torch

    rest = b""
    for piece in stream:
        data = rest + piece
        # In multiples of what torch's vectorised loops take at once: its scalar tails treat NaNs differently.
        whole = len(data) - len(data) % (source.itemsize * 64)
        rest = data[whole:]
        if whole:
            yield _cast_block(torch, data[:whole], source, target)
    if rest:
        padding = bytes(-len(rest) % (source.itemsize * 64))
        block = _cast_block(torch, rest + padding, source, target)
        yield block[: len(block) - len(padding) * len(block) // (len(rest) + len(padding))]


def _cast_block(torch: Any, data: bytes, source: DType, target: str) -> bytes:
    tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, source.name))
    cast = tensor.to(getattr(torch, target))
    return bytes(cast.view(torch.uint8).numpy().data)


@contextlib.contextmanager
def open_output(dest: Place, manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All files of an output, by the reader their format is meant for; name to value.

    Raises:
        VerificationError: a reader refuses a file. UsageError: safetensors is not installed.
    """
    form = manifest["options"].get("format", "torch")
    rows_of = rows_by_file(manifest["tensors"])
    with contextlib.ExitStack() as stack:
        merged: dict[str, Any] = {}
        for name in rows_of:
            place = dest.parent / name
            rows = rows_of[name]
            if form == "torch":
                merged.update(stack.enter_context(_open_with_torch(place)))
                continue
            local = stack.enter_context(_local_copy(place))
            try:
                merged.update(_safetensors(local, rows) if form == "safetensors" else _raw(local, rows))
            except (RuntimeError, ValueError, OSError) as error:
                raise VerificationError(f"{place.uri}: cannot be loaded: {error}") from error
        yield merged


def _safetensors(local: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    require_reader("safetensors")
    from safetensors.torch import load_file

    loaded = load_file(local)
    return {row["name"]: loaded[row.get("shares_with", row["name"])] for row in rows}


def _raw(local: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    whole = torch.from_file(str(local), shared=False, size=local.stat().st_size, dtype=torch.uint8)
    return {
        row["name"]: whole[row["offset"] : row["offset"] + row["nbytes"]]
        .view(getattr(torch, row["dtype"]))
        .reshape(row["shape"])
        for row in rows
    }


@contextlib.contextmanager
def _local_copy(place: Place) -> Iterator[Path]:
    """The file as one of this machine; remote ones by a temporary copy."""
    with tempfile.TemporaryDirectory(prefix="ptbin-") as folder, place.open_reader() as reader:
        if reader.is_local:
            yield Path(place.path)
            return
        local = Path(folder) / "output"
        with local.open("wb") as file:
            for chunk in reader.iter_range(0, reader.size):
                file.write(chunk)
        yield local


@contextlib.contextmanager
def _open_with_torch(place: Place) -> Iterator[Any]:
    """The output as `torch.load(weights_only=True, mmap=True)` sees it; remote ones by a temporary file."""
    require_reader("torch")
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise UsageError(f"--verify load needs torch 2.10 or later, found {torch.__version__}")
    with _local_copy(place) as local:
        try:
            loaded = torch.load(local, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise VerificationError(f"{place.uri}: torch cannot load it: {error}") from error
        yield loaded


def _compare(
    uri: str, name: str, tensor: Any, dtype: str, shape: tuple[int, ...], wanted: Iterator[bytes]
) -> None:
    import torch

    found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if found != (dtype, shape):
        raise VerificationError(f"{uri}: torch loads {name!r} as {found}, the source has {(dtype, shape)}")
    physical = tensor.detach()
    if physical.is_conj():
        physical = physical.conj()  # flips the flag, so that the stored bytes show
    if physical.is_neg():
        physical = torch._neg_view(physical)  # noqa: SLF001 - torch has no public way to flip this flag
    packed = physical.contiguous()
    digest = hashlib.sha256()
    for piece in wanted:
        digest.update(piece)
    nbytes = (
        packed.untyped_storage().nbytes() if packed.is_quantized else packed.numel() * packed.element_size()
    )
    own = hashlib.sha256()
    if nbytes:
        # The raw memory, because several types (quantized, float8, bits) have no numpy view.
        own.update((ctypes.c_char * nbytes).from_address(packed.data_ptr()))
    if own.digest() != digest.digest():
        raise VerificationError(f"{uri}: {name!r} as torch loads it differs from the source")
