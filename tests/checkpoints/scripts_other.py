"""What scripts of reinforcement learning and trainers for anything save, and odd values next to weights."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict

import numpy as np
import torch
from torch import nn

from tests.checkpoints.scripts import Layout

__all__ = ["OTHER"]

# name of the layout: (what is saved, where in it the weights are)
OTHER: dict[str, tuple[Layout, str]] = {
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
    "apex": (
        lambda run: {
            "model": run.state,
            "optimizer": run.adam(),
            "amp": OrderedDict(loss_scaler0={"loss_scale": 65536.0, "unskipped": 3}),
        },
        "model",
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
