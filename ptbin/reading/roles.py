"""What a part of a checkpoint is to a model, and which names say so: optimizer state, metrics, ... Pure.

Content decides before names (`contents`): a name decides only where what stands below it does not look like
a model's weights. What neither tells has no role, and a conversion that would leave it out stops
(`accounting`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from ptbin.values.nodes import NdArray
from ptbin.values.tensors import TensorRef

REASONS = {
    "optimizer": "state of an optimizer",
    "scheduler": "state of a learning-rate scheduler",
    "scaler": "state of a gradient scaler",
    "random_state": "state of random generators",
    "averaged_copy": "an averaged copy of the selected weights",
    "raw_copy": "the raw weights; their averaged copy is selected",
    "precision_copy": "the same weights in another precision",
    "replica": "what another rank holds as well; of the selected tensors every copy was found equal",
    "same_weights": "the selected weights once more",
    "hyperparameters": "hyperparameters or arguments of the training run",
    "metrics": "metrics, losses or counters",
    "trainer_state": "state of the trainer: callbacks, loops, samplers",
    "loss_function": "a loss function",
    "statistics": "running statistics of inputs",
    "index_table": "whole numbers: indices, a vocabulary, labels",
    "attribute": "plain attribute of a module, no parameter or buffer",
    "non_persistent_buffer": "non-persistent buffer",
    "packed": "packed by the class itself, outside its state dict",
    "constant": "constant of the program",
    "example_inputs": "example inputs of the program",
    "padding": "padding of flat partitions or of vocabularies",
    "summed": "summed over ranks; the tensor of this name is computed, not copied",
    "scaled": "multiplied by a number on each rank; the tensor of this name is computed, not copied",
    "averaged": "averaged over ranks, which differ; the tensor of this name is computed, not copied",
    "scaling_state": "scaling factors of Transformer Engine, which each rank keeps for itself",
    "unreferenced": "a record of the archive that no pickle names",
    "unviewed": "bytes of storages that no tensor shows",
    "dropped": "dropped on request",
    "duplicate": "equal to another tensor, stored once",
    "not_selected": "not part of the selected state dict",
    "value": "no tensor",
}
"""Every role, and the reason that a manifest gives where nothing says it better."""

# Last step of the path of a tensor in an optimizer's state.
OPTIMIZER_ENTRIES = frozenset(
    """
    exp_avg exp_avg_sq max_exp_avg_sq max_exp_avg_sqs exp_avgs exp_avg_sqs exp_inf momentum_buffer
    exp_avg_sq_row exp_avg_sq_col exp_avg_slow exp_avg_diff prev_grad previous_grad neg_pre_grad square_avg
    grad_avg acc_delta sum ax mu eta step_size prev d_prev param_groups grad_accum fp32_from_fp16
    fp32_from_fp16_groups single_partition_of_fp32_groups fp32_flat_groups master_weights master_params
    master_param hessian hessian_diagonal preconditioner preconditioners inv_preconditioner
    momentum1 momentum2 absmax1 absmax2 qmap1 qmap2 new_max1 new_max2 gnorm_vec state1 state2 unorm_vec
    base_optimizer_state shampoo_state exp_avg_bar z
    """.split()
)
# Bytes of what torch.get_rng_state() returns (at::CPUGeneratorImpl, current and legacy layout), and of a CUDA
# generator (seed and offset).
CPU_RNG_NBYTES = (5056, 5048)
CUDA_RNG_NBYTES = (16, 816)

_WEIGHT_STEPS = frozenset(
    """
    weight bias running_mean running_var num_batches_tracked in_proj_weight in_proj_bias weight_g weight_v
    weight_orig weight_mask embedding embeddings position_ids logit_scale gamma beta lora_A lora_B lora_up
    lora_down qweight qzeros scales g_idx original0 original1 _packed_params kernel
    cls_token pos_embed pos_embedding relative_position_bias_table
    """.split()
)
_WEIGHT_STEP = re.compile(r"^(weight|bias)(_(ih|hh)_l\d+(_reverse)?|_[a-z0-9]{1,4}|s|\d*)$")
_PACKED = re.compile(r"weight|qzeros|packed|quant|g_idx|bias", re.IGNORECASE)

_WORDS: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (role, frozenset(words.split()))
    for role, words in (
        ("optimizer", "optim optims optimizer optimizers optimiser optimisers adam adamw"),
        ("scheduler", "sched scheduler schedulers lr_scheduler scheds"),
        ("scaler", "scaler scalers amp"),
        ("random_state", "rng rngs random seed seeds rand"),
        ("averaged_copy", "ema swa averaged average shadow"),
        (
            "hyperparameters",
            """
            arg args argument arguments cfg cfgs config configs configuration conf hparam hparams
            hyper hyperparameter hyperparameters hyperparams option options setting settings meta
            metadata kwargs
            """,
        ),
        ("loss_function", "criterion criterions criteria"),
        (
            "metrics",
            """
            loss losses acc accs accuracy accuracies metric metrics score scores best history
            histories stat stats statistics epoch epochs iter iters iteration iterations step steps
            error errors err prec prec1 prec5 acc1 acc5 top1 top5 recall precision psnr ssim fid
            miou map map50 lr lrs time elapsed reward rewards returns counter counters count counts
            updates result results perplexity ppl progress fitness wer bleu f1 auc confusion mae mse
            rmse iou dice
            """,
        ),
        (
            "trainer_state",
            """
            callback callbacks loops dataloader dataloaders datamodule sampler samplers iterator
            hook hooks logger loggers profiler
            """,
        ),
    )
)
_WHOLE_NAMES = {
    "amp": "scaler",
    "extra_state": "trainer_state",
    "message_hub": "trainer_state",
    "early_stopping": "trainer_state",
    "opt_state": "optimizer",
    "opt_state_dict": "optimizer",
    "loss": "loss_function",
    "loss_fn": "loss_function",
    "loss_func": "loss_function",
    "loss_function": "loss_function",
    "loss_state_dict": "loss_function",
    "torch_state": "random_state",
    "numpy_state": "random_state",
    "python_state": "random_state",
    "cuda_state": "random_state",
    "master params": "precision_copy",
    "master_params": "precision_copy",
    "master_weights": "precision_copy",
    "fp32_params": "precision_copy",
}
# A name with one of these speaks of parameters, whatever else is in it: `time_embed`, `loss_weight`,
# `step_proj`.
_PARAMETER_WORDS = frozenset(
    """
    embed embedding embeddings emb embeds token tokens weight weights bias proj projection head layer layers
    linear conv fc norm encoder decoder model net network module kernel param params parameter parameters
    query key value """.split()
)
_PART_WORDS = frozenset(
    "net network model module encoder decoder backbone head layer layers proj embed".split()
)
_WORD = re.compile(r"[a-z]+\d*|[A-Z]+(?![a-z])\d*|[A-Z][a-z]*\d*")

_FLOATING = ("float", "bfloat", "complex")
_NORMALIZERS = ({"mean", "std"}, {"mean", "var"}, {"mean", "variance"}, {"mean", "scale"}, {"min", "max"})
"""Names that, side by side, are what inputs or targets are normalized by."""
_NOISE_LEVELS = frozenset("alphas betas sigmas alphas_cumprod alpha_cumprod sqrt_alphas_cumprod".split())


def role_of_name(step: str) -> str | None:
    """The role that a name alone suggests, by the words it is made of."""
    if len(step) > 200:
        return None
    whole = step.lower()
    if whole in _WHOLE_NAMES:
        return _WHOLE_NAMES[whole]
    found = [word.lower() for word in _WORD.findall(step)]
    words, last = set(found), found[-1] if found else ""
    for role, telling in _WORDS:
        if words & telling:
            # `reward_model`, `step_encoder`, `random_features_net`: parts of a model, whatever they are for
            part = bool(words & _PARAMETER_WORDS) and role in ("metrics", "random_state", "trainer_state")
            # `config_net` is a net, `net_config` is not
            part = part or (role in ("hyperparameters", "scheduler", "scaler") and last in _PART_WORDS)
            return None if part else role
    return None


def looks_like_weights(names: Iterable[str]) -> bool:
    """Whether any of these names is one that a module's parameters or buffers have."""
    for name in names:
        last = name.rpartition(".")[2]
        if last in OPTIMIZER_ENTRIES:
            continue
        if last in _WEIGHT_STEPS or _WEIGHT_STEP.match(last):
            return True
    return False


