"""Checkpoints that strangers wrote: each converts to the bits that torch reads, or is refused rightly.

They come from public repositories and lie outside this one (`shared/checkpoints` beside the checkout, or
PTBIN_CORPUS); without them these tests skip. What is right is said by torch, or where torch needs classes
that are gone, by an unpickler of our own that knows only inert stand-ins. Files under malicious/ are never
unpickled.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.errors import PtbinError
from tests.bits import assert_same_tensors

CORPUS = Path(os.environ.get("PTBIN_CORPUS") or Path(__file__).parents[3] / "shared" / "checkpoints")

pytestmark = [
    pytest.mark.skipif(
        not CORPUS.is_dir(), reason=f"no corpus at {CORPUS}; PTBIN_CORPUS may say where it is"
    ),
    pytest.mark.filterwarnings("ignore"),  # what torch says of old and quantized files
]


def _by_torch(select: str | None = None) -> Callable[[Path], dict[str, Any]]:
    def load(path: Path) -> dict[str, Any]:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state: dict[str, Any] = loaded if select is None else loaded[select]
        return state

    return load


def _by_torchscript(path: Path) -> dict[str, Any]:
    state = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


class _Inert:
    """Stands for whatever a pickle names; keeps its attributes and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Symbolic(pickle.Unpickler):
    """Names nothing but inert stand-ins; tensors come out as (storage key, offset, shape, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[str, Any] = {
            "OrderedDict": OrderedDict,
            "_rebuild_parameter": lambda tensor, *_: tensor,
            "_rebuild_tensor_v2": lambda storage, offset, shape, stride, *_: (storage, offset, shape, stride),
        }
        return known.get(name, _Inert)

    def persistent_load(self, pid: Any) -> Any:
        return _Inert if pid[0] == "module" else pid[2]


def _by_walking_modules(path: Path) -> dict[str, Any]:
    """A legacy file `[module, ...]` of float32 parameters, whose classes nobody has any more."""
    with path.open("rb") as file:
        for _ in range(3):  # magic number, protocol, sizes of the writer's types
            _Symbolic(file).load()
        top = _Symbolic(file).load()
        storages = {}
        for key in _Symbolic(file).load():
            (count,) = struct.unpack("<q", file.read(8))
            storages[key] = torch.frombuffer(bytearray(file.read(4 * count)), dtype=torch.float32)
        assert file.read() == b""

    def walk(module: Any, prefix: str) -> dict[str, torch.Tensor]:
        assert not any(module._buffers.values())
        mine = {
            prefix + name: storages[key].as_strided(shape, stride, offset)
            for name, (key, offset, shape, stride) in module._parameters.items()
        }
        for name, child in module._modules.items():
            mine |= walk(child, f"{prefix}{name}.")
        return mine

    return walk(top[0], "")


@dataclass(frozen=True)
class Outcome:
    """`reason` of the refusal, or what the weights must be; verdict on the pickle either way."""

    weights: Callable[[Path], dict[str, Any]] | None
    reason: str | None = None
    container: str = "torch_zip"
    verdict: str = "safe"


OUTCOMES = {
    "akamaster__pytorch_resnet_cifar10__resnet20-12fca82f.th": Outcome(
        _by_torch("state_dict"), container="torch_legacy"
    ),
    "cloneofsimo__lora__lora_illust.pt": Outcome(None, "no_state_dict"),
    "elixir-nx__bumblebee__tensors.legacy.pt": Outcome(None, "no_state_dict", "torch_legacy"),
    "elixir-nx__bumblebee__tensors.zip.pt": Outcome(None, "no_state_dict"),
    "foundation-model-stack__fms-hf-tuning__pytorch_model_fsdp.bin": Outcome(_by_torch()),
    "foundation-model-stack__fms-hf-tuning__rng_state_0.pth": Outcome(None, "no_state_dict"),
    "foundation-model-stack__fms-hf-tuning__training_args.bin": Outcome(
        None, "no_state_dict", verdict="unknown"
    ),
    "ikostrikov__pytorch-a2c-ppo-acktr-gail__HalfCheetah-v2.pt": Outcome(
        _by_walking_modules, container="torch_legacy", verdict="unknown"
    ),
    "nikhilbarhate99__PPO-PyTorch__PPO_BipedalWalker-v2_0_0.pth": Outcome(_by_torch()),
    "snakers4__silero-vad__joint_VAD_just_RU_jit_cut_q.pth.tar": Outcome(
        _by_torchscript, container="torchscript"
    ),
    "spyroot__neural-graph-composer__checkpoint_0.pt": Outcome(_by_torch("model_state_dict")),
    "spyroot__neural-graph-composer__data.pt": Outcome(None, "no_state_dict", verdict="unknown"),
    "timesler__facenet-pytorch__onet.pt": Outcome(_by_torch(), container="torch_legacy"),
    "malicious/protectai__modelscan__malicious0.pt": Outcome(None, "unsafe_pickle", "pickle", "unsafe"),
    "malicious/protectai__modelscan__password_protected.zip": Outcome(None, "unsupported_format", ""),
    "malicious/protectai__modelscan__unsafe_zip_pytorch.pt": Outcome(None, "unsafe_pickle", verdict="unsafe"),
    "malicious/trailofbits__fickling__a-file.pickle": Outcome(None, "unsafe_pickle", "pickle", "unsafe"),
    "malicious/trailofbits__fickling__safe.pkl": Outcome(None, "no_state_dict", "pickle"),
    "malicious/trailofbits__fickling__unsafe.pickle": Outcome(None, "unsafe_pickle", "pickle", "unsafe"),
}


def test_every_file_has_its_outcome() -> None:
    there = {path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file()}
    assert there - {"CORPUS.md"} == set(OUTCOMES)


@pytest.mark.parametrize("name", [name for name in OUTCOMES if OUTCOMES[name].weights])
def test_converts_to_the_bits_that_others_read(name: str, tmp_path: Path) -> None:
    outcome = OUTCOMES[name]
    assert outcome.weights is not None
    output = tmp_path / "weights.bin"
    manifest = ptbin.convert(str(CORPUS / name), str(output), ptbin.ConvertOptions(verify="load"))
    expected = outcome.weights(CORPUS / name)
    for mmap in (False, True):
        loaded = torch.load(output, weights_only=True, mmap=mmap)
        assert list(loaded) == list(expected)
        assert_same_tensors(loaded, expected)
    assert [row["name"] for row in manifest["tensors"]] == list(expected)
    assert manifest["source"]["container"] == outcome.container
    assert manifest["safety"]["verdict"] == outcome.verdict


@pytest.mark.parametrize("name", [name for name in OUTCOMES if OUTCOMES[name].reason])
def test_refused_for_the_right_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(PtbinError) as refusal:
        ptbin.convert(str(CORPUS / name), str(tmp_path / "out" / "weights.bin"))
    assert refusal.value.reason == OUTCOMES[name].reason
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OUTCOMES)
def test_inspect_agrees_with_convert(name: str) -> None:
    outcome = OUTCOMES[name]
    if outcome.reason == "unsupported_format":
        with pytest.raises(PtbinError) as refusal:
            ptbin.inspect(str(CORPUS / name))
        assert refusal.value.reason == outcome.reason
        return
    seen = ptbin.inspect(str(CORPUS / name))
    assert (seen["container"], seen["verdict"]) == (outcome.container, outcome.verdict)
    assert (seen["reason"] is None) == (outcome.weights is not None)


def test_what_did_not_go_along_is_listed(tmp_path: Path) -> None:
    name = "snakers4__silero-vad__joint_VAD_just_RU_jit_cut_q.pth.tar"
    manifest = ptbin.convert(str(CORPUS / name), str(tmp_path / "vad.bin"))
    packed = [item for item in manifest["left_out"] if item["path"].endswith("._packed_params")]
    assert len(packed) == 36
    adam = "spyroot__neural-graph-composer__checkpoint_0.pt"
    left_out = ptbin.convert(str(CORPUS / adam), str(tmp_path / "gcn.bin"))["left_out"]
    assert sum(item["nbytes"] for item in left_out if item["path"] == "optimizer_state_dict") > 2_000_000
