"""Ordinary training checkpoints, laid out as the scripts of well-known repositories write them.

Each converts without options to the one model in it. Where a script saves two models, or a raw and an
averaged one, the choice is the user's: those are refused, and stand here too, so that the border is seen.
Owns the layouts alone: names and the kinds of values beside the weights, as the scripts' `torch.save` calls
have them. The models are small and the optimizers have taken real steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.checkpoints.models import adopt, convnet, vanished_classes, weights
from tests.checkpoints.registry import Checkpoint, checkpoint
from tests.checkpoints.scripts import Layout, Run
from tests.checkpoints.scripts_other import OTHER
from tests.checkpoints.scripts_text_and_sound import TEXT_AND_SOUND
from tests.checkpoints.scripts_vision import VISION

__all__ = ["ORDINARY"]


ORDINARY: dict[str, tuple[Layout, str]] = {**VISION, **TEXT_AND_SOUND, **OTHER}


def _at(made: Any, path: str) -> Any:
    return made[int(path)] if isinstance(made, list) else made[path]


def _register(name: str) -> None:
    layout, place = ORDINARY[name]

    # the reader of the suite looks for mappings, and makes tensors of all arrays
    reads = None if name in ("a2c_ppo", "seeds_and_permutations") else "pickle"

    @checkpoint(name=f"ordinary_{name}", torch_reads=reads)
    def build(path: Path) -> Checkpoint:
        made = layout(Run())
        torch.save(made, path)
        found = _at(made, place)
        expected = weights(found) if isinstance(found, nn.Module) else found
        return Checkpoint(
            path,
            {
                n: torch.as_tensor(np.array(v) if isinstance(v, np.ndarray) else v)
                for n, v in expected.items()
            },
        )


for _name in ORDINARY:
    _register(_name)


# Two models, or one twice: the choice is the user's, on purpose.
TO_CHOOSE: dict[str, Layout] = {
    "timm_with_ema": lambda run: {"state_dict": run.state, "state_dict_ema": run.other(), "epoch": 1},
    "torchvision_with_ema": lambda run: {
        "model": run.state,
        "model_ema": {"n_averaged": torch.tensor(3), **{f"module.{n}": t for n, t in run.other().items()}},
        "optimizer": run.sgd(),
    },
    "yolov5_with_ema": lambda run: {"model": run.model, "ema": convnet(seed=4), "updates": 3},
    "dino": lambda run: {
        "student": run.prefixed("module."),
        "teacher": run.other(),
        "optimizer": run.adam(),
        "dino_loss": {"center": torch.randn(1, 8)},
        "fp16_scaler": run.scaler(),
    },
    "hifigan_discriminators": lambda run: {
        "mpd": run.state,
        "msd": run.other(),
        "optim_g": run.adam(),
        "optim_d": run.adam(),
        "steps": 1,
    },
    "stylegan2": lambda run: {
        "g": run.state,
        "d": run.other(1),
        "g_ema": run.other(2),
        "g_optim": run.adam(),
        "d_optim": run.adam(),
        "args": run.args(),
        "ada_aug_p": 0.0,
    },
    "nerf": lambda run: {
        "global_step": 1,
        "network_fn_state_dict": run.state,
        "network_fine_state_dict": run.other(),
        "optimizer_state_dict": run.adam(),
    },
    "insightface": lambda run: {
        "state_dict_backbone": run.state,
        "state_dict_softmax_fc": {"weight": torch.randn(10, 8)},
        "state_optimizer": run.adam(),
        "state_lr_scheduler": run.schedule(),
    },
    "opennmt": lambda run: {
        "model": run.state,
        "generator": {"0.weight": torch.randn(4, 4), "0.bias": torch.randn(4)},
        "vocab": {"src": ["a"]},
        "opt": run.args(),
        "optim": {"training_step": 1, "decay_step": 1, "optimizer": run.adam()},
    },
    "cleanrl_sac": lambda run: (run.state, run.other(1), run.other(2)),
    "icefall": lambda run: {"model": run.state, "model_avg": run.other(), "optimizer": run.adam()},
    "reward_model_beside": lambda run: {"policy": run.state, "reward_model": run.other()},
    "loss_net_beside": lambda run: {"model": run.state, "loss_net": run.other()},
    "named_like_an_optimizer": lambda run: {"model": run.state, "optimal_transport": run.other()},
    "under_opt": lambda run: {
        "model": run.state,
        "opt": {"weight": torch.randn(4, 4), "bias": torch.randn(4)},
    },
    "config_net_beside": lambda run: {"model": run.state, "config_net": run.other()},
    "step_encoder_beside": lambda run: {"model": run.state, "step_encoder": run.other()},
    "random_projection_beside": lambda run: {"model": run.state, "random_projection": torch.randn(8, 8)},
    "normalizer_beside": lambda run: {"model": run.state, "mean": torch.rand(30), "std": torch.rand(30)},
    "prototypes_beside": lambda run: {"model": run.state, "prototypes": torch.randn(10, 8)},
    "replay_buffer_beside": lambda run: {"model": run.state, "replay": {"observations": torch.randn(50, 4)}},
}


def _register_choice(name: str) -> None:
    @checkpoint(name=f"choose_{name}", reason="ambiguous_state_dict")
    def build(path: Path) -> Checkpoint:
        torch.save(TO_CHOOSE[name](Run()), path)
        return Checkpoint(path, None, reason="ambiguous_state_dict")


for _name in TO_CHOOSE:
    _register_choice(_name)


@checkpoint(torch_reads=None)
def ordinary_yolo_with_a_vanished_class(path: Path) -> Checkpoint:
    """YOLOv5's detection layer keeps its anchor grid as a list of tensors, which no state dict has."""
    with vanished_classes("models.yolo") as module:

        class Detect(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.m = nn.ModuleList([nn.Conv2d(8, 4, 1)])
                self.grid = [torch.rand(1, 1, 4, 4, 2)]
                self.anchor_grid = [torch.rand(1, 1, 4, 4, 2)]
                self.register_buffer("anchors", torch.rand(1, 3, 2))
                self.stride = torch.tensor([8.0])

        model = nn.Sequential(nn.Conv2d(3, 8, 1), adopt(module, Detect)())
        torch.save({"epoch": -1, "model": model, "ema": None, "optimizer": None}, path)
    return Checkpoint(path, weights(model))
