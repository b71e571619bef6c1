"""Averaged weights: offered by name wherever trainers put them, never taken unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptbin
from ptbin import ConvertOptions
from ptbin.errors import NoStateDictError
from tests.bits import assert_same_tensors


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


RAW = _net().state_dict()
EMA = {name: tensor + 1 for name, tensor in RAW.items()}
PARAMETERS = [name for name, _ in _net().named_parameters()]

SAVED: dict[str, Any] = {
    "own_state_dict": {"state_dict": RAW, "state_dict_ema": EMA},
    "below_ema": {"model": RAW, "ema": {"module": EMA, "updates": 7}},
    "ema_pytorch": {
        **{f"online_model.{name}": tensor for name, tensor in RAW.items()},
        **{f"ema_model.{name}": tensor for name, tensor in EMA.items()},
        "initted": torch.tensor(True),
        "step": torch.tensor(3),
    },
    "flat_beside_raw": RAW | {f"ema.{name}": tensor for name, tensor in EMA.items()},
}


@pytest.mark.parametrize("name", SAVED)
def test_select_ema_takes_the_averaged_copy(name: str, tmp_path: Path) -> None:
    source = tmp_path / "x.pt"
    torch.save(SAVED[name], source)
    roles = {row["path"]: row["role"] for row in ptbin.inspect(str(source))["state_dicts"]}
    assert list(roles.values()).count("ema") == 1
    manifest = ptbin.convert(
        str(source), str(tmp_path / "x.bin"), ConvertOptions(select="ema", verify="load")
    )
    assert_same_tensors(torch.load(tmp_path / "x.bin", weights_only=True), EMA)
    assert any(item["nbytes"] > 0 for item in manifest["left_out"])  # the raw weights


def test_copies_without_dots_get_their_names_back(tmp_path: Path) -> None:
    """Latent diffusion's LitEma: `model_ema.` and the name under `model.` without its dots."""
    raw = {f"model.{name}": RAW[name] for name in PARAMETERS} | {"first_stage.x": torch.ones(2)}
    copies = {"model_ema." + name.replace(".", ""): EMA[name] for name in PARAMETERS}
    counters = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(5)}
    torch.save({"state_dict": raw | copies | counters}, tmp_path / "x.ckpt")
    ptbin.convert(str(tmp_path / "x.ckpt"), str(tmp_path / "x.bin"), ConvertOptions(select="ema"))
    loaded = torch.load(tmp_path / "x.bin", weights_only=True)
    assert_same_tensors(loaded, {f"model.{name}": EMA[name] for name in PARAMETERS})


def test_a_list_of_shadows_is_named_by_the_model_beside_it(tmp_path: Path) -> None:
    shadows = [EMA[name] for name in PARAMETERS]
    torch.save({"model": RAW, "ema": {"decay": 0.9, "shadow_params": shadows}}, tmp_path / "x.pt")
    ptbin.convert(str(tmp_path / "x.pt"), str(tmp_path / "x.bin"), ConvertOptions(select="ema.shadow_params"))
    assert_same_tensors(
        torch.load(tmp_path / "x.bin", weights_only=True), {name: EMA[name] for name in PARAMETERS}
    )


def test_shadows_that_fit_no_model_are_not_offered(tmp_path: Path) -> None:
    torch.save({"model": RAW, "shadow_params": [torch.ones(2), torch.ones(9)]}, tmp_path / "x.pt")
    paths = [row["path"] for row in ptbin.inspect(str(tmp_path / "x.pt"))["state_dicts"]]
    assert paths == ["model"]


def test_without_an_average_the_answer_lists_what_there_is(tmp_path: Path) -> None:
    torch.save({"model": RAW}, tmp_path / "x.pt")
    with pytest.raises(NoStateDictError, match="model"):
        ptbin.convert(str(tmp_path / "x.pt"), str(tmp_path / "x.bin"), ConvertOptions(select="ema"))


def test_inspect_says_why(tmp_path: Path) -> None:
    torch.save({"model": RAW, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "x.pt")
    assert ptbin.inspect(str(tmp_path / "x.pt"))["why"] == "the only state dict there is"
