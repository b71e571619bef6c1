"""Whether a checkpoint says of itself that it is one part of a whole. Pure: looks at records alone.

What is read, and whose word it is:

- a piece of a DTensor or ShardedTensor on several ranks (`wrappers`);
- sizes of model parallelism above 1 in the training arguments: Megatron-LM's and fairseq's `args`, NeMo's
  configuration (megatron/training/arguments.py; NeMo keeps the same names in `hyper_parameters` and `cfg`);
- DeepSpeed's model states (runtime/engine.py, `_common_checkpoint_state`): `mp_world_size`, `num_experts`,
  parameters of ZeRO stage 3 that are empty here, `universal_checkpoint_info` that does not state the size;
- fairscale's `shard_metadata`; `DCP_SHARDING_INFO` of torch.distributed.checkpoint's safetensors files
  (distributed/checkpoint/filesystem.py), where a tensor begins elsewhere than at its own beginning.

A container of several files was put together by its reader, which has checked this for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ptbin.errors import IncompleteCheckpointError
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.containers.hf_shards import SHARDING_INFO, sharding_offsets
from ptbin.reading.pickle.wrappers import WRAPPER, local_tensor, piece_of, placement_of
from ptbin.values.nodes import DictNode, Instance, Opaque, iter_nodes
from ptbin.values.tensors import TensorRef

PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "model_parallel_size",
)
"""Of training: above 1 the weights lie in as many files at least."""

# Where trainers keep their arguments, at the top of a checkpoint or one level below another of these.
_ARGUMENTS = tuple("args cfg config hyper_parameters hparams model_config model common _content".split())
MAX_DEPTH = 4

WRAPPER_GLOBAL = tuple(WRAPPER.rsplit(".", 1))


def _find_part(checkpoint: Checkpoint) -> str | None:
    """What shows that the checkpoint is one part of a whole, as half a sentence; None where nothing does."""
    if checkpoint.is_whole or not checkpoint.storages:
        return None
    return (
        _of_distributed_tensors(checkpoint)
        or _of_arguments(checkpoint.root)
        or _of_deepspeed(checkpoint.root)
        or _of_fairscale(checkpoint.root)
        or _of_sharding_info(checkpoint)
    )


def refuse_part(checkpoint: Checkpoint) -> None:
    """Raise where the checkpoint says that it is one part.

    Raises:
        IncompleteCheckpointError: what shows it, and what to do.
    """
    if (why := _find_part(checkpoint)) is not None:
        # Files of ranks are put together; which they are, their names say (`sources.part_names`).
        merge = (
            "put all ranks' files, and nothing else, into one folder as rank_0.pt, rank_1.pt, ... "
            "and convert the folder"
            if _of_distributed_tensors(checkpoint)
            else "merge all parts with the tool of the framework that wrote them"
        )
        raise IncompleteCheckpointError(
            f"{checkpoint.uri}: one part of a checkpoint: {why}; {merge}, or take this one knowingly with "
            "--parts"
        )


def accept_part(checkpoint: Checkpoint) -> None:
    """Note what shows that the checkpoint is a part; put this rank's own tensors in the place of pieces."""
    if checkpoint.part is not None:
        return  # done before
    checkpoint.part = _find_part(checkpoint)
    if checkpoint.part is None:
        return
    placements = checkpoint.vocabulary.placements
    for node in iter_nodes(checkpoint.root):
        if isinstance(node, DictNode):
            node.pairs = [(key, _own(value, placements)) for key, value in node.pairs]
        elif isinstance(node, list):
            node[:] = [_own(value, placements) for value in node]


def _own(value: Any, placements: list[Any]) -> Any:
    local = local_tensor(value) if piece_of(value) is not None else None
    if local is None:
        return value
    placements.append(placement_of(value.contents[1]))
    return local


