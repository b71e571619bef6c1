"""What an adversarial review found: nothing foreign reaches an output, and no reader sees other weights."""

from __future__ import annotations

import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from ptbin.errors import PtbinError, UnsupportedTensorError
from tests.bits import assert_same_tensors
from tests.checkpoints.craft import TorchPickle, integer, ints, named, text, torch_members, write_zip

ONES = struct.pack("<4f", 1, 2, 3, 4)
NINES = struct.pack("<4f", 9, 9, 9, 9)
T0 = TorchPickle.tensor("0", elements=4, shape=(4,), stride=(1,))
T1 = TorchPickle.tensor("1", elements=4, shape=(4,), stride=(1,))


def archive(folder: Path, entries: dict[str, bytes], protocol: int = 4) -> Path:
    data = TorchPickle.state_dict(entries, protocol=protocol)
    return write_zip(folder / "s.pt", torch_members(data, [ONES, NINES]))


def convert(source: Path, **options: Any) -> dict[str, Any]:
    output = source.with_suffix(".bin")
    ptbin.convert(str(source), str(output), ptbin.ConvertOptions(force=True, **options))
    return dict(torch.load(output, weights_only=True))


def refused(source: Path, **options: Any) -> str:
    with pytest.raises(PtbinError) as caught:
        convert(source, **options)
    assert not source.with_suffix(".bin").exists()
    return caught.value.reason


INJECTION = "float32\n0cbuiltins\nprint\n(S'owned'\ntR0ctorch\nfloat32"


@pytest.mark.parametrize("on_unsafe", ["reject", "extract"])
def test_a_line_break_in_a_name_cannot_smuggle_opcodes_into_the_output(
    on_unsafe: str, tmp_path: Path
) -> None:
    raw = INJECTION.encode()
    name = b"\x8c\x05torch" + b"\x8c" + bytes([len(raw)]) + raw + b"\x93"
    source = archive(tmp_path, {"w": T0, "x": name})
    if on_unsafe == "reject":
        assert refused(source) == "unsafe_pickle"
        return
    convert(source, on_unsafe="extract", verify="none")
    with zipfile.ZipFile(source.with_suffix(".bin")) as output:
        assert b"builtins" not in output.read("archive/data.pkl")


def test_a_device_of_anything_but_its_name_stays_behind(tmp_path: Path) -> None:
    device = named("torch", "device") + named("mymodel", "evil") + b"\x85R"
    assert list(convert(archive(tmp_path, {"w": T0, "x": device}))) == ["w"]


HOOKS = named("collections", "OrderedDict") + b")R"
DATA = b"}" + text("data") + T1 + b"s"


def rebuilt(function: str, *arguments: bytes) -> bytes:
    return named("torch._utils", function) + b"(" + b"".join(arguments) + b"tR"


OTHER_PLACE = b"(" + TorchPickle.storage("1", 4) + integer(0) + ints((4,)) + ints((1,)) + b"t"
EXCHANGED = {
    "BUILD on a tensor": T0 + OTHER_PLACE + b"b",
    "parameter with state": rebuilt("_rebuild_parameter_with_state", T0, b"\x89", HOOKS, DATA),
    "cast on loading": rebuilt(
        "_rebuild_device_tensor_from_cpu_tensor", T0, named("torch", "float16"), text("cpu"), b"\x89"
    ),
}


@pytest.mark.parametrize("how", EXCHANGED)
def test_content_that_torch_would_exchange_is_refused(how: str, tmp_path: Path) -> None:
    assert refused(archive(tmp_path, {"w": EXCHANGED[how]})) in {
        "unsafe_pickle",
        "corrupt_archive",
        "unsupported_tensor",
    }


def test_one_storage_has_one_element_type(tmp_path: Path) -> None:
    other = TorchPickle.tensor("0", elements=4, shape=(4,), stride=(1,), kind="IntStorage")
    assert refused(archive(tmp_path, {"w": T0, "x": other})) == "corrupt_archive"


def test_views_of_several_types_on_one_storage(tmp_path: Path) -> None:
    buffer = torch.arange(64, dtype=torch.uint8)
    state = {"h": buffer.view(torch.uint16)[3:20], "i": buffer.view(torch.uint32)[2:9], "r": buffer[0:2]}
    torch.save(state, tmp_path / "s.pt")
    assert_same_tensors(convert(tmp_path / "s.pt", verify="load"), state)
    odd = {"raw": buffer[1:20], "h": buffer.view(torch.uint16)[4:20]}
    torch.save(odd, tmp_path / "s.pt")
    assert_same_tensors(convert(tmp_path / "s.pt", verify="load"), odd)


def test_overlapping_windows_stay_windows(tmp_path: Path) -> None:
    state = {"w": torch.arange(1000.0)[7:].unfold(0, 3, 1), "rows": torch.arange(30.0)[1:].unfold(0, 5, 2)}
    torch.save(state, tmp_path / "s.pt")
    assert_same_tensors(convert(tmp_path / "s.pt", verify="load"), state)
    assert (tmp_path / "s.bin").stat().st_size < 7000


