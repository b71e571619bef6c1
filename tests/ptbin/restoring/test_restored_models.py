"""The model that comes back is the model that was trained: every tensor, tie, attribute and output.

torch is the judge: each model's state dict is saved by torch, converted and restored into what the user's
code builds (`tests/nets`), and compared with the trained one.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptbin
from flows.cli.app import run
from ptbin import ConvertOptions, RestoreOptions
from ptbin.errors import ModelMismatchError, UsageError, VerificationError
from ptbin.restoring.snapshot import Contents, mapped_views, other_tensors, ties_of
from ptbin.restoring.weights import open_weights
from ptbin.stores import place_of
from tests.bits import assert_same_tensors, same_bits

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("warm_children")]

NETS = Path(__file__).parents[2] / "nets"


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(NETS))
    return importlib.import_module("restorable")


def _trained(nets: Any, kind: str) -> Any:
    """The model whose weights are saved, its running statistics and biases moved."""
    torch.manual_seed(hash(kind) % 1000)
    model: nn.Module = getattr(nets, f"trained_{kind}", getattr(nets, kind))()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
        for name, buffer in model.named_buffers():
            if "running" in name or "batches" in name:
                buffer.add_(3)
    return model


def _convert(model: nn.Module | dict[str, Any], folder: Path, **options: Any) -> str:
    values = model.state_dict() if isinstance(model, nn.Module) else model
    torch.save(values, folder / "source.pt")
    ptbin.convert(str(folder / "source.pt"), str(folder / "weights.bin"), ConvertOptions(**options))
    return str(folder / "weights.bin")


def _restore(weights: str, out: Path, kind: str, **options: Any) -> Any:
    options = {"model": f"restorable:{kind}", "model_path": str(NETS), **options}
    manifest = ptbin.restore(weights, str(out), RestoreOptions(**options))
    assert ptbin.verify(f"{out}.manifest.json") == []
    return manifest


def _assert_same_model(found: nn.Module, wanted: nn.Module) -> None:
    assert_same_tensors(_tensors(found.state_dict()), _tensors(wanted.state_dict()))
    derived = {"0.weight (attribute)"}  # of the old weight_norm: computed before each use
    others = [{k: v for k, v in other_tensors(model) if k not in derived} for model in (found, wanted)]
    assert_same_tensors(*others)
    assert ties_of(found) == ties_of(wanted)
    assert found.training == wanted.training
    grads = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (found, wanted)]
    assert grads[0] == grads[1]


def _tensors(values: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _answer(model: Any, inputs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        answer: torch.Tensor = model(*inputs)
    return answer


KINDS = (
    *("tied", "norm", "lazy", "versioned", "hooked", "extra", "recurrent"),
    *("aliased", "sharing", "rotary", "halves", "shared", "frozen", "old_norm", "counting"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_the_one_that_was_trained(kind: str, nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, kind)
    _restore(_convert(trained, tmp_path), tmp_path / "out.pt", kind)
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    _assert_same_model(found, trained)
    inputs = nets.tokens() if kind == "tied" else nets.inputs()
    inputs = tuple(x.bfloat16() for x in inputs) if kind == "halves" else inputs
    assert same_bits(_answer(found, inputs), _answer(trained, inputs))


@pytest.mark.parametrize("form", ["state-dict", "torchscript", "exported"])
@pytest.mark.parametrize(
    "kind", ["tied", "norm", "spectral", "versioned", "extra", "rotary", "counting", "shared"]
)
def test_every_form_answers_as_the_model_in_evaluation_mode(
    kind: str, form: Any, nets: Any, tmp_path: Path
) -> None:
    trained = _trained(nets, kind)
    example = "tokens" if kind == "tied" else "inputs"
    out = tmp_path / ("out.pt2" if form == "exported" else "out.pt")
    _restore(_convert(trained, tmp_path), out, kind, save_as=form, example=f"restorable:{example}")
    trained.eval()
    inputs = getattr(nets, example)()
    state = _tensors(trained.state_dict())
    if form == "state-dict":
        assert_same_tensors(_tensors(torch.load(out, weights_only=True)), state)
        found = getattr(nets, kind)().eval()
        found.load_state_dict(torch.load(out, weights_only=True))
    elif form == "torchscript":
        found = torch.jit.load(out)
        assert_same_tensors({k: v for k, v in found.state_dict().items() if k in state}, state)
    else:
        program = torch.export.load(out)
        found = program.module()
        for name, tensor in program.state_dict.items():
            assert same_bits(tensor.detach(), state[name]), name
    for _ in range(2):
        torch.testing.assert_close(_answer(found, inputs), _answer(trained, inputs), rtol=1e-6, atol=1e-6)


def test_training_mode_on_request(nets: Any, tmp_path: Path) -> None:
    weights = _convert(_trained(nets, "norm"), tmp_path)
    for form in ("torchscript", "exported"):
        out = tmp_path / f"{form}.pt2"
        manifest = _restore(weights, out, "norm", save_as=form, example="restorable:inputs", train=True)
        assert manifest["options"]["restore"]["train"] is True
        program = torch.jit.load(out) if form == "torchscript" else torch.export.load(out).module()
        torch.manual_seed(0)
        first = program(*nets.inputs())
        torch.manual_seed(1)
        assert not torch.equal(first, program(*nets.inputs()))  # dropout is at work
    with pytest.raises(UsageError, match="--train"):
        RestoreOptions(model="restorable:norm", train=True)


def test_a_tie_of_nans_stays_one(nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, "tied")
    with torch.no_grad():
        trained.embedding.weight[0, 0] = float("nan")
    _restore(_convert(trained, tmp_path), tmp_path / "out.pt", "tied")
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert found.head.weight is found.embedding.weight
    assert same_bits(found.head.weight.detach(), trained.embedding.weight.detach())


def test_one_name_of_a_tie_is_enough(nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, "tied")
    values = trained.state_dict()
    del values["head.weight"]
    _restore(_convert(values, tmp_path), tmp_path / "out.pt", "tied")
    _assert_same_model(torch.load(tmp_path / "out.pt", weights_only=False), trained)


def test_two_values_under_one_tie_are_reported(nets: Any, tmp_path: Path) -> None:
    weights = _convert(nets.Untied(), tmp_path)
    with pytest.raises(ModelMismatchError, match=r"(?s)several values.*embedding\.weight, head\.weight"):
        _restore(weights, tmp_path / "out.pt", "tied")


@pytest.mark.parametrize("kind", ["norm", "tied", "aliased"])
def test_a_model_on_meta_is_filled(kind: str, nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, kind)
    _restore(_convert(trained, tmp_path), tmp_path / "out.pt", f"{kind}_on_meta")
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    _assert_same_model(found, trained)
    inputs = nets.tokens() if kind == "tied" else nets.inputs()
    assert same_bits(_answer(found, inputs), _answer(trained, inputs))
    if kind == "aliased":
        assert found.body.weight.mark == "sharded"
        assert found.alias[0] is found.body.weight


def test_a_model_on_meta_that_would_stay_empty_is_refused(nets: Any, tmp_path: Path) -> None:
    weights = _convert(_trained(nets, "rotary"), tmp_path)
    with pytest.raises(UsageError, match=r"nothing fills angles, plain \(attribute\)"):
        _restore(weights, tmp_path / "out.pt", "rotary_on_meta")
    values = _trained(nets, "norm").state_dict()
    del values["0.weight"]
    with pytest.raises(UsageError, match=r"nothing fills 0\.weight"):
        _restore(_convert(values, tmp_path), tmp_path / "out.pt", "norm_on_meta", allow_missing=("0.*",))
    assert not (tmp_path / "out.pt").exists()


def test_batch_norms_from_before_they_counted(nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, "norm")
    values = dict(trained.state_dict())  # without versions, as older files are
    del values["1.num_batches_tracked"]
    _restore(_convert(values, tmp_path), tmp_path / "out.pt", "norm")
    plain = nets.norm()
    plain.load_state_dict(torch.load(tmp_path / "weights.bin"))
    _assert_same_model(torch.load(tmp_path / "out.pt", weights_only=False), plain)


def test_weight_norm_into_parametrizations(nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, "old_norm")
    weights = _convert(trained, tmp_path)
    manifest = _restore(weights, tmp_path / "out.pt", "new_norm", save_as="state-dict")
    found = nets.new_norm()
    found.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert same_bits(_answer(found, nets.inputs()), _answer(trained, nets.inputs()))
    assert manifest["restored"]["changed"] == ["0.weight_g", "0.weight_v"]


def test_a_quantized_target(nets: Any, tmp_path: Path) -> None:
    """Its packed weights are no tensors to a state dict's reader, and go along as values."""
    trained = nets.quantized()
    weights = _convert({"model": trained.state_dict()}, tmp_path)
    manifest = _restore(weights, tmp_path / "out.pt", "quantized")
    given = json.loads(Path(f"{weights}.manifest.json").read_text())["tensors"]
    rows = [{row["name"]: [row[key] for key in ("dtype", "shape", "sha256")] for row in found}
            for found in (given, manifest["tensors"])]  # fmt: skip
    assert rows[0].items() >= rows[1].items()
    assert {row["dtype"] for row in manifest["tensors"]} == {"float32", "qint8"}
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert same_bits(_answer(found, nets.tokens()), _answer(trained, nets.tokens()))


