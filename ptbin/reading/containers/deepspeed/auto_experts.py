"""Experts of DeepSpeed's AutoEP: rows of fused weights, a file for each expert.

The model has `<prefix>.w1`, `w2` and `w3`, each with one more axis, that of the experts; a file has one row
of each under `<prefix>.w1.<expert>`, and `ds_autoep_layers` in the model states says of which layers. The
rows are put back, as `ds_to_universal` does (deepspeed/checkpoint/autoep_universal.py,
`consolidate_autoep_expert_files`, 0.19). Next to tensor-parallel ranks each has a copy (`etp_size` 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.merging.views import stacked, view_of
from ptbin.reading.containers.part_files import PartFiles
from ptbin.values.nodes import DictNode, entry_in
from ptbin.values.tensors import TensorRef

MAX_EXPERTS = 1 << 20
FOLDING = "folding"
"""Key of what says on how many ranks of each kind an expert was saved."""

_ROW = re.compile(r"^(?P<name>.+)\.(?P<expert>\d{1,7})$")


@dataclass(frozen=True, slots=True)
class AutoLayer:
    """One entry of `ds_autoep_layers`."""

    number: int
    experts: int
    prefix: str


def auto_layers_of(files: PartFiles, root: DictNode) -> tuple[AutoLayer, ...]:
    """The layers whose experts are fused; none where the model states name none.

    Raises:
        UnsupportedFormatError: experts that lie in ZeRO stage 3 partitions.
        CorruptArchiveError: entries that are not what DeepSpeed writes.
    """
    entries = root.get("ds_autoep_layers")
    entries = root.get("autoep_layers") if entries is None else entries
    if entries is None:
        return ()
    found = []
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, DictNode):
            raise CorruptArchiveError(f"{files.uri}: ds_autoep_layers is not a list of layers")
        if entry.get("checkpoint_format", "per_expert_files") != "per_expert_files":
            raise UnsupportedFormatError(
                f"{files.uri}: experts of AutoEP in ZeRO stage 3 partitions; convert it with DeepSpeed's "
                "ds_to_universal.py"
            )
        number, experts = entry.get("moe_layer_id"), entry.get("num_experts")
        prefix = entry.get("expert_key_prefix")
        if not (type(number) is int and type(experts) is int and 0 < experts < MAX_EXPERTS):
            raise CorruptArchiveError(f"{files.uri}: ds_autoep_layers has a layer without numbers")
        if not isinstance(prefix, str):
            raise CorruptArchiveError(f"{files.uri}: ds_autoep_layers has a layer without a name")
        found.append(AutoLayer(number, experts, prefix))
    return tuple(found)


def fused_experts(
    files: PartFiles, layers: Sequence[AutoLayer], held: Mapping[tuple[int, int], Sequence[tuple[str, Any]]]
) -> Iterator[tuple[tuple[int, int], tuple[str, Any]]]:
    """The fused weights of each layer, with the (layer, expert) that they begin with.

    Raises:
        CorruptArchiveError: rows that are missing, of another name, or unlike each other.
    """
    for layer in layers:
        rows: dict[str, list[TensorRef]] = {}
        for expert in range(layer.experts):
            for key, value in held.get((layer.number, expert), ()):
                if key == FOLDING:
                    _refuse_sliced(files, value)
                    continue
                match = _ROW.match(key)
                if (
                    not isinstance(value, TensorRef)
                    or match is None
                    or int(match["expert"]) != expert
                    or not match["name"].startswith(f"{layer.prefix}.")
                ):
                    raise CorruptArchiveError(
                        f"{files.uri}: {key[:200]!r} is not a weight of expert {expert} of "
                        f"{layer.prefix[:200]!r}"
                    )
                rows.setdefault(match["name"], []).append(value)
        for name, own in rows.items():
            what = f"{files.uri}: the experts of {name[:200]!r}"
            forms = {(tensor.dtype.name, tensor.shape) for tensor in own}
            if len(own) != layer.experts or len(forms) != 1:
                raise CorruptArchiveError(f"{what} are {len(own)} of {layer.experts}, in {len(forms)} shapes")
            view = stacked([view_of(tensor, name) for tensor in own], 0)
            yield (layer.number, 0), (name, view.tensor(what, name, files.known_storages))


def _refuse_sliced(files: PartFiles, folding: Any) -> None:
    size = entry_in(folding, "etp_size")
    if size not in (None, 1):
        raise UnsupportedFormatError(f"{files.uri}: experts of AutoEP cut over {str(size)[:20]} ranks each")
