"""What scripts that train on pictures save."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch

from tests.checkpoints.scripts import Layout

__all__ = ["VISION"]

# name of the layout: (what is saved, where in it the weights are)
VISION: dict[str, tuple[Layout, str]] = {
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
}
