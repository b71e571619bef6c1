"""Whatever a module is made of: convert and restore give what torch's own save and load give.

Each example costs two processes that import torch, so there are few; `make test-slow` tries more.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings

import ptbin
from ptbin import RestoreOptions
from ptbin.restoring.snapshot import other_tensors, ties_of
from tests.bits import assert_same_tensors, same_bits

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("warm_children")]

NETS = Path(__file__).parents[2] / "nets"
PARAMETRIZED = {"weight_norm", "orthogonal"}
BLOCKS = (
    *("linear", "norm", "layer_norm", "extra", "versioned", "hooked", "kept", "dropped", "frozen"),
    *("weight_norm", "orthogonal", "dropout"),
)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `randomized.build`: blocks, ties among them, type, device."""
    blocks = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=9))
    numbers = st.integers(0, len(blocks) - 1)
    ties = draw(st.lists(st.tuples(numbers, numbers), max_size=3))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float64"]))
    device = draw(st.sampled_from(["cpu", "cpu", "meta"]))
    if "orthogonal" in blocks and dtype == "bfloat16":
        dtype = "float32"  # torch computes it in no such type
    if PARAMETRIZED & set(blocks) and device == "meta":
        device = "cpu"
    return {"blocks": blocks, "ties": [list(pair) for pair in ties], "dtype": dtype, "device": device}


def _tensors(values: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _comes_back(plan: dict[str, Any], form: Any, folder: Path) -> None:
    nets = importlib.import_module("randomized")
    trained = nets.trained(**plan)
    assume(_tensors(trained.state_dict()))
    torch.save(trained.state_dict(), folder / "source.pt")
    weights, out = folder / "weights.bin", folder / ("out.pt2" if form == "exported" else "out.pt")
    ptbin.convert(str(folder / "source.pt"), str(weights))
    options = RestoreOptions(
        model="randomized:build",
        model_args=plan,
        model_path=str(NETS),
        save_as=form,
        example=f"randomized:{plan['dtype']}_inputs",
        force=True,
    )
    if plan["device"] == "meta" and "dropped" in plan["blocks"]:
        with pytest.raises(ptbin.errors.UsageError, match="meta device"):
            ptbin.restore(str(weights), str(out), options)
        return
    ptbin.restore(str(weights), str(out), options)
    assert ptbin.verify(f"{out}.manifest.json") == []
    inputs = nets.inputs(plan["dtype"])
    if form in {"torchscript", "exported"}:
        trained.eval()
        state = _tensors(trained.state_dict(keep_vars=False))
        program: Any = torch.jit.load(out) if form == "torchscript" else torch.export.load(out)
        found = program.state_dict() if form == "torchscript" else program.state_dict
        plain_names = state.keys() & found.keys()
        assert_same_tensors({n: found[n].detach() for n in plain_names}, {n: state[n] for n in plain_names})
        runnable = program if form == "torchscript" else program.module()
        with torch.no_grad():
            torch.testing.assert_close(runnable(*inputs), trained(*inputs))
        return
    if form == "state-dict":
        restored = nets.build(**{**plan, "device": "cpu"})
        restored.load_state_dict(torch.load(out, weights_only=True), assign=True)
    else:
        restored = torch.load(out, weights_only=False)
        assert ties_of(restored) == ties_of(trained)
        assert_same_tensors(dict(other_tensors(restored)), dict(other_tensors(trained)))
        grads = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (restored, trained)]
        assert grads[0] == grads[1]
    assert_same_tensors(_tensors(restored.state_dict()), _tensors(trained.state_dict()))
    restored.eval(), trained.eval()
    with torch.no_grad():
        assert same_bits(restored(*inputs), trained(*inputs))


_FEW = settings(
    max_examples=2,
    deadline=None,
    phases=[Phase.generate],  # to shrink one that fails takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.syspath_prepend(str(NETS))
    return tmp_path


def _plan_for(form: str, plan: dict[str, Any]) -> dict[str, Any]:
    """torch pickles and traces no parametrization."""
    if form in {"module", "torchscript"}:
        return plan | {"blocks": [kind if kind not in PARAMETRIZED else "linear" for kind in plan["blocks"]]}
    return plan


@pytest.mark.parametrize("form", ["module", "state-dict", "torchscript", "exported"])
@_FEW
@given(plan=plans())
def test_a_module_comes_back(form: str, plan: dict[str, Any], folder: Path) -> None:
    _comes_back(_plan_for(form, plan), form, folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["module", "state-dict", "torchscript", "exported"])
@settings(_FEW, max_examples=40)
@given(plan=plans())
def test_many_modules_come_back(form: str, plan: dict[str, Any], folder: Path) -> None:
    _comes_back(_plan_for(form, plan), form, folder)
