"""The law over files that strangers wrote, with parts renamed, removed, nested and doubled.

The outer value is taken apart where `torch.load(weights_only=True)` reads it, changed and saved again; the
archive of any file that is one is changed by its members. Files under malicious/ are never unpickled, nor is
what torch refuses to read: of these only the members are changed.
"""

from __future__ import annotations

import copy
import tempfile
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import ptbin
from ptbin.errors import PtbinError
from tests.checkpoints.craft import read_members, write_zip
from tests.interop.test_corpus import CORPUS
from tests.laws.law import hold, write
from tests.laws.test_random_trees import WRITERS, long

pytestmark = [
    pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus at {CORPUS}"),
    pytest.mark.filterwarnings("ignore"),
]

FILES = sorted(
    path
    for path in CORPUS.rglob("*")
    if path.is_file() and path.suffix != ".md" and path.stat().st_size < 4 << 20
)
KEYS = "model state_dict optimizer ema extra_state net backbone config loss opt metrics 0 a.b student".split()
PLAIN_REASONS = frozenset(
    [
        "ambiguous_state_dict",
        "no_state_dict",
        "unsupported_tensor",
        "incomplete_checkpoint",
        "corrupt_archive",
    ]
)


@cache
def _read(path: Path) -> Any:
    """What the file holds where torch reads it without running anything, else None."""
    if "malicious" in path.parts:
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - TorchScript, classes that are gone: another test's business
        return None


READABLE = [path for path in FILES if _read(path) is not None]
ARCHIVES = [path for path in FILES if zipfile.is_zipfile(path)]


def _mappings(value: Any, depth: int = 0) -> list[dict[Any, Any]]:
    """The value and the mappings in it, three levels down."""
    if not isinstance(value, dict) or depth > 3:
        return []
    return [value, *(found for child in value.values() for found in _mappings(child, depth + 1))]


def _shallow(value: Any) -> Any:
    """A copy of the mappings and lists; tensors are the same."""
    if isinstance(value, OrderedDict):
        return OrderedDict((key, _shallow(child)) for key, child in value.items())
    if isinstance(value, dict):
        return {key: _shallow(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_shallow(child) for child in value]
    return value if isinstance(value, torch.Tensor) else copy.copy(value)


@st.composite
def _operated(draw: st.DrawFn) -> Any:
    value = _shallow(_read(draw(st.sampled_from(READABLE))))
    for operation in draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)):
        places = [place for place in _mappings(value) if place]
        if not places:
            value = {draw(st.sampled_from(KEYS)): value}
            continue
        place = draw(st.sampled_from(places))
        key = draw(st.sampled_from(list(place)))
        new = draw(st.sampled_from(KEYS))
        if operation == 0 and len(place) > 1:
            del place[key]
        elif operation == 1:
            place.setdefault(new, place.pop(key))
        elif operation == 2:
            place[key] = {new: place[key]}
        elif operation == 3:
            place.setdefault(new, place[key])
        elif operation == 4:
            value = {new: value}
        elif operation == 5:
            place[key] = [place[key], torch.randn(3)]
        elif operation == 6:
            part = {name: place.pop(name) for name in list(place)[: len(place) // 2]}
            place.setdefault(new, part)
    return value


@pytest.mark.thorough
@long
@given(_operated(), WRITERS)
def test_the_law_holds_for_other_peoples_checkpoints_taken_apart(value: Any, writer: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "source.pt"
        write(value, path, writer)
        event(f"reason {hold(path)}")


@pytest.mark.thorough
@long
@given(st.data())
def test_an_archive_without_or_with_other_members_is_refused_or_whole(data: st.DataObject) -> None:
    """A record that is gone is never zeros; one that no pickle names is counted."""
    source = data.draw(st.sampled_from(ARCHIVES))
    try:
        members = read_members(source)
    except (RuntimeError, zipfile.BadZipFile):
        return  # encrypted
    records = [member for member in members if "/data/" in member.name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"source{source.suffix}"
        operation = data.draw(st.sampled_from(["remove", "swap", "add", "none"])) if records else "none"
        if operation == "remove":
            gone = data.draw(st.sampled_from(records))
            members = [member for member in members if member is not gone]
        elif operation == "swap":
            first, second = data.draw(st.sampled_from(records)), data.draw(st.sampled_from(records))
            names = {first.name: second.name, second.name: first.name}
            members = [_renamed(member, names.get(member.name, member.name)) for member in members]
        elif operation == "add":
            name = f"{records[0].name.rpartition('/')[0]}/added"
            members.insert(len(members) - 1, type(records[0])(name, b"\1" * 400))
        write_zip(path, members)
        before = _outcome(source, Path(folder) / "before")
        after = _outcome(path, Path(folder) / "after")
        event(f"{operation}: {after if isinstance(after, str) else 'converted'}")
        if operation == "remove":
            assert isinstance(after, str), "a record is gone, and the conversion went through"
        elif isinstance(before, str):
            assert after == before or (operation != "none" and after == "corrupt_archive")
        elif operation == "add":
            assert isinstance(after, dict), after
            assert after["source_tensor_bytes"] == before["source_tensor_bytes"] + 400
            assert after["left_out"]["unreferenced"] == 400
        elif not isinstance(after, str):
            assert after["source_tensor_bytes"] == before["source_tensor_bytes"]
        else:
            assert after in PLAIN_REASONS


def _renamed(member: Any, name: str) -> Any:
    return type(member)(name, member.data, align=member.align)


def _outcome(path: Path, folder: Path) -> dict[str, Any] | str:
    """The accounting, or the reason of the refusal; `inspect` must say the same."""
    found: dict[str, Any] | str
    try:
        found = ptbin.convert(str(path), str(folder / "weights.bin"))["accounting"]
    except PtbinError as error:
        found = error.reason
    assert isinstance(found, dict) or not folder.exists() or not any(folder.iterdir())
    seen: dict[str, Any] | str
    try:
        inspected = ptbin.inspect(str(path))
        seen = inspected["reason"] or inspected["accounting"]
    except PtbinError as error:
        seen = error.reason
    # inspect reads the index alone: what is wrong with the data it cannot see
    assert found in (seen, "checksum_mismatch")
    return found