def test_a_set_of_tensors_is_refused_and_can_be_dropped(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "s": {torch.zeros(2)}}, tmp_path / "s.pt")
    with pytest.raises(UnsupportedTensorError, match="'s' is a SetNode that holds tensors"):
        ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "s.bin"), ptbin.ConvertOptions(select="."))
    manifest = ptbin.convert(
        str(tmp_path / "s.pt"), str(tmp_path / "s.bin"), ptbin.ConvertOptions(drop=("^s$",))
    )
    dropped = {"path": "s", "nbytes": 8, "role": "dropped", "reason": "dropped by '^s$'"}
    assert manifest["left_out"] == [dropped]
    assert list(torch.load(tmp_path / "s.bin", weights_only=True)) == ["w"]


def test_an_expanded_view_of_millions_costs_little(tmp_path: Path) -> None:
    wide = TorchPickle.tensor("0", elements=4, shape=(1 << 22, 1, 1, 4), stride=(0, 1, 1, 1))
    started = time.process_time()
    found = convert(archive(tmp_path, {"w": wide}))
    assert found["w"].shape == (1 << 22, 1, 1, 4)
    assert time.process_time() - started < 30


ENCODE = named("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R0"
LIST = named("builtins", "list") + b"h\x00\x85R0"
COPIES = {
    "encode": text("x" * 100_000) + b"\x940" + ENCODE * 4000,
    "list": b"](" + b"N" * 50_000 + b"e\x940" + LIST * 4000,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_one_large_argument_are_charged(how: str, tmp_path: Path) -> None:
    data = TorchPickle.state_dict({"w": T0}, before=COPIES[how], protocol=4)
    source = write_zip(tmp_path / "s.pt", torch_members(data, [ONES]))
    assert refused(source) == "limit_exceeded"


@pytest.mark.thorough
def test_a_module_reached_over_endless_paths_is_refused(tmp_path: Path) -> None:
    def module(children: bytes) -> bytes:
        return (
            named("m", "M")
            + b")\x81}("
            + text("_parameters")
            + b"}"
            + text("w")
            + T0
            + b"s"
            + text("_modules")
            + children
            + b"ub"
        )

    body = module(b"}")
    for index in range(60):
        memo = b"r" + struct.pack("<L", 1000 + index)
        get = b"j" + struct.pack("<L", 1000 + index)
        body = body + memo + b"0" + module(b"}(" + text("a") + get + text("b") + get + b"u")
    source = write_zip(tmp_path / "s.pt", torch_members(b"\x80\x02" + body + b".", [ONES]))
    assert refused(source) in {"limit_exceeded", "corrupt_archive"}


def test_layers_that_hold_functions_of_torch_are_not_hostile(tmp_path: Path) -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, activation="gelu")
    torch.save(layer, tmp_path / "s.pt")
    assert ptbin.inspect(str(tmp_path / "s.pt"))["verdict"] != "unsafe"
    assert_same_tensors(convert(tmp_path / "s.pt"), layer.state_dict())


def test_a_traced_graph_module_is_a_module(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    torch.save(torch.fx.symbolic_trace(model), tmp_path / "s.pt")
    found = convert(tmp_path / "s.pt", on_unsafe="extract")
    assert_same_tensors(found, model.state_dict())


TAMPERED: dict[str, Any] = {
    "shape no list": lambda m: m["tensors"][0].update(shape=5),
    "stride no list": lambda m: m["tensors"][0].update(stride=3),
    "type no name": lambda m: m["tensors"][0].update(dtype=[]),
    "stride of another length": lambda m: m["tensors"][0].update(stride=[1, 1]),
    "reaches beyond the file": lambda m: m["tensors"][0].update(offset=1 << 40),
    "no name": lambda m: m["tensors"][0].pop("name"),
    "another file": lambda m: m["tensors"][0].update(file="other.bin"),
    "no digest": lambda m: m["outputs"][0].update(sha256=None, crc32=None),
    "no output": lambda m: m.update(outputs=[]),
    "a path with NUL": lambda m: m["outputs"][0].update(path="a\0b"),
    "a path of 5000": lambda m: m["outputs"][0].update(path="a" * 5000),
    "a path that climbs": lambda m: m["outputs"][0].update(path="../o.bin"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_manifest_is_an_issue_and_no_crash(how: str, tmp_path: Path) -> None:
    import json

    torch.save({"w": torch.ones(4)}, tmp_path / "s.pt")
    manifest = ptbin.convert(str(tmp_path / "s.pt"), str(tmp_path / "s.bin"))
    TAMPERED[how](manifest)
    path = tmp_path / "s.bin.manifest.json"
    path.write_text(json.dumps(manifest))
    assert [issue.reason for issue in ptbin.verify(str(path))] == ["bad_manifest"]