@pytest.mark.parametrize("kind", ["parallel", "compiled"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped weights", "plain weights"])
def test_a_wrapper_takes_weights_with_its_prefix_and_without(
    kind: str, wrapped: bool, nets: Any, tmp_path: Path
) -> None:
    trained = _trained(nets, kind)
    inner = trained.module if kind == "parallel" else trained._orig_mod
    manifest = _restore(_convert(trained if wrapped else inner, tmp_path), tmp_path / "out.pt", kind)
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert type(found).__name__ == type(trained).__name__
    assert_same_tensors(_tensors(found.state_dict()), _tensors(trained.state_dict()))
    assert len(manifest["tensors"]) == 7


def test_what_keeps_its_initial_value_is_named_everywhere(
    nets: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {f"trunk.{name}": value for name, value in _trained(nets, "norm").state_dict().items()}
    weights = _convert({**values, "spare": torch.ones(2)}, tmp_path)
    words = ["restore", weights, str(tmp_path / "out.pt"), "--model", "restorable:bigger"]
    words += ["--model-path", str(NETS), "--allow-missing", "head.*", "--allow-unexpected", "spare"]
    assert run([*words, "--json"]) == 0
    initial = ["head.weight", "head.bias"]
    assert json.loads(capfd.readouterr().out)["initial"] == [{"source": weights, "names": initial}]
    manifest = json.loads((tmp_path / "out.pt.manifest.json").read_text())
    assert manifest["restored"] == {"initial": initial, "unused": ["spare"], "changed": []}
    assert run([*words, "--force"]) == 0
    assert f"initial values kept in {weights}: head.weight, head.bias" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("prefix", "kind", "advice"),
    [("model.", "norm", "--strip-prefix model."), ("", "bigger", "--rename '^=trunk.'")],
)
def test_the_report_names_the_option_that_helps(
    prefix: str, kind: str, advice: str, nets: Any, tmp_path: Path
) -> None:
    trained = _trained(nets, "norm")
    weights = _convert({prefix + name: value for name, value in trained.state_dict().items()}, tmp_path)
    with pytest.raises(ModelMismatchError) as refused:
        _restore(weights, tmp_path / "out.pt", kind)
    assert advice in str(refused.value)
    if kind == "norm":
        _restore(weights, tmp_path / "out.pt", kind, strip_prefix="model.")
        _assert_same_model(torch.load(tmp_path / "out.pt", weights_only=False), trained)
    else:
        _restore(weights, tmp_path / "out.pt", kind, rename=(("^", "trunk."),), allow_missing=("head.*",))


def test_the_report_names_the_state_dict_that_fits(nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, "norm")
    raw = {f"other.{name}.raw": value for name, value in trained.state_dict().items()}
    torch.save({"discriminator": raw, "generator": trained.state_dict()}, tmp_path / "two.pt")
    with pytest.raises(ModelMismatchError) as refused:
        _restore(str(tmp_path / "two.pt"), tmp_path / "out.pt", "norm", select="discriminator")
    assert "--select generator" in str(refused.value)
    _restore(str(tmp_path / "two.pt"), tmp_path / "out.pt", "norm", select="generator")
    _assert_same_model(torch.load(tmp_path / "out.pt", weights_only=False), trained)


def test_several_state_dicts_are_restored_as_one(tmp_path: Path) -> None:
    parts = {"encoder": {"w": torch.ones(3, 2)}, "decoder": {"w": torch.zeros(2), "b": torch.ones(1)}}
    torch.save({**parts, "discriminator": {"x": torch.ones(4)}}, tmp_path / "gan.pt")
    words = ["restore", str(tmp_path / "gan.pt"), str(tmp_path / "out.pt"), "-q"]
    assert run([*words, "--select", "encoder", "--select", "decoder"]) == 0
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    wanted = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    assert_same_tensors(found, wanted)


def test_rename_by_the_command(nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, "norm")
    weights = _convert({f"net.{name}": value for name, value in trained.state_dict().items()}, tmp_path)
    words = ["restore", weights, str(tmp_path / "out.pt"), "--model", "restorable:norm"]
    assert run([*words, "--model-path", str(NETS), "--rename", "^net[.]=", "-q"]) == 0
    _assert_same_model(torch.load(tmp_path / "out.pt", weights_only=False), trained)
    assert run(["restore", weights, str(tmp_path / "plain.pt"), "--strip-prefix", "net.", "-q"]) == 0
    assert list(torch.load(tmp_path / "plain.pt", weights_only=True)) == list(trained.state_dict())


def test_a_program_that_answers_differently_is_not_published(nets: Any, tmp_path: Path) -> None:
    weights = _convert(_trained(nets, "lying"), tmp_path)
    with pytest.raises(VerificationError, match="answers the example inputs differently"):
        _restore(weights, tmp_path / "out.pt", "lying", save_as="torchscript", example="restorable:inputs")
    assert sorted(path.name for path in tmp_path.glob("out*")) == []


def test_a_forward_that_changes_weights_is_not_traced(nets: Any, tmp_path: Path) -> None:
    weights = _convert(_trained(nets, "eager"), tmp_path)
    with pytest.raises(UsageError, match="changed its weights"):
        _restore(weights, tmp_path / "out.pt", "eager", save_as="torchscript", example="restorable:inputs")


@pytest.mark.parametrize("kind", ["spectral", "orthogonal", "new_norm"])
def test_parametrizations_come_back_in_a_state_dict(kind: str, nets: Any, tmp_path: Path) -> None:
    """torch pickles no module that has some."""
    trained = _trained(nets, kind)
    weights = _convert(trained, tmp_path)
    with pytest.raises(UsageError, match="--as state-dict"):
        _restore(weights, tmp_path / "out.pt", kind)
    _restore(weights, tmp_path / "out.pt", kind, save_as="state-dict")
    assert_same_tensors(torch.load(tmp_path / "out.pt", weights_only=True), trained.state_dict())


@pytest.mark.parametrize("kind", ["with_lambda", "local_class"])
def test_what_cannot_be_pickled_is_told_the_way_out(kind: str, nets: Any, tmp_path: Path) -> None:
    weights = _convert(_trained(nets, "norm") if kind == "with_lambda" else nets.local_class(), tmp_path)
    with pytest.raises(UsageError, match="--as state-dict"):
        _restore(weights, tmp_path / "out.pt", kind)
    _restore(weights, tmp_path / "out.pt", kind, save_as="state-dict")


def test_a_damaged_source_is_not_restored(nets: Any, tmp_path: Path) -> None:
    """torch maps it without a word; its CRC-32 is checked while the model is built."""
    weights = Path(_convert(_trained(nets, "norm"), tmp_path))
    data = bytearray(weights.read_bytes())
    row = json.loads(Path(f"{weights}.manifest.json").read_text())["tensors"][0]
    data[row["offset"] + 3] ^= 0x10
    weights.write_bytes(data)
    with pytest.raises(ptbin.errors.ChecksumMismatchError):
        _restore(str(weights), tmp_path / "out.pt", "norm")
    assert not (tmp_path / "out.pt").exists()


def test_what_torch_maps_is_held_against_what_ptbin_read(nets: Any, tmp_path: Path) -> None:
    weights = _convert(_trained(nets, "norm"), tmp_path)
    loaded = torch.load(weights, weights_only=True, mmap=True)
    hashed, given = Contents().of_values(loaded), mapped_views(loaded, weights)
    assert given.keys() == loaded.keys() == hashed.keys()
    with open_weights(place_of(weights), RestoreOptions(), tmp_path) as opened:
        assert opened.archive == weights  # in its place, no copy
        opened.check_given(given)
        opened.check_given(hashed)  # not known where it lies, so it was hashed: the same bytes
        offset, *view = given["0.weight"][2]
        for wrong in ([offset + 64, *view], hashed["0.bias"][2]):
            with pytest.raises(VerificationError, match=r"0\.weight"):
                opened.check_given({**given, "0.weight": [*given["0.weight"][:2], wrong]})
        with pytest.raises(VerificationError, match="more"):
            opened.check_given({**given, "more": given["0.bias"]})


def test_weights_are_not_hashed_while_their_memory_is_the_files(nets: Any, tmp_path: Path) -> None:
    weights = _convert(_trained(nets, "norm"), tmp_path)
    loaded = torch.load(weights, weights_only=True, mmap=True)
    hashed = Contents().of_values(loaded)
    assert Contents(weights).of_values(loaded) == mapped_views(loaded, weights)
    loaded["0.weight"].neg_()
    found = Contents(weights).of_values(loaded)
    assert found["0.bias"] == hashed["0.bias"]
    assert found["0.weight"] != hashed["0.weight"]
    assert isinstance(found["0.weight"][2], str)


@pytest.mark.parametrize("checked", [True, False], ids=["with CRC-32s", "without"])
@pytest.mark.parametrize(
    ("kind", "values", "changed"),
    [
        ("doubling", {"weight": torch.arange(8.0).view(2, 4), "bias": torch.ones(2)}, ["weight"]),
        ("halved", {"both": torch.arange(16.0).view(4, 4)}, ["both"]),
    ],
)
def test_what_loading_changes_is_told(
    kind: str, values: Any, changed: list[str], checked: bool, nets: Any, tmp_path: Path
) -> None:
    """Neither is a record of the source any more, by which it could be compared."""
    torch.serialization.set_crc32_options(checked)
    try:
        torch.save(values, tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    manifest = _restore(str(tmp_path / "weights.pt"), tmp_path / "out.pt", kind)
    wanted = getattr(nets, kind)()
    wanted.load_state_dict(torch.load(tmp_path / "weights.pt"))
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert_same_tensors(_tensors(found.state_dict()), _tensors(wanted.state_dict()))
    assert manifest["restored"]["changed"] == changed


@pytest.mark.parametrize("form", ["raw", "safetensors"])
def test_other_formats_and_stores(form: Any, nets: Any, tmp_path: Path) -> None:
    trained = _trained(nets, "norm")
    torch.save(trained.state_dict(), tmp_path / "source.pt")
    weights = tmp_path / ("w.bin" if form == "raw" else "w.safetensors")
    ptbin.convert(str(tmp_path / "source.pt"), str(weights), ConvertOptions(format=form))
    options = RestoreOptions(model="restorable:norm", model_path=str(NETS))
    ptbin.restore(str(weights), "memory://restored/out.pt", options)
    assert ptbin.verify("memory://restored/out.pt.manifest.json") == []
    from ptbin.stores import open_store

    store, path = open_store("memory://restored/out.pt")
    (tmp_path / "out.pt").write_bytes(store.read_bytes(path))
    _assert_same_model(torch.load(tmp_path / "out.pt", weights_only=False), trained)


# -- transformers --------------------------------------------------------------------------------


def _tiny(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "vocab_size": 30}
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**small, num_key_value_heads=1, num_local_experts=2)
        return transformers.MixtralForCausalLM(config).eval()
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**small)).eval()
    config = transformers.LlamaConfig(**small, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["mixtral", "bert", "llama"])
