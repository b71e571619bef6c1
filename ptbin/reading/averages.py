"""Averaged copies of a model's weights (EMA, SWA): found, offered, never chosen unasked. Pure.

Who wrote a file decides what its names mean (`roles_by_producer`): mmengine's EMAHook swaps averaged and raw
weights when it saves (mmengine/hooks/ema_hook.py, `_swap_ema_state_dict`), and so did mmcv's; Lightning's
weight averaging keeps the average in `state_dict` (lightning/pytorch/callbacks/weight_averaging.py,
`on_save_checkpoint`).

`--select ema` takes the one copy a checkpoint has, wherever it is:

* a separate state dict under a telling name (`state_dict_ema`, `ema.model`, `averaged_model`, ...);
* inside the model's flat state dict, under other names: `ema_model.` (ema_pytorch), `model_ema.` with the
  dots taken out (LitEma of latent diffusion). Offered as `<path>#ema`, under the names of the raw weights;
* a list `shadow_params` (torch_ema, diffusers), where one model next to it has as many parameters of the same
  shapes in the same order. Offered as its path, under that model's names.
"""

from __future__ import annotations

import re
from typing import Any

from ptbin.reading.keys import without_wrappers
from ptbin.values.nodes import DictNode, entry_in
from ptbin.values.state_dict import StateDict
from ptbin.values.tensors import TensorRef

AVERAGED = "ema"
"""What `--select` takes for the averaged copy, wherever it is; also the role of a candidate that is one."""
RAW = "raw"
"""Role of a candidate that is the raw weights next to an average that is the model."""

_AVERAGED = re.compile(r"(?:^|[._#])(?:ema|swa|averaged?|shadow)(?:$|[._#\d])", re.IGNORECASE)
_PREFIXES = ("ema_model.", "model_ema.", "ema.")
_LIT_EMA = "model_ema."
_COUNTERS = ("decay", "num_updates", "initted", "step", "n_averaged")
COPY_SUFFIX = "#ema"
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def role_of(path: str) -> str | None:
    """`ema` where a path says that what lies there is an average."""
    return AVERAGED if _AVERAGED.search(path) else None


def roles_by_producer(root: Any) -> dict[str, str]:
    """Path of a state dict to its role, where the program that wrote the file settles it."""
    if not isinstance(root, DictNode):
        return {}
    named = root.by_name()
    if "pytorch-lightning_version" in named and "current_model_state" in named:
        return {"state_dict": AVERAGED, "current_model_state": RAW}
    meta = named.get("meta")
    if (
        isinstance(meta, DictNode)
        and "mmengine_version" in meta.by_name()
        and isinstance(named.get("ema_state_dict"), DictNode)
    ):
        return {"state_dict": AVERAGED, "ema_state_dict": RAW}
    return {}


def is_of_mmcv(root: Any) -> bool:
    """Whether mmcv's runner wrote the file."""
    meta = entry_in(root, "meta")
    return isinstance(meta, DictNode) and "mmcv_version" in meta.by_name()


def swapped_copy(found: StateDict) -> StateDict | None:
    """mmcv's average: plain names, next to raw weights in buffers called `ema_` and the name without dots.

    mmcv/runner/hooks/ema.py swaps the two before a checkpoint is saved.
    """
    names = {name for name, _ in found.entries}
    raw = {f"ema_{name.replace('.', '_')}" for name in names}
    raw = {name for name in names if name in raw}
    if not raw:
        return None
    entries = [(name, value) for name, value in found.entries if name not in raw]
    path = found.path + COPY_SUFFIX
    return StateDict(path, found.kind, found.mapping_kind, entries, None, base=found.path)


def is_same_model(one: StateDict, other: StateDict) -> bool:
    """Whether two state dicts have parameters of the same names and shapes: copies of one model.

    What wrappers put in front of every name does not count, nor do counters that only one of the two has.
    """
    ours, theirs = _shapes(one), _shapes(other)
    if not ours or not theirs:
        return False
    small, large = sorted((ours, theirs), key=len)
    if small.items() <= large.items() and len(large) - len(small) <= max(len(large) // 2, 3):
        return True
    # one of them under a prefix: `module.`, `ema_model.`
    suffixes = {name.partition(".")[2]: shape for name, shape in large.items() if "." in name}
    return bool(suffixes) and small.items() <= suffixes.items()


def _shapes(found: StateDict) -> dict[str, tuple[int, ...]]:
    named = [(n, v) for n, v in found.entries if isinstance(v, TensorRef) and v.shape]
    names = without_wrappers([name for name, _ in named])
    return {name: value.shape for name, (_, value) in zip(names, named, strict=True)}


def copies_inside(found: StateDict) -> StateDict | None:
    """The averaged copy that a flat state dict holds next to the raw weights, if it holds one."""
    tensors = {name: value for name, value in found.entries if isinstance(value, TensorRef)}
    if not any(name.startswith(_PREFIXES) for name in tensors):
        return None
    for prefix in _PREFIXES:
        copied = {
            name: value
            for name, value in tensors.items()
            if name.startswith(prefix) and name[len(prefix) :] not in _COUNTERS
        }
        if not copied or len(copied) == len(tensors):
            continue
        entries = _without_dots(tensors, copied) if prefix == _LIT_EMA else []
        entries = entries or [(name[len(prefix) :], value) for name, value in copied.items()]
        path = found.path + COPY_SUFFIX
        return StateDict(path, found.kind, found.mapping_kind, entries, None, base=found.path)
    return None


def _without_dots(tensors: dict[str, Any], copied: dict[str, Any]) -> list[tuple[str, Any]]:
    """LitEma's copies under the names they had: `model.` and what lost its dots."""
    named = []
    for name in tensors:
        if name.startswith("model."):
            copy = copied.get(_LIT_EMA + name.removeprefix("model.").replace(".", ""))
            if copy is not None:
                named.append((name, copy))
    return named if len(named) == len(copied) else []


def named_by_order(root: Any, models: list[StateDict]) -> StateDict | None:
    """`shadow_params` under the names of the one model whose parameters they follow."""
    path, shadow = _shadow_params(root)
    if not shadow:
        return None
    shapes = [tensor.shape for tensor in shadow]
    fitting: list[tuple[StateDict, list[str]]] = []
    for model in models:
        named = [(n, v) for n, v in model.entries if isinstance(v, TensorRef)]
        parameters = [(n, v) for n, v in named if n.rpartition(".")[2] not in _BUFFERS]
        for names in {id(named): named, id(parameters): parameters}.values():
            if [value.shape for _, value in names] == shapes:
                fitting.append((model, [name for name, _ in names]))
                break
    if len(fitting) != 1:
        return None
    model, names_in_order = fitting[0]
    entries = list(zip(names_in_order, shadow, strict=True))
    return StateDict(path, "mapping", model.mapping_kind, list(entries), None)


def _shadow_params(root: Any) -> tuple[str, list[TensorRef]]:
    """The only list of that name at the top or one level below it."""
    if not isinstance(root, DictNode):
        return "", []
    places = [("", root)]
    places += [(f"{name}.", child) for name, child in root.by_name().items() if isinstance(child, DictNode)]
    found = [(f"{prefix}shadow_params", node.get("shadow_params")) for prefix, node in places]
    lists = [
        (path, list(value))
        for path, value in found
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, TensorRef) for v in value)
    ]
    return lists[0] if len(lists) == 1 else ("", [])
