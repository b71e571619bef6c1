"""Every kind of checkpoint, converted or refused; torch is the judge of what comes out."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import ptbin
from ptbin.errors import PtbinError
from tests.bits import assert_same_tensors, same_bits
from tests.checkpoints import Checkpoint, Factory, MadeOnce, factories
from tests.strategies import state_dicts

SCHEMA = jsonschema.Draft202012Validator(
    json.loads((Path(ptbin.__file__).parent / "manifest.schema.json").read_text())
)

Make = Callable[[str], Checkpoint]


def convert(source: Path, dest: Path, **options: Any) -> dict[str, Any]:
    return ptbin.convert(str(source), str(dest), ptbin.ConvertOptions(**options))


def load(path: Path) -> dict[str, Any]:
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert isinstance(loaded, dict)
    return loaded


def test_the_schema_of_manifests_is_one() -> None:
    SCHEMA.check_schema(SCHEMA.schema)


@pytest.mark.parametrize("factory", factories(refused=False), ids=str)
def test_output_holds_the_very_tensors_of_the_source(
    factory: Factory, made_once: MadeOnce, tmp_path: Path
) -> None:
    made = made_once(factory)
    output = tmp_path / "out" / "weights.bin"
    manifest = convert(made.path, output, verify="load", **made.options)
    assert made.expected is not None
    # a meta tensor has no data to take along: it is listed, not written
    expected = {name: t for name, t in made.expected.items() if t.device.type != "meta"}
    left_out = {item["path"] for item in manifest["left_out"]}
    assert left_out >= made.expected.keys() - expected.keys()
    assert_same_tensors(load(output), expected)
    assert_same_tensors(torch.load(output, weights_only=True), expected)
    assert zipfile.ZipFile(output).testzip() is None
    assert made.canary is None or not made.canary.exists()
    stored = json.loads((tmp_path / "out" / "weights.bin.manifest.json").read_text())
    SCHEMA.validate(stored)
    assert stored == json.loads(json.dumps(manifest))
    assert ptbin.verify(str(output) + ".manifest.json", level="load") == []


@pytest.mark.parametrize("factory", factories(refused=True), ids=str)
def test_refusal_has_its_stable_reason_and_leaves_nothing(
    factory: Factory, made_once: MadeOnce, tmp_path: Path
) -> None:
    made = made_once(factory)
    output = tmp_path / "out" / "weights.bin"
    with pytest.raises(PtbinError) as caught:
        convert(made.path, output, **made.options)
    assert caught.value.reason == made.reason
    assert len(str(caught.value).splitlines()) == 1
    assert not output.parent.exists()
    assert made.canary is None or not made.canary.exists()


@pytest.mark.parametrize(
    "factory", [f for f in factories(refused=True) if f.reason == "unsafe_pickle"], ids=str
)
def test_extracting_from_an_unsafe_pickle_runs_nothing(
    factory: Factory, made_once: MadeOnce, tmp_path: Path
) -> None:
    made = made_once(factory)
    modules = set(sys.modules)
    reason = None
    try:
        convert(made.path, tmp_path / "w.bin", on_unsafe="extract")
    except PtbinError as error:
        reason = error.reason
    assert reason != "unsafe_pickle"
    assert made.canary is None or not made.canary.exists()
    assert not {name for name in set(sys.modules) - modules if not name.startswith(("ptbin", "numpy"))}


@pytest.mark.parametrize("factory", factories(), ids=str)
def test_inspect_runs_nothing_and_reads_only_the_index(factory: Factory, made_once: MadeOnce) -> None:
    made = made_once(factory)
    try:
        report = ptbin.inspect(str(made.path))
    except PtbinError as error:
        report, reason = {}, error.reason
    assert made.canary is None or not made.canary.exists()
    if not report:
        assert made.reason in {reason, "unsafe_pickle"}
        return
    assert report["verdict"] == "unsafe" or made.reason != "unsafe_pickle"
    assert report["uri"] == str(made.path)
    json.dumps(report)


@pytest.mark.thorough
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=state_dicts())
def test_any_state_dict_survives(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for legacy in (False, True):
        source = tmp_path / "s.pt"
        torch.save(state, source, _use_new_zipfile_serialization=not legacy)
        convert(source, tmp_path / "o.bin", verify="load", force=True)
        assert_same_tensors(load(tmp_path / "o.bin"), state)
        convert(tmp_path / "o.bin", tmp_path / "p.bin", force=True)
        assert (tmp_path / "o.bin").stat().st_size >= (tmp_path / "p.bin").stat().st_size


def test_tied_tensors_stay_tied_and_are_stored_once(make_checkpoint: Make, tmp_path: Path) -> None:
    made = make_checkpoint("tied")
    manifest = convert(made.path, tmp_path / "o.bin")
    loaded = load(tmp_path / "o.bin")
    tied = [row for row in manifest["tensors"] if "shares_with" in row]
    assert tied
    for row in tied:
        partner = loaded[row["shares_with"]]
        assert loaded[row["name"]].untyped_storage().data_ptr() == partner.untyped_storage().data_ptr()


def test_only_the_viewed_bytes_of_a_large_storage_are_written(tmp_path: Path) -> None:
    big = torch.arange(1_000_000, dtype=torch.float32)
    torch.save({"w": big[500:1500], "row": big.view(1000, 1000)[7, ::2]}, tmp_path / "s.pt")
    convert(tmp_path / "s.pt", tmp_path / "o.bin")
    assert (tmp_path / "o.bin").stat().st_size < 10_000
    assert_same_tensors(load(tmp_path / "o.bin"), {"w": big[500:1500], "row": big.view(1000, 1000)[7, ::2]})


def test_metadata_of_the_state_dict_is_kept(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    torch.save(state, tmp_path / "s.pt")
    convert(tmp_path / "s.pt", tmp_path / "o.bin")
    assert load(tmp_path / "o.bin")._metadata == state._metadata  # type: ignore[attr-defined]


def test_optimizer_stays_behind_and_is_accounted_for(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    torch.save(
        {"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s.pt"
    )
    manifest = convert(tmp_path / "s.pt", tmp_path / "o.bin")
    left_out = {item["path"]: item["nbytes"] for item in manifest["left_out"]}
    moments = 2 * sum(p.numel() * 4 for p in model.parameters())
    assert manifest["selected"] == "model"
    assert left_out["optimizer"] == moments + 2 * 4  # and a step counter for each of the two parameters
    assert left_out["epoch"] == 0
    assert "exp_avg" not in (tmp_path / "o.bin").read_bytes().decode("latin1")


def test_output_is_a_function_of_bytes_and_options_only(make_checkpoint: Make, tmp_path: Path) -> None:
    made = make_checkpoint("tied")
    first = tmp_path / "a" / "one.bin"
    second = tmp_path / "b" / "another-name.bin"
    moved = tmp_path / "moved.ckpt"
    convert(made.path, first)
    moved.write_bytes(made.path.read_bytes())
    convert(moved, second, verify="none")
    assert first.read_bytes() == second.read_bytes()


def test_a_converted_output_converts_to_itself(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "s.pt")
    convert(tmp_path / "s.pt", tmp_path / "a.bin")
    convert(tmp_path / "a.bin", tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_wrapper_prefixes_come_off_in_any_nesting(tmp_path: Path) -> None:
    for prefix in ("module._orig_mod.", "_orig_mod.module.", "module.module.", "_orig_mod."):
        torch.save(
            {f"{prefix}fc.weight": torch.ones(2), f"{prefix}fc.bias": torch.zeros(2)}, tmp_path / "s.pt"
        )
        manifest = convert(tmp_path / "s.pt", tmp_path / "o.bin", strip_prefix="auto", force=True)
        assert list(load(tmp_path / "o.bin")) == ["fc.weight", "fc.bias"]
        assert [row["source_name"] for row in manifest["tensors"]] == [
            f"{prefix}fc.weight",
            f"{prefix}fc.bias",
        ]


def test_rules_that_join_two_names_are_refused(tmp_path: Path) -> None:
    torch.save({"a.w": torch.ones(2), "b.w": torch.zeros(2)}, tmp_path / "s.pt")
    with pytest.raises(PtbinError) as caught:
        convert(tmp_path / "s.pt", tmp_path / "o.bin", rename=((r"^[ab]\.", ""),))
    assert caught.value.reason == "output_collision"


def test_drop_and_rename_shape_the_names(tmp_path: Path) -> None:
    torch.save({"encoder.w": torch.ones(2), "head.w": torch.zeros(2)}, tmp_path / "s.pt")
    manifest = convert(
        tmp_path / "s.pt", tmp_path / "o.bin", drop=("^head",), rename=(("^encoder", "backbone"),)
    )
    assert_same_tensors(load(tmp_path / "o.bin"), {"backbone.w": torch.ones(2)})
    assert {"path": "head.w", "nbytes": 8, "role": "dropped", "reason": "dropped by '^head'"} in manifest[
        "left_out"
    ]


def test_ambiguity_names_the_candidates_and_select_resolves_it(make_checkpoint: Make, tmp_path: Path) -> None:
    weights = {"w": torch.ones(3)}
    average = {"w": torch.full((3,), 0.5)}
    torch.save({"state_dict": weights, "ema": average}, tmp_path / "s.pt")
    with pytest.raises(ptbin.errors.AmbiguousStateDictError) as caught:
        convert(tmp_path / "s.pt", tmp_path / "o.bin")
    assert caught.value.candidates == ("state_dict", "ema")
    convert(tmp_path / "s.pt", tmp_path / "o.bin", select="ema")
    assert same_bits(load(tmp_path / "o.bin")["w"], average["w"])


def test_a_source_that_changes_meanwhile_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "s.pt"
    torch.save({"w": torch.ones(1000)}, source)
    from ptbin import output_files
    from ptbin.splice import splice as original

    def overwriting(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        torch.save({"w": torch.zeros(1000)}, source)
        return result

    monkeypatch.setattr(output_files, "splice", overwriting)
    with pytest.raises(ptbin.errors.SourceChangedError):
        convert(source, tmp_path / "o.bin")
    assert not (tmp_path / "o.bin").exists()


def test_draft_travels_as_one_string(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(10)}, tmp_path / "s.pt")
    draft = ptbin.stage(str(tmp_path / "s.pt"), str(tmp_path / "o.bin"), ptbin.ConvertOptions(verify="load"))
    assert not (tmp_path / "o.bin.manifest.json").exists()
    again = ptbin.Draft.from_json(draft.to_json())
    assert again == draft
    manifest = ptbin.commit(again)
    assert manifest["verification"]["status"] == "verified"
    assert (tmp_path / "o.bin.manifest.json").exists()
