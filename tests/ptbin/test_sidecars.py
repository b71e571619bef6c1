"""Companions of a Hugging Face model: copied as they are, but for the element type that a cast changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ptbin
from ptbin import ConvertOptions
from ptbin.sources.sidecars import change_of, with_dtype
from ptbin.stores import place_of
from ptbin.stores.copying import copy_file, same_content


@pytest.mark.parametrize(
    ("before", "after", "was"),
    [
        (b'{"a": 1, "torch_dtype": "float32"}', b'{"a": 1, "torch_dtype": "float16"}', "float32"),
        (b'{\n  "dtype" : null\n}', b'{\n  "dtype" : "float16"\n}', "null"),
        (b'{"a": 1}', b'{"a": 1,\n  "torch_dtype": "float16"\n}', "nothing"),
        (b"{}", b'{\n  "torch_dtype": "float16"\n}', "nothing"),
        (
            b'{"text_config": {"dtype": "bfloat16"}, "dtype": "float32"}',
            b'{"text_config": {"dtype": "float16"}, "dtype": "float16"}',
            "bfloat16, float32",
        ),
    ],
)
def test_the_type_is_the_one_thing_that_changes(before: bytes, after: bytes, was: str) -> None:
    changed, note = with_dtype(before, "float16")
    assert changed == after
    json.loads(changed)
    assert note == f"config.json says dtype float16, in place of {was}"


@pytest.mark.parametrize(
    "text", [b'{"dtype": "float16"}', b"[1]", b"not json", b'{"my_dtype": 3, "dtype": "float16"}']
)
def test_nothing_changes_where_nothing_is_to_be_said(text: bytes) -> None:
    assert with_dtype(text, "float16") == (text, "")


@pytest.mark.thorough
def test_a_cast_model_loads_in_the_type_of_its_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hub")
    manifest = ptbin.convert(
        str(tmp_path / "hub"),
        str(tmp_path / "out" / "pytorch_model.bin"),
        ConvertOptions(layout="hf", dtype="bfloat16"),
    )
    assert manifest["notes"] == ["config.json says dtype bfloat16, in place of float32"]
    before = json.loads((tmp_path / "hub" / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before | {"dtype": "bfloat16"} == after
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert ptbin.verify(str(tmp_path / "out" / "pytorch_model.bin.manifest.json")) == []


@pytest.mark.parametrize("text", ['{"layers": 2}', "[]", "not json"])
def test_a_mirror_leaves_other_configurations_alone(text: str, tmp_path: Path) -> None:
    """Files of that name belong to many things; those of transformers say what they are."""
    change = change_of("config.json", "float16")
    assert change is not None
    assert change(text.encode()) == text.encode()
    assert json.loads(change(b'{"model_type": "bert"}'))["torch_dtype"] == "float16"


@pytest.mark.parametrize(("name", "dtype"), [("config.json", None), ("tokenizer.json", "float16")])
def test_a_mirror_copies_everything_else_as_it_is(name: str, dtype: str | None) -> None:
    assert change_of(name, dtype) is None


def test_a_changed_copy_is_compared_by_what_it_would_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    source, dest = place_of(tmp_path / "config.json"), place_of(tmp_path / "out" / "config.json")
    change = change_of("config.json", "float16")
    copied = copy_file(source, dest, change=change)
    assert (tmp_path / "out" / "config.json").read_text() == '{"dtype": "float16"}'
    assert copied.size == len('{"dtype": "float16"}')
    assert same_content(source, dest, change=change) == replace(copied, changed=False)
    assert same_content(source, dest) is None
    assert same_content(source, dest, change=change_of("config.json", "bfloat16")) is None
