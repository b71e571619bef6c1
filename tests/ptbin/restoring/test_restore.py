"""`ptbin restore`: weights back into what torch loads, by the caller's code in processes of its own.

torch is the judge: what comes out gives the same outputs as the model that the weights were taken from.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from flows.cli.app import run
from ptbin import ConvertOptions, RestoreOptions
from ptbin.errors import ModelMismatchError, UsageError
from tests.bits import assert_same_tensors, same_bits

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("warm_children")]

NETS = textwrap.dedent(
    """
    import sys
    import torch
    from torch import nn

    print("user code may print")

    class Net(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.embedding = nn.Embedding(11, width)
            self.body = nn.Linear(width, width)
            self.norm = nn.BatchNorm1d(width)
            self.head = nn.Linear(width, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.norm(self.body(self.embedding(tokens))))

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.trunk = nn.Linear(8, 8)

    def make_net(width=8):
        return Net(width).eval()

    def bfloat16_net():
        return Net().bfloat16().eval()

    def inputs():
        return (torch.arange(5),)

    def raises():
        raise RuntimeError("no such luck")

    def leaves():
        sys.exit(7)
    """
)
# what a user runs to have the model that the weights are of
MAKE = (
    "import sys, torch; sys.path.insert(0, sys.argv[1]); import nets; "
    "torch.manual_seed(0); net = nets.make_net()"
)
TOKENS = torch.arange(5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's code in `src`, weights of its net in several formats, and what it answers."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "src").mkdir()
    (folder / "src" / "nets.py").write_text(NETS)
    save = (
        f"{MAKE}; torch.save({{'state_dict': net.state_dict(), 'optimizer': {{}}}}, sys.argv[2]); "
        "torch.save(net(torch.arange(5)), sys.argv[3])"
    )
    arguments = [folder / "src", folder / "last.ckpt", folder / "answer.pt"]
    subprocess.run([sys.executable, "-c", save, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    source = str(folder / "last.ckpt")
    ptbin.convert(source, str(folder / "torch.bin"))
    ptbin.convert(source, str(folder / "sharded.bin"), ConvertOptions(max_shard_size=300))
    ptbin.convert(source, str(folder / "raw.bin"), ConvertOptions(format="raw"))
    ptbin.convert(source, str(folder / "last.safetensors"), ConvertOptions(format="safetensors"))
    return folder


@pytest.mark.parametrize("name", ["torch.bin", "sharded.bin.index.json", "raw.bin", "last.safetensors"])
def test_a_state_dict_comes_back_bit_for_bit(name: str, trained: Path, tmp_path: Path) -> None:
    manifest = ptbin.restore(str(trained / name), str(tmp_path / "back.pt"))
    source = torch.load(trained / "last.ckpt", weights_only=True)["state_dict"]
    loaded = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_tensors(loaded, source)
    assert loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()
    if name == "torch.bin":
        assert loaded._metadata == source._metadata
    assert ptbin.verify(str(tmp_path / "back.pt.manifest.json"), level="load") == []
    assert manifest["outputs"][0]["path"] == "back.pt"


def _answer_of(file: Path, form: str, source: Path) -> torch.Tensor:
    """What the restored file answers, in a process of its own, as a user would ask it."""
    load = {
        "module": "torch.load(sys.argv[2], weights_only=False)",
        "torchscript": "torch.jit.load(sys.argv[2])",
        "exported": "torch.export.load(sys.argv[2]).module()",
        "state-dict": "(net.load_state_dict(torch.load(sys.argv[2], weights_only=True)), net)[1]",
    }[form]
    script = f"{MAKE}; torch.manual_seed(1); torch.save(({load})(torch.arange(5)), sys.argv[3])"
    answer = file.with_suffix(".answer")
    arguments = [str(source), str(file), str(answer)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)
    loaded: torch.Tensor = torch.load(answer, weights_only=True)
    return loaded


@pytest.mark.parametrize("form", ["module", "torchscript", "exported", "state-dict"])
def test_a_model_answers_as_the_one_that_was_trained(form: Any, trained: Path, tmp_path: Path) -> None:
    options = RestoreOptions(
        model="nets:make_net", model_path=str(trained / "src"), save_as=form, example="nets:inputs"
    )
    out = tmp_path / f"{form}.pt2"
    manifest = ptbin.restore(str(trained / "torch.bin"), str(out), options)
    wanted = torch.load(trained / "answer.pt", weights_only=True)
    assert same_bits(_answer_of(out, form, trained / "src").detach(), wanted.detach())
    assert ptbin.verify(f"{out}.manifest.json") == []
    assert manifest["options"]["restore"]["model"] == "nets:make_net"
    assert "nets" not in sys.modules  # the user's code never ran in this process


def test_weights_keep_their_type(trained: Path, tmp_path: Path) -> None:
    """A model initialised in another type takes the weights as they are."""
    options = RestoreOptions(model="nets:bfloat16_net", model_path=str(trained / "src"), save_as="state-dict")
    ptbin.restore(str(trained / "torch.bin"), str(tmp_path / "x.pt"), options)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert_same_tensors(loaded, torch.load(trained / "last.ckpt", weights_only=True)["state_dict"])
    assert loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()


def test_what_does_not_fit_is_one_report_and_nothing_is_written(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "x.pt"
    arguments = ["restore", str(trained / "torch.bin"), str(out), "--model-path", str(trained / "src")]
    assert run([*arguments, "--model", "nets:Renamed"]) == 1
    said = capfd.readouterr().err
    assert "model_mismatch" in said
    assert "trunk.weight (8, 8)  (nearest: body.weight)" in said
    assert "unexpected by the model" in said
    assert run([*arguments, "--model", "nets:make_net", "--model-args", '{"width": 9}', "--json"]) == 1
    answer = capfd.readouterr()
    problem = json.loads(answer.out)["problems"][0]
    assert problem["reason"] == "model_mismatch"
    assert "embedding.weight: weights (11, 8), model (11, 9)" in problem["detail"]
    assert "user code may print" not in answer.out
    assert not out.parent.exists()


def test_what_is_deliberate_may_be_allowed(trained: Path, tmp_path: Path) -> None:
    refused = RestoreOptions(model="nets:Renamed", model_path=str(trained / "src"), save_as="state-dict")
    with pytest.raises(ModelMismatchError):
        ptbin.restore(str(trained / "torch.bin"), str(tmp_path / "x.pt"), refused)
    allowed = RestoreOptions(
        model="nets:Renamed",
        model_path=str(trained / "src"),
        save_as="state-dict",
        allow_missing=("trunk.*",),
        allow_unexpected=("body.*", "norm.*", "head.*"),
    )
    ptbin.restore(str(trained / "torch.bin"), str(tmp_path / "x.pt"), allowed)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    source = torch.load(trained / "last.ckpt", weights_only=True)["state_dict"]
    assert same_bits(loaded["embedding.weight"], source["embedding.weight"])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nets:raises", "no such luck"),
        ("nets:leaves", "status 7"),
        ("nets:nothing", "has no 'nothing'"),
        ("nowhere:x", "--model-path"),
        ("nets:inputs", "not an nn.Module"),
    ],
)
def test_code_that_gives_no_model_is_a_wrong_call(
    model: str, said: str, trained: Path, tmp_path: Path
) -> None:
    options = RestoreOptions(model=model, model_path=str(trained / "src"))
    with pytest.raises(UsageError, match=said):
        ptbin.restore(str(trained / "torch.bin"), str(tmp_path / "out" / "x.pt"), options)
    assert not (tmp_path / "out").exists()


def test_only_code_can_say_what_a_module_is() -> None:
    with pytest.raises(UsageError, match="--model"):
        RestoreOptions(save_as="module")


def test_an_architecture_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "hub")
    options = RestoreOptions(model="transformers")
    ptbin.restore(str(tmp_path / "hub"), str(tmp_path / "whole.pt"), options)
    restored = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert same_bits(restored(TOKENS[None]).logits.detach(), model(TOKENS[None]).logits.detach())
    assert restored.lm_head.weight is restored.transformer.wte.weight


def test_every_container_comes_back(make_checkpoint: Callable[[str], Any], tmp_path: Path) -> None:
    """pt -> bin -> pt, for one of each of torch's own kinds."""
    for name in ("plain_state_dict", "tied", "legacy_of_torch_0_3", "lightning_like"):
        made = make_checkpoint(name)
        ptbin.convert(str(made.path), str(tmp_path / f"{name}.bin"), ConvertOptions(**made.options))
        ptbin.restore(str(tmp_path / f"{name}.bin"), str(tmp_path / f"{name}.pt"))
        assert_same_tensors(torch.load(tmp_path / f"{name}.pt", weights_only=True), made.expected)
