"""What a record is by what it holds: an optimizer's state, a scheduler's, random generators, ... Pure.

Optimizer state is what has an optimizer's entries, not what is called `opt`. Files without a state dict that
training leaves next to weights are recognised in the same way (`role_of_leftover`).

Sources of the entries: torch.optim (`state_dict` of 2.13's optimizers), apex, fairseq, DeepSpeed,
bitsandbytes, torch.optim.lr_scheduler, torch.amp.GradScaler, torch.get_rng_state, Lightning, mmengine,
accelerate.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ptbin.reading.roles import CPU_RNG_NBYTES, OPTIMIZER_ENTRIES, looks_like_weights
from ptbin.reading.tree import as_mapping, holds_data, is_branch, may_hold_data
from ptbin.values.nodes import DictNode, Instance, NdArray, Opaque
from ptbin.values.tensors import SparseTensor, TensorRef

# Those that no other kind of state has: one of them is enough.
_TELLING_ENTRIES = frozenset(
    """
    exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer exp_avg_sq_row exp_avg_sq_col square_avg
    acc_delta fp32_from_fp16_groups single_partition_of_fp32_groups fp32_flat_groups exp_avg_slow exp_avg_diff
    absmax1 """.split()
)
_BESIDE_GROUPS = frozenset(
    """
    state param_groups defaults fp32_groups fp32_from_fp16_groups fp32_from_fp16 loss_scaler loss_scale
    optimizer_state_dict dynamic_loss_scale overflow first_overflow clip_grad cur_scale cur_iter
    last_overflow_iter scale_factor scale_window master_weights master_params param_id_map step steps
    grad_scaler base_optimizer base_state zero_stage partition_count ds_version group_paddings names
    param_names """.split()
)
_SCHEDULER_KEYS = frozenset(
    """
    last_epoch _step_count base_lrs _last_lr base_lr max_lr min_lr min_lrs T_max eta_min T_0 T_i T_cur T_mult
    gamma milestones step_size num_bad_epochs patience cooldown cooldown_counter threshold threshold_mode mode
    factor best verbose lr_lambdas _get_lr_called_within_step _is_initial total_steps total_iters
    anneal_func_type _anneal_func_type cycle_momentum use_beta1 _schedule_phases mode_worse eps default_min_lr
    power start_factor end_factor swa_lrs anneal_epochs _schedulers _milestones _milestones decay_factor
    warmup warmup_steps num_steps end_iter last_lr min_value """.split()
)
_TELLING_SCHEDULER = frozenset(
    "last_epoch _step_count base_lrs _last_lr num_bad_epochs cooldown_counter T_cur lr_lambdas".split()
)
_SCALER_KEYS = frozenset("scale growth_factor backoff_factor growth_interval _growth_tracker".split())

_FILE_KINDS = {
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "scaler": "scaler",
    "random_state": "random generators",
}
# Names of random generators in the files of transformers, accelerate, Lightning and verl.
_RANDOM_NAMES = frozenset(
    """python numpy cpu cuda xla npu mlu musa random_state numpy_random_seed torch_manual_seed
    torch_cuda_manual_seed torch_xpu_manual_seed rng rng_state random torch torch_cuda step""".split()
)
_ARGUMENT_CLASSES = ("Arguments", "Config", "Args")
_DATA = (TensorRef, SparseTensor, Opaque, NdArray)
MAX_DEPTH = 4


def role_of_content(node: Any) -> str | None:
    """The role of a record by its content, regardless of its name."""
    if isinstance(node, Instance):
        found = _role_of_instance(node)
        if found is not None:
            return found
    mapping = as_mapping(node)
    if mapping is not None:
        return _role_of_mapping(mapping)
    if isinstance(node, (list, tuple)) and node:
        return _role_of_sequence(node)
    return None


def _role_of_instance(node: Instance) -> str | None:
    path = node.class_path
    if path.startswith("torch.optim.lr_scheduler."):
        return "scheduler"
    if path.startswith("torch.optim.swa_utils."):
        return None
    if path.startswith("torch.optim."):
        return "optimizer"
    if path.startswith("torch.nn.modules.loss."):
        return "loss_function"
    if path.endswith(".GradScaler"):
        return "scaler"
    attributes = node.attributes()
    if attributes is None:
        return None
    names = attributes.by_name()
    if {"_parameters", "_modules"} <= names.keys():
        return None
    if path == "argparse.Namespace" and not any(is_branch(v) and may_hold_data(v) for v in names.values()):
        return "hyperparameters"  # with class weights among the arguments, say; a model is more than a tensor
    if {"mean", "var"} <= names.keys() and {"count", "n", "epsilon", "eps"} & names.keys():
        return "statistics"  # RunningMeanStd of baselines and of what descends from it
    return _role_of_mapping(attributes)


def _role_of_mapping(node: DictNode) -> str | None:
    names = node.by_name()
    keys = names.keys()
    if {"state", "param_groups"} <= keys <= _BESIDE_GROUPS:
        return "optimizer"
    if keys >= _SCALER_KEYS:
        return "scaler"
    if (
        _TELLING_SCHEDULER & keys
        and len(keys - _SCHEDULER_KEYS) <= len(keys) // 3
        and not _holds_more(names, frozenset())
    ):
        return "scheduler"
    tensors = [(key, v) for key, v in names.items() if isinstance(v, (TensorRef, SparseTensor))]
    if _is_random_state(tensors) and not _holds_more(names, frozenset(key for key, _ in tensors)):
        return "random_state"
    if (
        _TELLING_ENTRIES & keys
        and not _holds_more(names, OPTIMIZER_ENTRIES | _BESIDE_GROUPS)
        # a module with one number for a weight may have a buffer of that name
        and not looks_like_weights([key for key, _ in tensors])
    ):
        return "optimizer"
    if _is_optimizer_state(node):
        return "optimizer"
    if tensors and len(tensors) == len(keys) and all(_is_optimizer_name(key) for key, _ in tensors):
        return "optimizer"
    return None


def _holds_more(named: dict[str, Any], allowed: frozenset[str]) -> bool:
    """Whether anything but single numbers lies under other names."""
    for key, value in named.items():
        if key in allowed or (isinstance(value, TensorRef) and value.numel == 1):
            continue
        if isinstance(value, TensorRef) or may_hold_data(value):
            return True
    return False


def _is_random_state(tensors: list[tuple[str, Any]]) -> bool:
    return bool(tensors) and all(
        isinstance(t, TensorRef)
        and t.dtype.name == "uint8"
        and len(t.shape) == 1
        and (t.nbytes in CPU_RNG_NBYTES or "rng" in key.lower() or key in ("cpu", "cuda", "torch", "xpu"))
        for key, t in tensors
    )


def _is_optimizer_state(node: DictNode) -> bool:
    """A mapping of parameters (by number, name, or themselves) to an optimizer's entries."""
    found = False
    for _, value in node.pairs:
        if isinstance(value, (TensorRef, SparseTensor, Opaque)):
            return False
        if isinstance(value, DictNode):
            if not value.pairs:
                continue
            if not _are_optimizer_entries(value.by_name().keys()):
                return False
            found = True
    return found