def contradicts(role: str, leaves: Iterable[Any], names: Iterable[str] = ()) -> bool:
    """Whether tensors or arrays cannot be what the role says, whatever name led to it.

    Generators keep whole numbers. A gradient scaler keeps single ones: what has more scales inputs or
    targets. So do pairs such as mean and deviation, and a diffusion's levels of noise are no schedule of
    learning rates: a model is of no use without them.
    """
    many = [leaf for leaf in leaves if _size(leaf) > 1]
    if role == "scaler":
        return bool(many)
    if role == "random_state":
        return any(_is_floating(leaf) for leaf in many)
    told = {name.lower().rstrip("_") for name in names} if many else set()
    if role == "metrics":
        return any(pair <= told for pair in _NORMALIZERS)
    return role == "scheduler" and not told.isdisjoint(_NOISE_LEVELS)


def _size(leaf: Any) -> int:
    if isinstance(leaf, TensorRef):
        return leaf.numel
    return math.prod(leaf.shape) if isinstance(leaf, NdArray) else 0


def _is_floating(leaf: Any) -> bool:
    if isinstance(leaf, NdArray):
        return leaf.dtype[1:2] in ("f", "c")
    return isinstance(leaf, TensorRef) and leaf.dtype.name.startswith(_FLOATING)


