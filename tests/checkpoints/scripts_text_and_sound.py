"""What scripts that train on text and sound save."""

from __future__ import annotations

from collections import OrderedDict

import torch

from tests.checkpoints.scripts import Layout

__all__ = ["TEXT_AND_SOUND"]

# name of the layout: (what is saved, where in it the weights are)
TEXT_AND_SOUND: dict[str, tuple[Layout, str]] = {
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
}
