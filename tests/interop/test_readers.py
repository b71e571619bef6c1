"""Outputs in the hands of those they are for: torch, transformers, huggingface_hub, accelerate, zip tools."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptbin
from tests.bits import assert_same_tensors, same_bits
from tests.checkpoints import FACTORIES, Checkpoint, Factory, MadeOnce, factories
from tests.checkpoints.models import trained, weights

# what these libraries warn of among themselves
pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]


def _converted(made: Checkpoint, folder: Path) -> Path:
    output = folder / "out" / "weights.bin"
    ptbin.convert(str(made.path), str(output), ptbin.ConvertOptions(**made.options))
    return output


@pytest.mark.parametrize("factory", factories(refused=False), ids=str)
def test_torch_and_zip_tools_read_every_output(factory: Factory, made_once: MadeOnce, tmp_path: Path) -> None:
    made = made_once(factory)
    assert made.expected is not None
    output = _converted(made, tmp_path)
    # a meta tensor has no data to take along: the manifest lists it
    expected = {name: tensor for name, tensor in made.expected.items() if tensor.device.type != "meta"}
    for mmap in (False, True):
        loaded = torch.load(output, weights_only=True, mmap=mmap)
        assert_same_tensors(loaded, expected)
        assert {name: loaded[name] for name in made.values} == dict(made.values)
    with zipfile.ZipFile(output) as archive:
        assert archive.testzip() is None


@pytest.mark.starts_processes
@pytest.mark.skipif(shutil.which("unzip") is None, reason="no unzip here")
@pytest.mark.parametrize(
    "name", ["training_dict_with_adam", "tied", "legacy_of_torch_0_3", "only_empty_tensors"]
)
def test_unzip_finds_no_fault(name: str, tmp_path: Path) -> None:
    output = _converted(FACTORIES[name].make(tmp_path), tmp_path)
    tested = subprocess.run(["unzip", "-t", output], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr  # 1 would be a warning
    assert "No errors detected" in tested.stdout


def test_what_was_tied_is_tied_when_loaded(tmp_path: Path) -> None:
    loaded = torch.load(_converted(FACTORIES["tied"].make(tmp_path), tmp_path), weights_only=True)
    assert loaded["embed.weight"].data_ptr() == loaded["lm_head.weight"].data_ptr()
    assert loaded["embed.weight"].data_ptr() != loaded["norm.weight"].data_ptr()


def test_mapped_tensors_may_be_written_to(tmp_path: Path) -> None:
    """torch maps privately: training on from an output does not change the file."""
    output = _converted(FACTORIES["plain_state_dict"].make(tmp_path), tmp_path)
    before = output.read_bytes()
    for tensor in torch.load(output, weights_only=True, mmap=True).values():
        tensor.zero_()
    assert output.read_bytes() == before


def test_a_module_loads_strictly_with_its_metadata(tmp_path: Path) -> None:
    made = FACTORIES["training_dict_with_adam"].make(tmp_path)
    source = torch.load(made.path, weights_only=True)["model_state_dict"]
    loaded = torch.load(_converted(made, tmp_path), weights_only=True)
    assert loaded._metadata == source._metadata
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    model.load_state_dict(loaded, strict=True)
    assert_same_tensors(weights(model), made.expected or {})


# -------------------------------------------------------------------------------------- transformers


def _bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
        )
    )


def _gpt2() -> Any:
    """Tied: `lm_head.weight` is `transformer.wte.weight`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize("make", [_bert, _gpt2, _llama], ids=["bert", "gpt2-tied", "llama-bfloat16"])
def test_transformers_loads_a_training_checkpoint_made_weights(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    optimizer = torch.optim.Adam(model.parameters())
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    saved = tmp_path / "step-1.ckpt"
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, saved)
    folder = tmp_path / "hf"
    model.config.save_pretrained(folder)
    ptbin.convert(str(saved), str(folder / "pytorch_model.bin"))

    loaded, report = type(model).from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    with torch.no_grad():
        assert same_bits(loaded.eval()(input_ids=tokens).logits, model(input_ids=tokens).logits)


# ------------------------------------------------------------------- huggingface_hub, safetensors, ...


@pytest.fixture
def trained_net(tmp_path: Path) -> tuple[Path, nn.Module]:
    """An output made of a training dict, and the model that was trained."""
    model = _net()
    optimizer = trained(model)
    saved = tmp_path / "last.ckpt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    output = tmp_path / "out" / "pytorch_model.bin"
    ptbin.convert(str(saved), str(output))
    return output, model


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def test_huggingface_hub_loads_it(trained_net: tuple[Path, nn.Module]) -> None:
    from huggingface_hub import load_state_dict_from_file, load_torch_model

    output, model = trained_net
    for mmap in (False, True):
        state = load_state_dict_from_file(output, safe=False, weights_only=True, mmap=mmap)
        assert_same_tensors(dict(state), weights(model))
    fresh = _net()
    load_torch_model(fresh, output.parent, strict=True, safe=False, weights_only=True)
    assert_same_tensors(weights(fresh), weights(model))


def test_accelerate_loads_it(trained_net: tuple[Path, nn.Module]) -> None:
    accelerate = pytest.importorskip("accelerate")
    output, model = trained_net
    fresh = _net()
    accelerate.load_checkpoint_in_model(fresh, str(output), strict=True)
    assert_same_tensors(weights(fresh), weights(model))


def test_safetensors_takes_what_torch_loads(trained_net: tuple[Path, nn.Module], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    output, model = trained_net
    save_file(torch.load(output, weights_only=True), tmp_path / "model.safetensors")
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), weights(model))


def test_views_take_only_their_own_bytes_along(tmp_path: Path) -> None:
    """safetensors refuses tensors that are parts of larger storages; ours are whole."""
    from safetensors.torch import save

    made = FACTORIES["view_of_a_large_storage"].make(tmp_path)
    output = _converted(made, tmp_path)
    loaded = torch.load(output, weights_only=True)
    assert loaded["view"].untyped_storage().nbytes() == 4000
    assert output.stat().st_size < 8000
    assert len(save(loaded)) < 8000


# --------------------------------------------------------------------------------------- Lightning


def test_lightning_takes_its_own_weights_back(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        """As the one that `lightning_trainer` trains."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    made = FACTORIES["lightning_trainer"].make(tmp_path)
    assert made.expected is not None
    loaded = torch.load(_converted(made, tmp_path), weights_only=True)
    module = Module()
    assert not any(same_bits(weights(module)[name], made.expected[name]) for name in ["net.0.weight"])
    module.load_state_dict(loaded, strict=True)
    assert_same_tensors(weights(module), made.expected)
