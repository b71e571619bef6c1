"""Ordinary training checkpoints, laid out as the scripts of well-known repositories write them.

Each converts without options to the one model in it. Where a script saves two models, or a raw and an
averaged one, the choice is the user's: those are refused, and stand here too, so that the border is seen.
Owns the layouts alone: names and the kinds of values beside the weights, as the scripts' `torch.save` calls
have them. The models are small and the optimizers have taken real steps.
"""

from __future__ import annotations

import argparse
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.checkpoints.models import adopt, convnet, trained, vanished_classes, weights
from tests.checkpoints.registry import Checkpoint, checkpoint

__all__ = ["ORDINARY", "Run"]


class Run:
    """What a training script has in its hands when it saves."""

    def __init__(self) -> None:
        self.model = convnet()
        self.optimizer = trained(self.model)
        self.state = weights(self.model)

    def adam(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def sgd(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        return optimizer.state_dict()

    def schedule(self) -> dict[str, Any]:
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=10).state_dict()

    def scaler(self) -> dict[str, Any]:
        return {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 3,
        }

    def prefixed(self, prefix: str) -> OrderedDict[str, torch.Tensor]:
        return OrderedDict((prefix + name, tensor) for name, tensor in self.state.items())

    def other(self, seed: int = 9) -> OrderedDict[str, torch.Tensor]:
        """Weights of the same model that are others."""
        return weights(convnet(seed=seed))

    def args(self, **more: Any) -> argparse.Namespace:
        return argparse.Namespace(lr=0.1, batch_size=64, data=Path("/data"), betas=(0.9, 0.999), **more)


Layout = Callable[[Run], Any]

# name of the layout: (what is saved, where in it the weights are)
ORDINARY: dict[str, tuple[Layout, str]] = {
    "pytorch_examples_imagenet": (
        lambda run: {
            "epoch": 3,
            "arch": "resnet18",
            "state_dict": run.prefixed("module."),
            "best_acc1": torch.tensor(71.3),
            "optimizer": run.sgd(),
            "scheduler": run.schedule(),
        },
        "state_dict",
    ),
    "torchvision_references": (
        lambda run: {
            "model": run.state,
            "optimizer": run.sgd(),
            "lr_scheduler": run.schedule(),
            "epoch": 4,
            "args": run.args(),
            "scaler": run.scaler(),
        },
        "model",
    ),
    "timm": (
        lambda run: {
            "epoch": 1,
            "arch": "vit",
            "state_dict": run.state,
            "optimizer": run.adam(),
            "version": 2,
            "args": run.args(),
            "amp_scaler": run.scaler(),
            "metric": 77.1,
        },
        "state_dict",
    ),
    "nanogpt": (
        lambda run: {
            "model": run.prefixed("_orig_mod."),
            "optimizer": run.adam(),
            "model_args": {"n_layer": 12},
            "iter_num": 2000,
            "best_val_loss": torch.tensor(3.1),
            "config": {"seed": 1337},
        },
        "model",
    ),
    "mae": (
        lambda run: {
            "model": run.state,
            "optimizer": run.adam(),
            "epoch": 1,
            "scaler": run.scaler(),
            "args": run.args(),
        },
        "model",
    ),
    "swin": (
        lambda run: {
            "model": run.state,
            "optimizer": run.adam(),
            "lr_scheduler": {"last_epoch": 1, "lr_min": 1e-5, "base_values": [0.1]},
            "max_accuracy": 81.2,
            "scaler": run.scaler(),
            "epoch": 1,
            "config": {"MODEL": {"NAME": "swin"}},
        },
        "model",
    ),
    "detectron2": (
        lambda run: {"model": run.state, "optimizer": run.sgd(), "scheduler": run.schedule(), "iteration": 9},
        "model",
    ),
    "detectron2_model_zoo": (
        lambda run: {
            "model": {name: tensor.numpy() for name, tensor in run.state.items()},
            "__author__": "Detectron2 Model Zoo",
            "matching_heuristics": True,
        },
        "model",
    ),
    "mmcv": (
        lambda run: {
            "meta": {"mmcv_version": "1.7.0", "epoch": 1, "CLASSES": ("cat", "dog"), "hook_msgs": {}},
            "state_dict": run.state,
            "optimizer": run.sgd(),
        },
        "state_dict",
    ),
    "mmengine": (
        lambda run: {
            "meta": {"mmengine_version": "0.10.7", "dataset_meta": {"palette": np.zeros((3, 3), np.uint8)}},
            "state_dict": run.state,
            "message_hub": {
                "log_scalars": {"train/loss": np.ones(40, np.float64)},
                "runtime_info": {"iter": 40, "loss": torch.tensor(0.4)},
                "resumed_keys": {},
            },
            "optimizer": run.adam(),
            "param_schedulers": [run.schedule(), run.schedule()],
        },
        "state_dict",
    ),
    "fairseq": (
        lambda run: {
            "args": None,
            "cfg": {"task": {"_name": "translation"}},
            "model": run.state,
            "criterion": None,
            "optimizer_history": [{"criterion_name": "CE", "lr_scheduler_state": {"best": None}}],
            "task_state": {},
            "extra_state": {
                "train_iterator": {"epoch": 2, "iterations_in_epoch": 0},
                "metrics": [["train", [[1.0, 2.0]]]],
                "previous_training_time": 3.2,
            },
            "last_optimizer_state": run.adam(),
        },
        "model",
    ),
    "ignite": (
        lambda run: {
            "model": run.state,
            "optimizer": run.adam(),
            "trainer": {"epoch_length": 10, "max_epochs": 3, "iteration": 30},
            "lr_scheduler": run.schedule(),
        },
        "model",
    ),
    "catalyst": (
        lambda run: {
            "model_state_dict": run.state,
            "criterion_state_dict": OrderedDict(),
            "optimizer_state_dict": run.adam(),
            "scheduler_state_dict": run.schedule(),
            "epoch_metrics": {"train": {"loss": 0.3}},
            "valid_metrics": {"loss": torch.tensor(0.5)},
        },
        "model_state_dict",
    ),
    "espnet": (
        lambda run: {
            "reporter": {"stats": {1: {"train": {"loss": 1.0}}}, "epoch": 1},
            "model": run.state,
            "optimizers": [run.adam()],
            "schedulers": [run.schedule()],
            "scaler": None,
        },
        "model",
    ),
    "tacotron2": (
        lambda run: {
            "iteration": 1000,
            "state_dict": run.state,
            "optimizer": run.adam(),
            "learning_rate": 1e-3,
        },
        "state_dict",
    ),
    "waveglow": (
        lambda run: {
            "model": run.model,
            "iteration": 1000,
            "optimizer": run.adam(),
            "learning_rate": 1e-4,
        },
        "model",
    ),
    "hifigan_generator": (lambda run: {"generator": run.state}, "generator"),
    "coqui_tts": (
        lambda run: {
            "config": {"audio": {"fft_size": 1024}},
            "model": run.state,
            "optimizer": run.adam(),
            "scaler": run.scaler(),
            "step": 100,
            "epoch": 1,
            "date": "May-05-2024",
            "model_loss": {"train_loss": 0.1, "eval_loss": None},
        },
        "model",
    ),
    "whisper": (
        lambda run: {"dims": {"n_mels": 80, "n_vocab": 51864}, "model_state_dict": run.state},
        "model_state_dict",
    ),
    "open_clip": (
        lambda run: {
            "epoch": 1,
            "name": "run",
            "state_dict": run.prefixed("module."),
            "optimizer": run.adam(),
            "scaler": run.scaler(),
        },
        "state_dict",
    ),
    "basicsr": (lambda run: {"params": run.state}, "params"),
    "basicsr_ema_alone": (lambda run: {"params_ema": run.state}, "params_ema"),
    "moco": (
        lambda run: {
            "epoch": 1,
            "arch": "resnet50",
            "state_dict": OrderedDict(
                **run.prefixed("module.encoder_q."),
                **{"module.queue": torch.randn(8, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)},
            ),
            "optimizer": run.sgd(),
            "scaler": run.scaler(),
        },
        "state_dict",
    ),
    "a2c_ppo": (lambda run: [run.model, None], "0"),
    "rl_games": (
        lambda run: {
            "epoch": 5,
            "model": run.state,
            "frame": 1000,
            "optimizer": run.adam(),
            "last_mean_rewards": torch.tensor(12.5),
            "env_state": None,
            "scaler": run.scaler(),
        },
        "model",
    ),
    "rsl_rl": (
        lambda run: {
            "model_state_dict": run.state,
            "optimizer_state_dict": run.adam(),
            "iter": 3,
            "infos": None,
        },
        "model_state_dict",
    ),
    "dreamer": (
        lambda run: {
            "agent_state_dict": run.prefixed("_wm.encoder."),
            "optims_state_dict": {"model": run.adam(), "actor": run.adam()},
        },
        "agent_state_dict",
    ),
    "pointnet": (
        lambda run: {
            "epoch": 1,
            "train_acc": np.float64(0.9),
            "test_acc": np.float32(0.8),
            "class_avg_iou": np.array([0.5, 0.4]),
            "inctance_avg_iou": 0.8,
            "model_state_dict": run.state,
            "optimizer_state_dict": run.adam(),
        },
        "model_state_dict",
    ),
    "deeplab": (
        lambda run: {
            "cur_itrs": 10,
            "model_state": run.state,
            "optimizer_state": run.sgd(),
            "scheduler_state": run.schedule(),
            "best_score": 0.7,
        },
        "model_state",
    ),
    "nnunet_v2": (
        lambda run: {
            "network_weights": run.state,
            "optimizer_state": run.sgd(),
            "grad_scaler_state": run.scaler(),
            "logging": {"train_losses": [np.float64(0.3)], "dice_per_class_or_region": [[0.1, 0.2]]},
            "_best_ema": np.float64(0.9),
            "current_epoch": 3,
            "init_args": {"plans": {"x": [1]}, "unpack_dataset": True},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1),
        },
        "network_weights",
    ),
    "nnunet_v1": (
        lambda run: {
            "epoch": 3,
            "state_dict": run.state,
            "optimizer_state_dict": run.sgd(),
            "lr_scheduler_state_dict": None,
            "plot_stuff": ([0.1], [0.2], [], [0.3]),
            "best_stuff": (0.1, 0.2, 0.3),
            "amp_grad_scaler": run.scaler(),
        },
        "state_dict",
    ),
    "apex": (
        lambda run: {
            "model": run.state,
            "optimizer": run.adam(),
            "amp": OrderedDict(loss_scaler0={"loss_scale": 65536.0, "unskipped": 3}),
        },
        "model",
    ),
    "nvidia_bert": (
        lambda run: {
            "model": run.state,
            "optimizer": run.adam(),
            "master params": [tensor.detach().clone() for tensor in run.model.parameters()],
            "files": ["a.hdf5"],
            "epoch": 0,
            "data_loader": None,
        },
        "model",
    ),
    "demucs": (
        lambda run: {
            "klass": OrderedDict,
            "args": (),
            "kwargs": {"sources": ["drums"]},
            "state": run.state,
            "training_args": {"optim": {"lr": 3e-4}},
        },
        "state",
    ),
    "audiocraft": (
        lambda run: {"xp.cfg": "a: 1", "best_state": run.state, "version": "1.0", "exported": True},
        "best_state",
    ),
    "best_weights": (lambda run: {"best_weights": run.state, "best_loss": 0.1, "epoch": 3}, "best_weights"),
    "best_model_wts": (lambda run: {"best_model_wts": run.state, "loss": [0.3, 0.2]}, "best_model_wts"),
    "deepspeed_one_rank": (
        lambda run: {
            "module": run.state,
            "buffer_names": ["1.running_mean"],
            "optimizer": None,
            "param_shapes": [OrderedDict((n, t.shape) for n, t in run.state.items())],
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": run.schedule(),
            "data_sampler": None,
            "random_ltd": None,
            "sparse_tensor_module_names": [],
            "skipped_steps": 0,
            "global_steps": 4,
            "global_samples": 8,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "ds_config": {"train_batch_size": 2},
            "ds_version": "0.19.8",
        },
        "module",
    ),
    "litgpt_fabric": (
        lambda run: {
            "model": run.state,
            "optimizer": run.adam(),
            "train_dataloader": {"dataset": {"0": {"num_samples_yielded": 3}}, "num_workers": 2},
            "hparams": {"lr": 1e-3},
            "iter_num": 1,
            "step_count": 1,
        },
        "model",
    ),
    "sam2_training": (
        lambda run: {
            "model": run.state,
            "optimizer": {"optimizer": run.adam()},
            "epoch": 1,
            "loss": {"all": {}},
            "steps": {"train": 1, "val": 0},
            "time_elapsed": 1.0,
            "best_meter_values": {},
            "scaler": run.scaler(),
        },
        "model",
    ),
    "detr": (
        lambda run: {
            "model": run.state,
            "optimizer": run.adam(),
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(run.optimizer, 3).state_dict(),
            "epoch": 1,
            "args": run.args(),
        },
        "model",
    ),
    "yolox": (
        lambda run: {
            "start_epoch": 1,
            "model": run.state,
            "optimizer": run.sgd(),
            "best_ap": np.float64(0.4),
            "curr_ap": 0.3,
        },
        "model",
    ),
    "yolov5_finished": (
        lambda run: {
            "epoch": -1,
            "best_fitness": np.array([0.5]),
            "model": run.model.half(),
            "ema": None,
            "updates": None,
            "optimizer": None,
            "wandb_id": None,
            "date": "2024",
        },
        "model",
    ),
    "ultralytics_training": (
        lambda run: {
            "epoch": 3,
            "best_fitness": 0.4,
            "model": None,
            "ema": run.model,
            "updates": 100,
            "optimizer": run.adam(),
            "train_args": {"lr0": 0.01},
            "train_metrics": {"metrics/mAP50(B)": 0.4},
            "train_results": {"epoch": [1, 2]},
            "date": "2024",
            "version": "8.3",
        },
        "ema",
    ),
    "parlai": (
        lambda run: {
            "model": run.state,
            "number_training_updates": 5,
            "lr_scheduler": {"scheduler": run.schedule()},
            "lr_scheduler_type": "reduceonplateau",
            "optimizer": run.adam(),
            "optimizer_type": "adam",
        },
        "model",
    ),
    "resumable_with_random_states": (
        lambda run: {
            "model": run.state,
            "optim": run.adam(),
            "sched": run.schedule(),
            "rng": {
                "python": random.getstate(),
                "numpy": np.random.RandomState(3).get_state(),
                "torch": torch.get_rng_state(),
                "cuda": [torch.zeros(16, dtype=torch.uint8)],
            },
            "random_states": [torch.get_rng_state()],
            "generator": torch.Generator().get_state(),
        },
        "model",
    ),
    "history_beside": (
        lambda run: {
            "net": run.state,
            "train_losses": torch.rand(30),
            "val_losses": np.random.RandomState(0).rand(30),
            "history": {"loss": [torch.tensor(0.1), torch.tensor(0.2)], "acc": torch.rand(30)},
            "best_acc": torch.tensor(0.3),
            "confusion_matrix": torch.randint(0, 9, (4, 4)),
            "lr": 0.1,
        },
        "net",
    ),
    "optimizers_as_objects": (
        lambda run: {
            "model": run.state,
            "optimizer": run.optimizer,
            "scheduler": torch.optim.lr_scheduler.StepLR(run.optimizer, 3),
            "criterion": nn.CrossEntropyLoss(weight=torch.rand(4)),
        },
        "model",
    ),
    "two_optimizers_by_number": (
        lambda run: {"policy": run.state, "opt": {0: run.adam(), 1: run.sgd()}, "foo": run.adam()},
        "policy",
    ),
    "optimizer_entries_alone": (
        lambda run: {"model": run.state, "foo": run.adam()["state"], "groups": run.adam()["param_groups"]},
        "model",
    ),
    "default_dict": (
        lambda run: {"results": defaultdict(list, {"loss": [0.1]}), "encoder": run.state},
        "encoder",
    ),
    "trainer_progress_beside": (
        lambda run: {
            "trainer": {"epoch": 1, "best_metric": torch.tensor(0.4), "early_stopping": {"wait": 3}},
            "callbacks": {"EarlyStopping": {"best_score": torch.tensor(0.5), "wait_count": 0}},
            "network": run.state,
            "loops": {"fit_loop": {"state_dict": {}}},
        },
        "network",
    ),
    "seeds_and_permutations": (
        lambda run: {
            "model": run.state,
            "seed": torch.tensor([42]),
            "train_indices": torch.arange(20),
            "val_indices": np.arange(5),
            "class_names": np.array(["cat", "dog"]),
            "epochs_run": 3,
        },
        "model",
    ),
    "optimizer_of_lists": (
        lambda run: {"G": run.state, "optim_list": [run.adam(), run.sgd()], "optim_dict": {"a": run.adam()}},
        "G",
    ),
    "early_stopping_state": (
        lambda run: {
            "model_state": run.state,
            "early_stop": {"best": torch.tensor(0.1), "patience": 5, "counter": 0},
            "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer).state_dict(),
        },
        "model_state",
    ),
}


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
