"""The recipes of docs/recipes.md, run as they stand; each must answer as the trained network does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptbin
from tests.bits import same_bits

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """The trained network, its checkpoint in the folder that recipes run in."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    torch.save({"state_dict": made.state_dict(), "epoch": 3}, tmp_path / "last.ckpt")
    monkeypatch.chdir(tmp_path)
    return made


def _run(title: str) -> dict[str, Any]:
    space: dict[str, Any] = {}
    exec(compile(RECIPES[title], f"docs/recipes.md, {title}", "exec"), space)  # noqa: S102 - our own page
    return space


def _wanted(network: nn.Sequential) -> torch.Tensor:
    answer: torch.Tensor = network(torch.ones(1, 4)).detach()
    return answer


def test_torch(network: nn.Sequential) -> None:
    assert same_bits(torch.from_numpy(_run("torch")["answer"]), _wanted(network))


def test_huggingface_hub(network: nn.Sequential) -> None:
    pytest.importorskip("huggingface_hub")
    model = _run("huggingface_hub")["model"]
    assert same_bits(model(torch.ones(1, 4)).detach(), _wanted(network))


def test_safetensors(network: nn.Sequential) -> None:
    pytest.importorskip("safetensors")
    weights = _run("safetensors")["weights"]
    for name, tensor in network.state_dict().items():
        assert same_bits(torch.from_numpy(weights[name]), tensor)


def test_onnx_runtime(network: nn.Sequential) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.testing.assert_close(torch.from_numpy(_run("ONNX Runtime")["answer"]), _wanted(network))


def _answer_in_a_process_of_its_own(title: str, folder: Path) -> torch.Tensor:
    """For frameworks that do not let go: TensorFlow is large and loud, JAX warns of every later fork."""
    script = RECIPES[title] + "\nimport json\nprint('answer', json.dumps(answer.tolist()))\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout.rsplit("answer ", 1)[1]))


@pytest.mark.starts_processes
@pytest.mark.skipif(find_spec("jax") is None, reason="no JAX here")
def test_jax(network: nn.Sequential, tmp_path: Path) -> None:
    torch.testing.assert_close(_answer_in_a_process_of_its_own("JAX", tmp_path), _wanted(network))


@pytest.mark.starts_processes
@pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="no TensorFlow Lite here")
def test_tensorflow_lite(network: nn.Sequential, tmp_path: Path) -> None:
    answer = _answer_in_a_process_of_its_own("TensorFlow and TensorFlow Lite", tmp_path)
    torch.testing.assert_close(answer, _wanted(network))


def _tiny(architecture: str) -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if architecture == "bert":
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **small
        )
        return transformers.BertModel(config).eval()
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **small)
        return transformers.GPT2Model(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        **small,
    )
    return transformers.LlamaModel(config).eval()


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_transformers(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny(architecture)
    model.save_pretrained(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    loaded = _run("transformers")["model"].eval()
    assert (tmp_path / "clean" / "pytorch_model.bin.index.json").exists()
    tokens = torch.arange(3, 9)[None]
    wanted = model(tokens).last_hidden_state.detach()
    assert same_bits(loaded(tokens).last_hidden_state.detach(), wanted)
    # and as one file, of safetensors
    options = ptbin.ConvertOptions(layout="hf", format="safetensors")
    ptbin.convert("hub", "whole/model.safetensors", options)
    whole = type(model).from_pretrained(tmp_path / "whole").eval()
    assert same_bits(whole(tokens).last_hidden_state.detach(), wanted)


@pytest.mark.thorough
def test_a_lora_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = _tiny("gpt2")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(_copy(model), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "clean" / "adapter_model.bin"
    ptbin.convert(str(tmp_path / "adapter"), str(output), ptbin.ConvertOptions(layout="hf"))
    loaded = peft.PeftModel.from_pretrained(_copy(model), str(tmp_path / "clean")).eval()
    tokens = torch.arange(3, 9)[None]
    wanted = adapted(tokens).last_hidden_state.detach()
    assert same_bits(loaded(tokens).last_hidden_state.detach(), wanted)
    assert not torch.equal(wanted, model(tokens).last_hidden_state)


def _copy(model: Any) -> Any:
    copied = type(model)(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied
