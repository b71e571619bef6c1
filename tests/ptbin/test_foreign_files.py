"""Files that are no checkpoints: named by what they are, so that a reader knows what went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx import TensorProto, helper, save_model

import ptbin
from ptbin.errors import NoStateDictError, NotACheckpointError


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xef\xbb\xbf \n<!doctype html><html>", "HTML page; was the download refused"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML, as a store answers"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "run `git lfs pull`"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(50), "RAR archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG image"),
    ],
)
def test_what_a_file_is_stands_in_the_message(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(NotACheckpointError, match=said):
        ptbin.convert(tmp_path / "model.pt", tmp_path / "model.bin")


def test_an_onnx_model_is_called_one(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "g", [value], [value])
    save_model(helper.make_model(graph), tmp_path / "model.pt")
    with pytest.raises(NotACheckpointError, match="ONNX"):
        ptbin.convert(tmp_path / "model.pt", tmp_path / "model.bin")


def test_what_holds_no_state_dict_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": [{"lr": 0.1}]}, tmp_path / "optimizer.pt")
    with pytest.raises(NoStateDictError, match=r"what it holds \(dict of 'state', 'param_groups'\)"):
        ptbin.convert(tmp_path / "optimizer.pt", tmp_path / "model.bin")


def test_a_path_of_bytes_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"os\.fsdecode"):
        ptbin.convert(bytes(tmp_path / "a.pt"), tmp_path / "a.bin")  # type: ignore[arg-type]
