"""Recipes: parts of other trainers become whole, tensors get other names and cuts, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import ptbin
from flows.cli.app import cli
from ptbin import ConvertOptions, catalog
from ptbin.errors import (
    CheckpointError,
    IncompleteCheckpointError,
    ModelMismatchError,
    OutputCollisionError,
    PtbinError,
    UsageError,
)
from ptbin.merging.planner import plan_recipe
from ptbin.merging.recipes import parse_recipe
from ptbin.merging.shipped import SHIPPED, find_recipe
from ptbin.values.dtypes import dtype_by_name
from ptbin.values.tensors import ByteRange, Joined, Storage, TensorRef, dense_strides
from tests.bits import assert_same_tensors
from tests.checkpoints.llama import HEAD, HEADS, KEY_HEADS, LAYERS, VOCABULARY, WIDTH, write_meta_parts

pytestmark = pytest.mark.filterwarnings("ignore")


def _converted(
    source: Path, dest: Path, recipe: str | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    ptbin.convert(str(source), str(dest), ConvertOptions(recipe=recipe, **options))
    found: dict[str, torch.Tensor] = torch.load(dest, weights_only=True)
    return found


def _recipe(*rules: dict[str, Any], **others: Any) -> str:
    return json.dumps({"name": "mine", "tensors": list(rules), **others})


# -- Meta's parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "embedding"), [(1, 0), (2, 0), (2, 1), (4, 1), (8, 0)])
def test_metas_parts_become_whole(tmp_path: Path, count: int, embedding: int) -> None:
    whole = write_meta_parts(tmp_path / "in", count, embedding=embedding)
    assert_same_tensors(_converted(tmp_path / "in", tmp_path / "x.bin", verify="load"), whole)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_transformers_reads_llama_hf_and_computes_what_metas_model_does(tmp_path: Path, count: int) -> None:
    transformers = pytest.importorskip("transformers")
    whole = write_meta_parts(tmp_path / "in", count)
    found = _converted(tmp_path / "in", tmp_path / "x.bin", "llama-hf")
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).double()
    model.load_state_dict({name: tensor.double() for name, tensor in found.items()}, strict=True)
    tokens = torch.arange(11)
    logits = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits, _meta_logits(whole, tokens), rtol=1e-4, atol=1e-4)


def _meta_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Meta's model.py, by its own pairs of rotated numbers, in double precision."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    count = len(tokens)
    angles = torch.outer(
        torch.arange(count).double(), 1.0 / 10000.0 ** (torch.arange(0, HEAD, 2).double() / HEAD)
    )
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w[name]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(count, -1, HEAD // 2, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    x = w["tok_embeddings.weight"][tokens]
    mask = torch.full((count, count), -torch.inf).double().triu(1)
    for layer in range(LAYERS):
        above = f"layers.{layer}."
        h = norm(x, above + "attention_norm.weight")
        q, k, v = (h @ w[f"{above}attention.w{n}.weight"].T for n in "qkv")
        q, k = rotated(q.view(count, HEADS, HEAD)), rotated(k.view(count, KEY_HEADS, HEAD))
        k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 1) for t in (k, v.view(count, KEY_HEADS, HEAD)))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[above + "attention.wo.weight"].T
        h = norm(x, above + "ffn_norm.weight")
        gate = torch.nn.functional.silu(h @ w[above + "feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w[above + "feed_forward.w3.weight"].T)) @ w[above + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


def test_a_folder_of_metas_parts_is_one_checkpoint_in_bulk(tmp_path: Path) -> None:
    write_meta_parts(tmp_path / "in" / "7B" / "original", 2)
    found = [item.path for item in catalog.find_checkpoints(str(tmp_path / "in")) if item.certain]
    assert found == ["7B/original"]


DAMAGED = {"norms": "norm.weight", "shape": "output.weight", "key heads": "layers.0.attention.wk.weight"}


@pytest.mark.parametrize(
    ("damage", "reason", "names"),
    [
        ("one", "incomplete_checkpoint", "consolidated.01.pth"),
        ("gap", "incomplete_checkpoint", "not there: consolidated.01.pth"),
        ("truncated", "corrupt_archive", "consolidated.01.pth"),
        ("norms", "incomplete_checkpoint", "norm.weight"),
        ("shape", "incomplete_checkpoint", "not of one save"),
        ("key heads", "incomplete_checkpoint", "attention.wk.weight"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_by_name(
    tmp_path: Path, damage: str, reason: str, names: str
) -> None:
    folder = tmp_path / "in"
    write_meta_parts(folder, 8)
    second = folder / "consolidated.01.pth"
    source = second if damage == "one" else folder
    if damage == "gap":
        second.unlink()
    elif damage == "truncated":
        second.write_bytes(second.read_bytes()[:-300])
    elif damage in ("norms", "shape", "key heads"):
        state = torch.load(second, weights_only=True)
        name = {
            "norms": "norm.weight",
            "shape": "output.weight",
            "key heads": "layers.0.attention.wk.weight",
        }[damage]
        state[name] = state[name][:, :-1].clone() if damage == "shape" else state[name] + 1
        torch.save(state, second)
    with pytest.raises(CheckpointError) as caught:
        ptbin.convert(str(source), str(tmp_path / "x.bin"))
    assert caught.value.reason == reason
    assert names in str(caught.value)
    assert not (tmp_path / "x.bin").exists()


def test_a_value_that_nothing_states_is_asked_for(tmp_path: Path) -> None:
    write_meta_parts(tmp_path / "in", 2)
    (tmp_path / "in" / "params.json").unlink()
    with pytest.raises(ModelMismatchError, match="'n_heads'"):
        _converted(tmp_path / "in", tmp_path / "x.bin", "llama-hf")


# -- experts -------------------------------------------------------------------------------------------------


def _experts(tmp_path: Path, names: tuple[str, str, str], above: str) -> tuple[Path, dict[str, torch.Tensor]]:
    gate, up, down = names
    state = {"model.embed.weight": torch.randn(4, 5)}
    for expert in range(11):  # in an order that is not that of their names
        state |= {
            f"{above}.experts.{expert}.{gate}.weight": torch.randn(6, 5),
            f"{above}.experts.{expert}.{down}.weight": torch.randn(5, 6),
            f"{above}.experts.{expert}.{up}.weight": torch.randn(6, 5),
        }
    torch.save(dict(sorted(state.items())), tmp_path / "split.pt")
    return tmp_path / "split.pt", state


@pytest.mark.parametrize(
    ("names", "above", "fused", "back"),
    [
        (("gate_proj", "up_proj", "down_proj"), "model.layers.3.mlp", "model.layers.3.mlp", "moe-split"),
        (("w1", "w3", "w2"), "model.layers.3.block_sparse_moe", "model.layers.3.mlp", "moe-split-mixtral"),
    ],
)
def test_experts_are_fused_and_split_again(
    tmp_path: Path, names: tuple[str, str, str], above: str, fused: str, back: str
) -> None:
    source, state = _experts(tmp_path, names, above)
    found = _converted(source, tmp_path / "fused.bin", "moe-fuse", verify="load")

    def stack(name: str) -> torch.Tensor:
        return torch.stack([state[f"{above}.experts.{e}.{name}.weight"] for e in range(11)])

    expected = {
        "model.embed.weight": state["model.embed.weight"],
        f"{fused}.experts.gate_up_proj": torch.cat([stack(names[0]), stack(names[1])], 1),
        f"{fused}.experts.down_proj": stack(names[2]),
    }
    assert_same_tensors(found, expected)
    again = _converted(tmp_path / "fused.bin", tmp_path / "split.bin", back)
    assert_same_tensors(again, state)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in again.values())


def test_a_missing_expert_is_missed(tmp_path: Path) -> None:
    source, state = _experts(tmp_path, ("gate_proj", "up_proj", "down_proj"), "m")
    del state["m.experts.4.up_proj.weight"]
    torch.save(state, source)
    with pytest.raises(IncompleteCheckpointError, match=r"up_proj.* with e 4"):
        _converted(source, tmp_path / "x.bin", "moe-fuse")


# -- recipes of one's own ------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save({"a.qkv": torch.arange(48.0).reshape(12, 4), "norm": torch.ones(3)}, tmp_path / "m.pt")
    return tmp_path / "m.pt"


def _third(index: int) -> list[dict[str, Any]]:
    return [{"split": [0, ["heads", 3, -1]]}, {"take": [1, index, 1]}, {"flatten": [0, 2]}]


QKV = [{"from": r"(.+)\.qkv", "to": f"{{1}}.{n}", "steps": _third(i)} for i, n in enumerate("qkv")]


def test_an_interleaved_matrix_is_taken_apart(source: Path, tmp_path: Path) -> None:
    recipe = _recipe(*QKV, values={"heads": "1 + 1"}, others="keep")
    found = _converted(source, tmp_path / "x.bin", recipe, verify="load")
    whole = torch.arange(48.0).reshape(2, 3, 2, 4)
    expected = {f"a.{n}": whole[:, i].reshape(4, 4) for i, n in enumerate("qkv")}
    assert_same_tensors(found, {**expected, "norm": torch.ones(3)})


@pytest.mark.parametrize(
    ("rules", "others", "error", "why"),
    [
        (QKV[:2], {"values": {"heads": 2}, "others": "keep"}, ModelMismatchError, "32 of its 48 elements"),
        ([*QKV, QKV[0]], {"values": {"heads": 2}, "others": "keep"}, ModelMismatchError, "64 of its 48"),
        (
            [*QKV[:2], {**QKV[0], "to": "z"}],
            {"values": {"heads": 2}, "others": "keep"},
            ModelMismatchError,
            "overlap",
        ),
        (QKV, {"values": {"heads": 2}}, ModelMismatchError, "no rule for 1 tensors: norm"),
        (QKV, {"others": "keep"}, ModelMismatchError, "'heads', which the checkpoint does not state"),
        (QKV, {"values": {"heads": 5}, "others": "keep"}, ModelMismatchError, "12 is not"),
        ([{"from": "nothing", "to": "x"}], {"others": "keep"}, ModelMismatchError, "names none of 2 tensors"),
        ([{"from": "norm", "to": "a.qkv"}], {"others": "keep"}, OutputCollisionError, "twice"),
    ],
)
def test_a_recipe_that_would_lose_or_double_something_is_refused(
    source: Path,
    tmp_path: Path,
    rules: list[dict[str, Any]],
    others: dict[str, Any],
    error: type[Exception],
    why: str,
) -> None:
    with pytest.raises(error, match=why):
        _converted(source, tmp_path / "x.bin", _recipe(*rules, **others))
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("no-such", "is neither one of llama-meta, .* nor a recipe in JSON; of a file, give the content"),
        ('{"tensors": [{"from": "(", "to": "x"}]}', "not a regular expression"),
        ('{"tensors": [{"from": "a", "to": "x", "order": [0]}]}', "unknown key 'order'"),
        ('{"tensors": [{"from": "a", "to": "x", "steps": [{"sum": [0]}]}]}', "'sum'"),
        ('{"merge": [{"names": ".*", "how": "summed"}]}', "'summed' is not one of"),
        ("{}", "neither `merge` nor `tensors`"),
        ('{"values": [], "merge": [{"names": "a", "how": "rows"}]}', "values"),
        ('{"like": "no-such"}', "`like` 'no-such' is not one of"),
        ('{"tensors": [{"from": "a", "to": "x"}, {"from": "b", "to": ""}]}', "tensors 1: `to` is not a name"),
        ('{"tensors": [{"from": "a", "to": "x", "concat": -1}]}', "tensors 0: `concat` is not an axis"),
        ('{"tensors": [{"from": "a(.)", "to": "x", "stack": "e"}]}', "`stack` 'e' is not a group"),
        ('{"tensors": [{"from": "a", "to": "x", "steps": [{"order": [0, -1]}]}]}', "names no axis"),
        ('{"tensors": [{"from": "a(.)", "to": "x.{1.real}"}]}', "braces that are neither"),
        ('{"tensors": [], "tensors": [{"from": "a", "to": "x"}]}', "the key 'tensors' stands twice"),
        ('{"tensors": [{"from": "a", "to": "x"}],\n "others": "keep",}', "line 2"),
        ('{"tensors": [{"from": "a", "to": "x", "steps": [{"cut": [0, 3]}]}]}', "the name of a value"),
    ],
)
def test_a_recipe_that_is_none_is_a_wrong_call(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        ConvertOptions(recipe=text)


RULE: dict[str, Any] = {"from": r"a\.(qkv)", "to": "x.{1}"}


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ({"steps": [{"order": [1, 0, 2]}]}, r"order \[1, 0, 2\] of 2 axes \(tensors 1, from"),
        ({"steps": [{"split": [5, [2, -1]]}]}, r"of a shape \[12, 4\] \(tensors 1"),
        ({"steps": [{"split": [0, [10**30, -1]]}]}, "is more than"),
        ({"steps": [{"take": [0, 6, 10**12]}]}, "from 6 on of an axis of 12"),
        ({"steps": [{"take": [0, 0, "1" + "+1" * 480]}]}, r"tensors 1"),
        ({"steps": [{"take": [0, 0, "1" + "+1" * 4000]}]}, "at most 1000"),
        ({"steps": [{"flatten": [1, 0]}]}, r"flatten from 1 to 0 \(tensors 1"),
        ({"steps": [{"unstack": [0, ""]}]}, "unstacked into a new named group"),
        ({"to": "x.{2}"}, r"names no group '2' \(tensors 1"),
        ({"to": "x.{1 - 3}"}, r"'qkv' is not a number \(tensors 1"),
        ({"from": [r"a\.qkv", "norm"]}, r"puts 'a.qkv' .* together \(tensors 1"),
    ],
)
def test_a_rule_that_does_not_fit_is_named(
    source: Path, tmp_path: Path, rule: dict[str, Any], why: str
) -> None:
    recipe = _recipe({"from": "norm", "to": "n"}, {**RULE, **rule}, others="keep")
    with pytest.raises(CheckpointError, match=why):
        _converted(source, tmp_path / "x.bin", recipe)
    report = ptbin.inspect(str(source), options=ConvertOptions(recipe=recipe))
    assert report["reason"] == "model_mismatch"


_JUNK = st.one_of(
    st.none(),
    st.integers(-2, 10**20),
    st.sampled_from(["", "(", "a.qkv", "{1}", "heads", "1/0", "rows", "9" * 5000]),
    st.lists(st.integers(-1, 4), max_size=3),
    st.dictionaries(st.sampled_from(["split", "take", "order", "cut", "unstack", "to"]), st.integers(0, 3)),
)


@settings(max_examples=150, deadline=None)
@given(
    at=st.sampled_from(
        ["from", "to", "steps", "concat", "stack", "values", "others", "merge", "tensors", "x"]
    ),
    junk=_JUNK,
    step=st.sampled_from(["split", "take", "order", "cut", "unstack", "flatten"]),
    arguments=st.lists(_JUNK, max_size=3),
)
def test_no_wrong_recipe_ends_otherwise_than_in_an_error_of_its_own(
    at: str, junk: Any, step: str, arguments: list[Any]
) -> None:
    float32 = dtype_by_name("float32")
    assert float32 is not None
    tensors = {
        name: TensorRef(Storage(name, 4 * n, ByteRange(0, 4 * n)), float32, shape, dense_strides(shape))
        for name, shape, n in (("a.qkv", (12, 4), 48), ("norm", (3,), 3))
    }
    rule: dict[str, Any] = {**RULE, "steps": [{step: arguments}]}
    recipe: dict[str, Any] = {"tensors": [rule], "values": {"heads": 2}, "others": "keep"}
    (rule if at in ("from", "to", "steps", "concat", "stack") else recipe)[at] = junk
    with contextlib.suppress(PtbinError):
        plan_recipe(parse_recipe(json.dumps(recipe)), tensors, {}, "somewhere")


def test_arithmetic_of_a_recipe_is_only_arithmetic(source: Path, tmp_path: Path) -> None:
    for text in ("__import__('os')", "2 ** 62", "heads.real", "1 / 2", "1 / 0"):
        with pytest.raises(ModelMismatchError):
            _converted(source, tmp_path / "x.bin", _recipe(*QKV, values={"heads": text}, others="keep"))


def test_a_cut_keeps_what_the_value_says_and_names_the_rest_as_padding(source: Path, tmp_path: Path) -> None:
    rule = {"from": "a.qkv", "to": "rows", "steps": [{"cut": [0, "known"]}, {"cut": [0, "unknown"]}]}
    recipe = _recipe(rule, values={"known": 7}, others="keep")
    options = ConvertOptions(recipe=recipe, verify="load")
    manifest = ptbin.convert(str(source), str(tmp_path / "x.bin"), options)
    found = torch.load(tmp_path / "x.bin", weights_only=True)
    assert_same_tensors(found, {"rows": torch.arange(28.0).reshape(7, 4), "norm": torch.ones(3)})
    assert manifest["accounting"]["left_out"] == {"padding": 5 * 4 * 4}


def test_two_axes_become_names(source: Path, tmp_path: Path) -> None:
    steps = [{"split": [0, [3, 4]]}, {"unstack": [0, "i"]}, {"unstack": [0, "j"]}]
    recipe = _recipe({"from": r"(a)\.qkv", "to": "{1}.{i}.{j}", "steps": steps}, others="keep")
    found = _converted(source, tmp_path / "x.bin", recipe)
    rows = torch.arange(48.0).reshape(3, 4, 4)
    expected = {f"a.{i}.{j}": rows[i, j].clone() for i in range(3) for j in range(4)}
    assert_same_tensors(found, {**expected, "norm": torch.ones(3)})


def test_pieces_of_one_shape_are_not_taken_for_one_another() -> None:
    """Views of joined pieces are made of passing objects, whose identities Python gives away again."""
    dtype = dtype_by_name("float32")
    assert dtype is not None
    tensors = {}
    for number in range(50):
        parts = tuple(ByteRange(number * 64 + piece * 32, 32) for piece in range(2))
        tensors[f"w{number}"] = TensorRef(Storage(str(number), 64, Joined(parts)), dtype, (8, 2), (2, 1))
    rule = {
        "from": r"w(\d+)",
        "to": "{1}.{half}",
        "steps": [{"split": [0, [2, 4]]}, {"unstack": [0, "half"]}],
    }
    planned = plan_recipe(find_recipe(_recipe(rule)), tensors, {}, "x")
    places = {name: tensor.storage.place for name, (tensor, _) in planned.tensors.items()}
    assert places == {
        f"{number}.{half}": ByteRange(number * 64 + half * 32, 32)
        for number in range(50)
        for half in range(2)
    }


def test_all_shipped_recipes_are_recipes() -> None:
    for name in SHIPPED:
        assert find_recipe(name).name == name


def test_the_command_line_takes_a_file_and_prints_the_plan(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(_recipe(*QKV, values={"heads": 2}, others="keep"))
    told = CliRunner().invoke(cli, ["inspect", str(source), "--recipe", str(path)])
    assert told.exit_code == 0, told.output
    assert "from a.qkv" in told.output
    told = CliRunner().invoke(cli, ["inspect", str(source), "--recipe", str(path), "--json"])
    rows = {row["name"]: row for row in json.loads(told.stdout)["tensors"]}
    assert rows["a.k"]["made_of"] == ["a.qkv"]
    assert "made_of" not in rows["norm"]
    shutil.copy(path, tmp_path / "broken.json")
    (tmp_path / "broken.json").write_text('{"tensors": [{}]}')
    told = CliRunner().invoke(cli, ["inspect", str(source), "--recipe", str(tmp_path / "broken.json")])
    assert isinstance(told.exception, UsageError)