def _of_distributed_tensors(checkpoint: Checkpoint) -> str | None:
    if not any(WRAPPER_GLOBAL in program.globals for program in checkpoint.programs):
        return None  # no walk over a million tensors to find none
    for node in iter_nodes(checkpoint.root):
        if isinstance(node, Opaque) and (piece := piece_of(node)) is not None and piece.ranks != 1:
            where = "several ranks" if piece.ranks is None else f"{piece.ranks} ranks"
            return f"it holds pieces of {piece.kind}s that lie on {where}"
    return None


def _mappings(node: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """A mapping or record of arguments, and those below under well-known names."""
    found = node.attributes() if isinstance(node, Instance) else node
    if not isinstance(found, DictNode) or depth > MAX_DEPTH:
        return
    named = found.by_name()
    yield named
    for name in _ARGUMENTS:
        if (below := named.get(name)) is not None:
            yield from _mappings(below, depth + 1)


def _of_arguments(root: Any) -> str | None:
    if not isinstance(root, DictNode):
        return None
    for named in _mappings(root):
        for name in PARALLEL_SIZES:
            size = _plain(named.get(name))
            if type(size) is int and size > 1:
                return f"it was trained with {name} {size}"
    return None


def _plain(value: Any) -> Any:
    """The number itself; OmegaConf wraps each in a node."""
    if isinstance(value, Instance) and value.class_path.startswith("omegaconf.nodes."):
        attributes = value.attributes()
        return attributes.get("_val") if attributes is not None else None
    return value


def _of_deepspeed(root: Any) -> str | None:
    if not isinstance(root, DictNode) or "module" not in (named := root.by_name()):
        return None
    size, info = named.get("mp_world_size"), named.get("universal_checkpoint_info")
    if type(size) is int and size > 1:
        return f"DeepSpeed's model states of one of {size} model-parallel ranks (mp_world_size)"
    if isinstance(info, DictNode) and size is None:
        return "DeepSpeed's model states with universal_checkpoint_info, and nothing says of how many ranks"
    from ptbin.reading.containers.deepspeed.rules import parallel_degree

    for name in ("tp_degree", "pp_degree"):
        if (parallel_degree(root, name) or 0) > 1:
            return f"DeepSpeed's model states with {name} {parallel_degree(root, name)}"
    if _has_experts_elsewhere(named):
        return "DeepSpeed's model states of a mixture of experts, which lie in other files (num_experts)"
    return _of_zero_3(named)


def _has_experts_elsewhere(named: dict[str, Any]) -> bool:
    if not {"ds_version", "ds_config", "dp_world_size"} & named.keys():
        return False  # not DeepSpeed's: `num_experts` may mean anything
    if named.get("ds_autoep_layers") is not None:
        return True
    module, counts = named["module"], named.get("num_experts")
    if not isinstance(counts, list) or not any(type(n) is int and n > 0 for n in counts):
        return False
    names = module.by_name() if isinstance(module, DictNode) else {}
    return not any(".deepspeed_experts." in name for name in names)


def _of_zero_3(named: dict[str, Any]) -> str | None:
    module, groups = named["module"], named.get("param_shapes")
    if not isinstance(module, DictNode) or not isinstance(groups, (list, tuple)):
        return None
    for group in groups:
        for name, shape in group.pairs if isinstance(group, DictNode) else ():
            held = module.get(name) if type(name) is str else None
            if not isinstance(held, TensorRef) or not isinstance(shape, tuple):
                continue
            if held.numel == 0 and all(type(n) is int for n in shape) and math.prod(shape) > 0:
                return "DeepSpeed's model states of ZeRO stage 3, whose parameters lie with the optimizer"
    return None


def _of_fairscale(root: Any) -> str | None:
    if isinstance(root, DictNode) and isinstance(root.get("shard_metadata"), DictNode):
        return "one rank's shard, as fairscale's FSDP wrote it (shard_metadata)"
    return None


def _of_sharding_info(checkpoint: Checkpoint) -> str | None:
    try:
        found = sharding_offsets(checkpoint)
    except ValueError:
        return None
    for name, offsets in (found or {}).items():
        if any(offsets):
            return f"{SHARDING_INFO} says that its {name[:200]!r} begins at {list(offsets[:8])} of the whole"
    return None
