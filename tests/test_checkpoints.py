"""The factories keep their word: what they expect is what torch reads, and every canary is a live one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin.errors
from tests.bits import assert_same_tensors, same_bits
from tests.checkpoints import FACTORIES, Factory, MadeOnce, factories
from tests.checkpoints.hostile import EXTENSION_CODE

_REASONS = {
    cls.reason
    for cls in vars(ptbin.errors).values()
    if isinstance(cls, type) and issubclass(cls, ptbin.errors.PtbinError)
}


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every state dict that a loaded checkpoint could mean, outermost first."""
    if isinstance(value, torch.nn.Module):
        yield value.state_dict()
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            if inner is not value:
                yield from _mappings(inner)


def _as_torch(state: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    native = {
        name: torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        if isinstance(value, np.ndarray)
        else value
        for name, value in state.items()
        if isinstance(name, str)
    }
    return {name.removeprefix("module._orig_mod."): value for name, value in native.items()}


@pytest.mark.filterwarnings("ignore")  # torch warns about reading typed and quantized storages
@pytest.mark.parametrize("factory", [f for f in factories(refused=False) if f.torch_reads], ids=str)
def test_torch_reads_what_the_factory_expects(factory: Factory, made_once: MadeOnce) -> None:
    made = made_once(factory)
    assert made.expected is not None
    loaded = torch.load(
        made.path,
        map_location=None if "meta" in factory.name else "cpu",
        # "pickle" marks files that this process has just written itself
        weights_only=factory.torch_reads == "weights_only",
    )
    if "select" in made.options:
        loaded = loaded[made.options["select"]]
    for state in map(_as_torch, _mappings(loaded)):
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        if sorted(tensors) == sorted(made.expected):
            assert_same_tensors(state, made.expected)
            assert {name: state[name] for name in made.values} == dict(made.values)
            return
    pytest.fail(f"nothing in {factory.name} has the names {sorted(made.expected)}")


@pytest.mark.parametrize("factory", factories(slow=None), ids=str)
def test_reasons_are_codes_that_ptbin_has(factory: Factory) -> None:
    assert factory.reason is None or factory.reason in _REASONS


_UNPICKLE_ALL = """
import copyreg, io, json, pickle, sys, zipfile
import os, torch
copyreg.add_extension("os", "system", int(sys.argv[1]))

class Careless(pickle.Unpickler):
    def persistent_load(self, pid):
        untyped = torch.UntypedStorage(24)
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)

def pickles(path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield io.BytesIO(archive.read("archive/data.pkl"))
    else:
        file = open(path, "rb")
        while file.peek(1):
            yield file

def careful_of_nothing(stream):
    # from memory as well: there the C unpickler does not look at where frames end
    try:
        pickle.loads(stream.getvalue())
    except Exception:
        pass
    stream.seek(0)
    Careless(stream).load()

for path in json.load(sys.stdin):
    try:
        for stream in pickles(path):
            careful_of_nothing(stream) if isinstance(stream, io.BytesIO) else Careless(stream).load()
    except Exception:
        pass  # many a payload ends in an error, after it has run
"""


@pytest.mark.starts_processes
def test_every_canary_fires_when_unpickled(tmp_path: Path) -> None:
    made = [
        factory.make(tmp_path) for factory in factories(room="hostile") if factory.name.startswith("canary_")
    ]
    assert len(made) > 60
    assert not any(one.canary.exists() for one in made if one.canary)
    subprocess.run(
        [sys.executable, "-c", _UNPICKLE_ALL, str(EXTENSION_CODE)],
        input=json.dumps([str(one.path) for one in made]),
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert [one.path.name for one in made if one.canary is None or not one.canary.exists()] == []


def test_crafted_archives_are_what_zipfile_reads(tmp_path: Path) -> None:
    """The zip writer of the factories against the standard library's reader."""
    for name in ("zip64_though_small", "deflated_members", "unaligned_storages", "members_in_another_order"):
        with zipfile.ZipFile(FACTORIES[name].make(tmp_path).path) as archive:
            assert archive.testzip() is None


def test_same_bits_tells_what_torch_equal_does_not() -> None:
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    other_nan = torch.tensor([0x7FC00002], dtype=torch.int32).view(torch.float32)
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, other_nan)
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not same_bits(torch.zeros(2, 1), torch.zeros(2))
    assert same_bits(torch.arange(6.0).view(2, 3).t(), torch.arange(6.0).view(2, 3).t().contiguous())


@pytest.mark.slow
def test_torch_reads_the_archive_larger_than_four_gib(tmp_path: Path) -> None:
    made = FACTORIES["larger_than_four_gib"].make(tmp_path)
    assert made.expected is not None
    loaded = torch.load(made.path, weights_only=True, mmap=True)
    assert_same_tensors({"small": loaded["small"]}, {"small": made.expected["small"]})
    assert loaded["big"].shape == made.expected["big"].shape
    assert not loaded["big"].any()
    used = made.path.stat().st_blocks * 512  # stat(2): blocks of 512 bytes
    assert used < 1 << 20, "the hole was filled"