@pytest.mark.parametrize("layout", ["saved", "converted"])
def test_transformers_takes_what_from_pretrained_takes(kind: str, layout: str, tmp_path: Path) -> None:
    model = _tiny(kind)
    folder = tmp_path / "hub"
    model.save_pretrained(folder)
    source = folder
    if layout == "converted":
        source = tmp_path / "bin"
        ptbin.convert(str(folder), str(source / "pytorch_model.bin"), ConvertOptions(layout="hf"))
    ptbin.restore(str(source), str(tmp_path / "out.pt"), RestoreOptions(model="transformers"))
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert_same_tensors(_tensors(found.state_dict()), _tensors(model.state_dict()))
    tokens = torch.arange(5)[None]
    assert same_bits(found(tokens).logits.detach(), model(tokens).logits.detach())


def test_names_of_the_first_berts(tmp_path: Path) -> None:
    model = _tiny("bert")
    model.save_pretrained(tmp_path / "hub")
    values = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in model.state_dict().items()
    }
    (tmp_path / "hub" / "model.safetensors").unlink()
    torch.save(values, tmp_path / "hub" / "pytorch_model.bin")
    ptbin.restore(str(tmp_path / "hub"), str(tmp_path / "out.pt"), RestoreOptions(model="transformers"))
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert_same_tensors(_tensors(found.state_dict()), _tensors(model.state_dict()))


def test_what_transformers_would_make_up_is_told(tmp_path: Path) -> None:
    model = _tiny("llama")
    model.save_pretrained(tmp_path / "hub")
    values = dict(model.state_dict())
    del values["model.layers.1.mlp.up_proj.weight"], values["lm_head.weight"]
    values["model.norm.weight"] = torch.ones(3)
    (tmp_path / "hub" / "model.safetensors").unlink()
    torch.save(values, tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(ModelMismatchError) as refused:
        ptbin.restore(str(tmp_path / "hub"), str(tmp_path / "out.pt"), RestoreOptions(model="transformers"))
    said = str(refused.value)
    assert "1 missing in the weights:\n  model.layers.1.mlp.up_proj.weight" in said
    assert "model.norm.weight: weights (3,), model (16,)" in said
    assert "random values" in said
