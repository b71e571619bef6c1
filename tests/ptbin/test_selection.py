"""Which state dict is taken from the shapes of checkpoint that frameworks write."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.errors import AmbiguousStateDictError, NoStateDictError


def weights(seed: float = 1.0) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict({"conv.weight": torch.full((4, 3), seed), "conv.bias": torch.full((4,), seed)})


def adam() -> dict[str, Any]:
    moment = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 3), "exp_avg_sq": torch.ones(4, 3)}
    return {"state": {0: moment}, "param_groups": [{"lr": 1e-3, "params": [0]}]}


RNG = torch.zeros(5056, dtype=torch.uint8)

CHOSEN: dict[str, tuple[Any, str]] = {
    "a plain state dict": (weights(), "."),
    "the PyTorch tutorial's": (
        {
            "epoch": 3,
            "model_state_dict": weights(),
            "optimizer_state_dict": adam(),
            "loss": torch.tensor(0.1),
        },
        "model_state_dict",
    ),
    "Lightning's": (
        {
            "pytorch-lightning_version": "2.6",
            "state_dict": weights(),
            "optimizer_states": [adam()],
            "lr_schedulers": [],
            "callbacks": {"x": {"best": torch.tensor(1.0)}},
            "hyper_parameters": {"lr": 0.1},
        },
        "state_dict",
    ),
    "mmcv's": ({"meta": {"epoch": 1}, "state_dict": weights(), "optimizer": adam()}, "state_dict"),
    "fairseq's": (
        {"args": None, "model": weights(), "optimizer_history": [{"a": 1}], "last_optimizer_state": adam()},
        "model",
    ),
    "with random states": ({"model": weights(), "rng_state": RNG, "cuda_rng_state": [RNG]}, "model"),
    "with a random state in a mapping": ({"model": weights(), "random": {"cpu": RNG, "cuda": RNG}}, "model"),
    "DataParallel under net": ({"net": {f"module.{k}": v for k, v in weights().items()}, "acc": 91.2}, "net"),
    "deeply nested": ({"trainer_state": {"run": {"model": weights()}}}, "trainer_state.run.model"),
    "the same weights twice": ({"state_dict": (shared := weights()), "model": shared}, "state_dict"),
    "a tiny criterion beside the model": (
        {"model": {"w": torch.ones(1000)}, "criterion": {"weight": torch.ones(2)}},
        "model",
    ),
    "index tables beside the model": ({"model": weights(), "vocab": {"ids": torch.arange(3)}}, "model"),
    "a list with one state dict": ([weights(), {"epoch": 1}], "0"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_one_answer_is_taken(name: str, tmp_path: Path) -> None:
    value, path = CHOSEN[name]
    torch.save(value, tmp_path / "s.pt")
    assert ptbin.inspect(str(tmp_path / "s.pt"))["selected"] == path


AMBIGUOUS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "raw and averaged": ({"model": weights(), "model_ema": weights(2.0)}, ("model", "model_ema")),
    "a GAN": ({"generator": weights(), "discriminator": weights(2.0)}, ("generator", "discriminator")),
    "encoder and decoder apart": (
        {"model": {"enc": weights(), "dec": weights(2.0)}},
        ("model.enc", "model.dec"),
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_no_guess_where_there_are_several(name: str, tmp_path: Path) -> None:
    value, paths = AMBIGUOUS[name]
    torch.save(value, tmp_path / "s.pt")
    with pytest.raises(AmbiguousStateDictError) as caught:
        ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"))
    assert caught.value.candidates == paths
    for path in paths:
        assert path in str(caught.value)
        manifest = ptbin.convert(
            str(tmp_path / "s.pt"), str(tmp_path / "o.bin"), ptbin.ConvertOptions(select=path)
        )
        assert manifest["selected"] == path


NOTHING: dict[str, Any] = {
    "an optimizer alone": adam(),
    "a list of tensors": [torch.ones(2), torch.ones(3)],
    "one tensor": torch.ones(3),
    "random states": {"cpu": RNG, "cuda": RNG},
    "numbers": {"epoch": 3},
    "nothing": {},
}


@pytest.mark.parametrize("name", NOTHING)
def test_no_weights_no_output(name: str, tmp_path: Path) -> None:
    torch.save(NOTHING[name], tmp_path / "s.pt")
    with pytest.raises(NoStateDictError):
        ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"))


def test_select_reaches_what_is_never_chosen(tmp_path: Path) -> None:
    torch.save({"model": weights(), "callbacks": {"ema": {"weights.x": weights(2.0)}}}, tmp_path / "s.pt")
    report = ptbin.inspect(str(tmp_path / "s.pt"))
    assert [found["path"] for found in report["state_dicts"]] == ["model", "callbacks.ema.weights.x"]
    options = ptbin.ConvertOptions(select="callbacks.ema.weights.x")
    ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"), options)
    assert torch.load(tmp_path / "o.bin", weights_only=True)["conv.bias"][0] == 2.0


def test_a_wrong_select_lists_what_there_is(tmp_path: Path) -> None:
    torch.save({"model": weights()}, tmp_path / "s.pt")
    with pytest.raises(NoStateDictError, match="found: model"):
        ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"), ptbin.ConvertOptions(select="ema"))


def test_extra_state_is_never_the_model(tmp_path: Path) -> None:
    for extra in ({"amax": torch.ones(3)}, {"fc.weight": torch.ones(3, 3)}, [("scale", torch.ones(2))]):
        for saved in ({"state_dict": {"_extra_state": extra}}, {"fc._extra_state": extra}):
            torch.save(saved, tmp_path / "s.pt")
            with pytest.raises(NoStateDictError):
                ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"))