def _are_optimizer_entries(names: Collection[str]) -> bool:
    """What an optimizer keeps of one parameter. A module may have one buffer `exp_avg` among its weights."""
    known = OPTIMIZER_ENTRIES.union(("step",)).intersection(names)
    telling = _TELLING_ENTRIES.intersection(names) or ("step" in names and len(known) > 1)
    return bool(telling) and 2 * len(known) >= len(names) and not looks_like_weights(names)


def _is_optimizer_name(name: str) -> bool:
    """A flattened name: `state.0.exp_avg`, `optimizer.state.layers.0.weight.exp_avg`,
    `exp_avg.layers.0.weight`.
    """
    steps = name.split(".")
    if steps[-1] in _TELLING_ENTRIES or "param_groups" in steps:
        return True
    if steps[-1] == "step" and len(steps) > 1:
        return True
    return bool(_TELLING_ENTRIES.intersection(steps))


def _role_of_sequence(node: Any) -> str | None:
    if len(node) <= 6 and node[0] == "MT19937":
        return "random_state"  # numpy.random.get_state()
    if len(node) == 3 and isinstance(node[1], tuple) and len(node[1]) == 625:
        return "random_state"  # random.getstate()
    roles = {role_of_content(item) for item in node[:64] if isinstance(item, (DictNode, Instance))}
    if len(roles) == 1 and all(isinstance(item, (DictNode, Instance)) for item in node[:64]):
        return roles.pop()
    tensors = [("", item) for item in node if isinstance(item, TensorRef)]
    if len(tensors) == len(node) and _is_random_state([(key or "-", t) for key, t in tensors]):
        return "random_state"
    return None


def role_of_leftover(root: Any) -> str | None:
    """What the record at the top is, in a word or two; None where it is nothing that training leaves."""
    return _role(root, 0)


def _role(node: Any, depth: int) -> str | None:
    if depth > MAX_DEPTH:
        return None
    if isinstance(node, Instance):
        is_arguments = node.class_path == "argparse.Namespace" or node.class_path.endswith(_ARGUMENT_CLASSES)
        return "training arguments" if is_arguments and not holds_data(node) else None
    if isinstance(node, TensorRef):
        return "random generators" if _is_generator(node) else None
    if isinstance(node, (list, tuple)):
        return _common_role(node, depth)
    if not isinstance(node, DictNode):
        return None
    content = role_of_content(node)
    if content in _FILE_KINDS:
        return _FILE_KINDS[content]
    named = node.by_name()
    if named and named.keys() <= _RANDOM_NAMES and not any(isinstance(v, DictNode) for v in named.values()):
        return "random generators"
    return _common_role(list(named.values()), depth)


def _common_role(values: Any, depth: int) -> str | None:
    """Of a container whose every entry that could hold anything has a role: several optimizers, say."""
    roles = [
        _role(value, depth + 1)
        for value in values[:1000]
        if isinstance(value, (DictNode, Instance, list, tuple, *_DATA))
    ]
    if not roles or None in roles:
        return None
    return roles[0] if len(set(roles)) == 1 else "training state"


def _is_generator(tensor: TensorRef) -> bool:
    """The state of a generator of the CPU, or seed and offset of a GPU's."""
    sizes = (*CPU_RNG_NBYTES, 16)
    return tensor.dtype.name == "uint8" and len(tensor.shape) == 1 and tensor.nbytes in sizes
