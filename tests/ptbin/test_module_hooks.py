"""Hooks on `state_dict()` of a module that was pickled whole: seen, told, never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptbin
from flows.cli.app import run

RAN: list[str] = []


def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    RAN.append(prefix)


def before(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    RAN.append(prefix)


def saved(path: Path, *modules: nn.Module) -> Path:
    torch.save(nn.Sequential(*modules), path)
    RAN.clear()
    return path


def after(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    RAN.append(prefix)


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        ("register_state_dict_post_hook", after),
        ("register_state_dict_pre_hook", before),
        ("_register_state_dict_hook", rename),  # what FSDP and older libraries call
    ],
)
def test_hooks_are_noted_and_not_run(
    register: str, hook: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hooked = nn.Linear(3, 2)
    getattr(hooked, register)(hook)
    source = saved(tmp_path / "net.pt", nn.Linear(2, 3), hooked)
    manifest = ptbin.convert(source, tmp_path / "net.bin")
    (note,) = manifest["notes"]
    assert "state_dict() of 1 were not run" in note
    assert ptbin.inspect(source)["notes"] == [note]
    assert run(["inspect", str(source)]) == 0
    assert "were not run" in capsys.readouterr().out
    assert RAN == []


def test_modules_without_hooks_of_their_own_have_no_note(tmp_path: Path) -> None:
    layer = nn.utils.spectral_norm(nn.Linear(3, 2))  # torch's own hook adds to the metadata alone
    manifest = ptbin.convert(saved(tmp_path / "net.pt", nn.Linear(2, 3), layer), tmp_path / "net.bin")
    assert "notes" not in manifest


def test_many_are_counted(tmp_path: Path) -> None:
    layers = [nn.Linear(2, 2) for _ in range(9)]
    for layer in layers:
        layer._register_state_dict_hook(rename)
    manifest = ptbin.convert(saved(tmp_path / "net.pt", *layers), tmp_path / "net.bin")
    assert "state_dict() of 0, 1, 2 and 6 more were not run" in manifest["notes"][0]
