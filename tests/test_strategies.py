"""The random input is of the kinds that it promises."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import strategies
from tests.bits import assert_same_tensors
from tests.checkpoints.craft import read_members, write_zip
from tests.checkpoints.dtypes import random_state_dict


@settings(max_examples=30, deadline=None)
@given(strategies.state_dicts())
def test_torch_saves_and_reads_every_state_dict(state: dict[str, torch.Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert_same_tensors(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), state)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_other_framing_is_the_same_archive(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "plain.pt"
    torch.save(random_state_dict(), path)
    members = read_members(path)
    framing = data.draw(strategies.archives(members))
    with zipfile.ZipFile(write_zip(tmp_path / "framed.pt", **framing)) as archive:
        assert {info.filename: archive.read(info) for info in archive.infolist()} == {
            m.name: m.data for m in members
        }


@settings(max_examples=50, deadline=None)
@given(strategies.mutations, st.binary(min_size=1, max_size=50))
def test_mutations_are_total(mutate: object, raw: bytes) -> None:
    assert callable(mutate)
    assert isinstance(mutate(raw), bytes)
