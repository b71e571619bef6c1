"""Layouts of well-known scripts, with parts renamed, removed, nested, doubled, and averages beside them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from hypothesis import strategies as st

from tests.checkpoints.models import convnet, weights
from tests.checkpoints.ordinary import ORDINARY
from tests.checkpoints.scripts import Run
from tests.laws.trees import MODEL_KEYS, Tree

__all__ = ["producers"]

_MAPPED = sorted(name for name, (_, place) in ORDINARY.items() if not place.isdigit())
_KEYS = (
    *MODEL_KEYS,
    *("optimizer", "config", "extra_state", "best_model", "trainer", "state", "0", "a.b", "loss", "metrics"),
    *("message_hub", "swa_state_dict", "results", "history", "checkpoint", "buffers", "criterion", "stats"),
)


def _averages(run: Run) -> dict[str, Any]:
    other = run.other(4)
    average = torch.optim.swa_utils.AveragedModel(convnet(seed=5)).state_dict()
    shadow = [tensor.detach().clone() for tensor in convnet(seed=6).parameters()]
    return {
        "plain": other,
        "counted": OrderedDict(average),
        "module": convnet(seed=7),
        "shadow": {"decay": 0.9, "num_updates": 3, "shadow_params": shadow, "collected_params": None},
        "shadow_and_copy": {"decay": 0.9, "shadow_params": shadow, "collected_params": shadow[:2]},
        "prefixed": {f"ema_model.{name}": value for name, value in other.items()},
        "both": {
            **{f"online_model.{name}": value for name, value in run.state.items()},
            **{f"ema_model.{name}": value for name, value in other.items()},
            "initted": torch.tensor([True]),
            "step": torch.tensor([3]),
        },
        "halves": {name: value.half() for name, value in run.state.items()},
        "some": dict(list(other.items())[:3]),
        "same": run.state,
        "nested": {"model": other, "decay": 0.9},
        "wrapped": {"module": {"module": other}},
    }


@st.composite
def producers(draw: st.DrawFn) -> Tree:
    """One of `ORDINARY`, changed one to three times."""
    torch.manual_seed(draw(st.integers(0, 99)))
    run = Run()
    layout, place = ORDINARY[draw(st.sampled_from(_MAPPED))]
    value: dict[str, Any] = layout(run)
    models = {place: value[place]}
    for change in draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)):
        key = draw(st.sampled_from(sorted(value)))
        new = draw(st.sampled_from(_KEYS))
        if change == 0 and key not in models and len(value) > 1:
            del value[key]
        elif change == 1 and new not in value:
            value[new] = value.pop(key)
            if key in models:
                models[new] = models.pop(key)
        elif change == 2 and new not in value:
            value[new] = {draw(st.sampled_from(_KEYS)): value.pop(key)}
            if key in models:
                models[new] = models.pop(key)
        elif change == 3:
            averages = _averages(run)
            name = draw(st.sampled_from(["ema", "model_ema", "state_dict_ema", "ema_state_dict", "swa", new]))
            kind = draw(st.sampled_from(sorted(averages)))
            # a list has no names that would speak of weights: there the key decides
            if name not in value and (name != new or not kind.startswith("shadow")):
                value[name] = models[name] = averages[kind]
        elif change == 4 and isinstance(value[key], dict) and key in models:
            # a part of the model goes elsewhere
            state = dict(value[key])
            first = next(iter(state))
            if len(state) > 1 and new not in value:
                value[new] = models[new] = {first: state.pop(first)}
                value[key] = models[key] = state
        elif change == 5 and new not in value:
            value[new] = models[new] = weights(convnet(seed=8))
        elif change == 6 and isinstance(value[key], dict) and key in models:
            value[key] = models[key] = {**value[key], "_extra_state": {"amax": torch.randn(3)}}
        elif change == 7 and isinstance(value[key], dict) and isinstance(value.get("optimizer"), dict):
            value["optimizer"] = {"optimizer": value["optimizer"], "param_names": ["a"], new: torch.randn(3)}
    return Tree(value, sorted(models), ordinary=False)