def role_of_leaf(step: str, leaf: Any, inherited: str | None) -> str | None:
    """The role of one tensor or array outside of every state dict."""
    if inherited is not None and contradicts(inherited, (leaf,)):
        inherited = None
    if isinstance(leaf, TensorRef):
        name = leaf.dtype.name
        if name == "uint8" and len(leaf.shape) == 1:
            by_size = leaf.nbytes in CPU_RNG_NBYTES or leaf.nbytes in CUDA_RNG_NBYTES
            if leaf.nbytes in CPU_RNG_NBYTES or (by_size and inherited == "random_state"):
                return "random_state"
        if inherited is not None:
            return inherited
        if leaf.numel == 1 and not name.startswith(_FLOATING) and not looks_like_weights((step,)):
            return "metrics"
        packed = _PACKED.search(step) or looks_like_weights((step,))
        if leaf.numel > 1 and name in ("int64", "int32", "int16", "bool") and not packed:
            return "index_table"
    elif isinstance(leaf, NdArray):
        if leaf.dtype[1:2] in ("U", "S", "O", "M", "m") and leaf.objects is None:
            return "value"
        if inherited is not None:
            return inherited
        if leaf.dtype[1:2] in ("i", "u", "b", "?") and not _PACKED.search(step):
            return "index_table"
    elif inherited is not None:
        return inherited
    if _PARAMETER_WORDS.intersection(word.lower() for word in _WORD.findall(step[:200])):
        return None
    by_name = role_of_name(step)
    if by_name == "loss_function" and isinstance(leaf, (TensorRef, NdArray)):
        by_name = "metrics"  # a number under `loss` is one
    if by_name is not None and contradicts(by_name, (leaf,)):
        return None
    if by_name == "metrics" and isinstance(leaf, (TensorRef, NdArray)) and len(leaf.shape) <= 2:
        return by_name
    return by_name if by_name in ("random_state", "hyperparameters", "averaged_copy") else None
