"""Files that training leaves next to a model's weights and that hold none: told by their names. Pure.

Bulk runs leave them alone: no conversion, no failure. A name alone never makes a file pass unread; it only
says what a file is in which no state dict was found; `reading.contents` says it from the content.

Sources: transformers' trainer.py and trainer_pt_utils.py, accelerate's utils/constants.py and
checkpointing.py, verl's FSDP checkpoint manager, DeepSpeed's engine (`_get_zero_ckpt_name`,
`_get_optimizer_ckpt_name`), Megatron-LM's checkpointing.py.
"""

from __future__ import annotations

import fnmatch

from ptbin.errors import (
    AmbiguousStateDictError,
    IncompleteCheckpointError,
    NoStateDictError,
    UnsupportedTensorError,
)

_NO_MODEL = (AmbiguousStateDictError, IncompleteCheckpointError, NoStateDictError, UnsupportedTensorError)
"""Of a file that is called a leftover: it was read, and holds no single model."""

_NAMES = {
    "optimizer": "optimizer.pt optimizer.pth optimizer.bin optimizer.ckpt optimizer_*.bin optimizer_*.pt"
    " optimizer-*.pt optim.pt optim.pth optim.bin optim_world_size_*_rank_*.pt optim_[0-9]*.pt"
    " optim_[0-9]*.bin *_optim_states.pt distrib_optim.pt",
    "scheduler": "scheduler.pt scheduler.pth scheduler.bin scheduler_[0-9]*.bin scheduler_[0-9]*.pt"
    " lr_scheduler.pt lr_scheduler.bin lr_scheduler.pth",
    "random generators": "rng_state*.pth rng_state*.pt random_states_*.pkl random_state*.pkl rng.pt"
    " rng_states.pt",
    "scaler": "scaler.pt scaler.pth grad_scaler.pt scaler_[0-9]*.pt scaler.bin",
    "training arguments": "training_args.bin training_args.pt",
    "training state": "extra_state_world_size_*_rank_*.pt trainer_state.pt dataloader.pt sampler.bin"
    " sampler_[0-9]*.bin custom_checkpoint_[0-9]*.pkl dl_state_dict*.bin",
}
_PATTERNS = {role: tuple(names.split()) for role, names in _NAMES.items()}


def leftover_role(path: str) -> str | None:
    """What a file of this name is to a model: `optimizer`, `scheduler`, ...; None where no name tells."""
    name = path.rpartition("/")[2]
    for role, patterns in _PATTERNS.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return role
    return None


def is_leftover(path: str) -> bool:
    """Whether a file is one by its name."""
    return leftover_role(path) is not None


def left_alone_as(path: str, error: Exception) -> str | None:
    """What a file is that cannot be converted because it is no model's; None where that is a problem.

    The content's word (`NoStateDictError.leftover`) goes before the name's.
    """
    if not isinstance(error, _NO_MODEL):
        return None
    return getattr(error, "leftover", None) or leftover_role(path)
