"""docs/readers.md: every row is what its reader really needs, and the outputs are equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli.app import run
from tests.bits import same_bits
from tests.interop import test_recipes

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]

PAGE = (Path(__file__).parents[2] / "docs" / "readers.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([^|`-][^|]*?) \| ([^|]*?) ?\|", PAGE, re.MULTILINE))
ROWS = {name: options.strip("` ").split() for name, options in ROWS.items() if name != "reader"}
TOKENS = torch.arange(6)[None]

BY_RECIPE = {
    "torch": "test_torch",
    "peft": "test_a_lora_adapter",
    "safetensors": "test_safetensors",
    "ONNX Runtime": "test_onnx_runtime",
    "TensorFlow Lite": "test_tensorflow_lite",
    "JAX": "test_jax",
}


def _model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=8)
        ).eval()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **small)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **small)).eval()


def _converted(model: Any, reader: str, folder: Path) -> Path:
    """A training checkpoint beside a configuration, converted with the options of the reader's row."""
    source = folder / "run"
    model.config.save_pretrained(source)
    torch.save({"model": model.state_dict(), "epoch": 3}, source / "last.pt")
    assert run(["convert", str(source / "last.pt"), str(folder / "out") + "/", *ROWS[reader], "-q"]) == 0
    return next((folder / "out").rglob("config.json")).parent


def _answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(TOKENS).logits
    return answer


ARCHITECTURES = pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])


@ARCHITECTURES
@pytest.mark.parametrize("reader", ["transformers, `.bin`", "transformers, safetensors"])
def test_transformers(kind: str, reader: str, tmp_path: Path) -> None:
    model = _model(kind)
    loaded = type(model).from_pretrained(_converted(model, reader, tmp_path)).eval()
    assert same_bits(_answer(loaded), _answer(model))


@ARCHITECTURES
@pytest.mark.parametrize("reader", ["accelerate's dispatch, `.bin`", "accelerate's dispatch, safetensors"])
def test_accelerate(kind: str, reader: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = _model(kind)
    folder = _converted(model, reader, tmp_path)
    with accelerate.init_empty_weights():
        empty = type(model)(model.config)
    empty.tie_weights()
    loaded = accelerate.load_checkpoint_and_dispatch(empty, folder, device_map={"": "cpu"}).eval()
    assert same_bits(_answer(loaded), _answer(model))


def test_every_row_has_a_test() -> None:
    here = {name for name in ROWS if name.startswith(("transformers", "accelerate"))}
    assert len(here) == 4
    assert here | BY_RECIPE.keys() == ROWS.keys()
    assert [name for name in BY_RECIPE.values() if not hasattr(test_recipes, name)] == []
