"""The law of accounting, case by case: what random checkpoints showed to be lost, refused or miscounted."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ptbin
from ptbin.errors import AmbiguousStateDictError, PtbinError
from ptbin.reading import left_out, tree
from tests.bits import assert_same_tensors


def layer(seed: int = 1) -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return OrderedDict({"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)})


def saved(value: Any, folder: Path, **options: Any) -> Path:
    torch.save(value, folder / "source.pt", **options)
    return folder / "source.pt"


def converted(path: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    output = path.parent / "out" / "weights.bin"
    manifest = ptbin.convert(str(path), str(output), ptbin.ConvertOptions(**options))
    return manifest, torch.load(output, weights_only=True)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_arrays_are_counted_once_however_long_the_pickle(tmp_path: Path, legacy: bool) -> None:
    """A legacy file's pickle is run again where its first 64 KiB do not reach to its end."""
    beside = {
        "numpy_random": np.random.RandomState(3).get_state(),
        "notes": ["n" * 1000 + str(i) for i in range(99)],
    }
    path = saved({"model": layer(), **beside}, tmp_path, _use_new_zipfile_serialization=not legacy)
    manifest, state = converted(path)
    assert_same_tensors(state, layer())
    assert manifest["accounting"]["left_out"] == {"random_state": 4 * 624}


@pytest.mark.parametrize("options", [{}, {"flatten": True}], ids=["selected", "flattened"])
def test_what_is_left_out_is_listed_by_its_path_from_the_top(tmp_path: Path, options: dict[str, Any]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4))
    net[0].scratch = torch.randn(5)
    path = saved({"net": net, "rng": torch.get_rng_state()}, tmp_path)
    manifest, state = converted(path, **options)
    rows = {row["path"]: row["nbytes"] for row in manifest["left_out"]}
    assert rows == {"net.0.scratch": 20, "rng": 5056}
    assert not any("scratch" in name for name in state)


@pytest.mark.parametrize("path", ["model", "deep.model"])
def test_dropped_entries_are_listed_by_their_path_from_the_top(tmp_path: Path, path: str) -> None:
    holder: dict[str, Any] = {}
    inner = holder
    for step in path.split("."):
        inner = inner.setdefault(step, {})
    inner.update(layer())
    manifest, _ = converted(saved(holder, tmp_path), drop=("bias",), select=path)
    assert [row["path"] for row in manifest["left_out"] if row["nbytes"]] == [f"{path}.fc.bias"]


def test_a_buffer_named_like_an_optimizers_does_not_make_a_model_an_optimizer(tmp_path: Path) -> None:
    state = {**layer(), "exp_avg": torch.randn(3), "momentum_buffer": torch.randn(3)}
    assert_same_tensors(converted(saved({"net": state}, tmp_path))[1], state)


def test_such_a_model_is_never_left_out_beside_another(tmp_path: Path) -> None:
    parts = {"net": {**layer(), "exp_avg": torch.randn(3)}, "other": layer(2)}
    with pytest.raises(AmbiguousStateDictError):
        converted(saved({"model": parts, "main": layer(3)}, tmp_path))


def test_flattening_keeps_a_model_of_single_numbers_with_such_a_buffer(tmp_path: Path) -> None:
    small = {"weight": torch.randn(1), "exp_avg": torch.randn(3, 4), "version": 3}
    path = saved({"checkpoint": {"model": layer(), "state_dict": small}}, tmp_path)
    _, found = converted(path, flatten=True)
    assert {"checkpoint.state_dict.weight", "checkpoint.state_dict.exp_avg"} <= found.keys()


def test_an_unknown_optimizers_entries_are_known_by_their_names(tmp_path: Path) -> None:
    """SOAP keeps lists of preconditioners beside Adam's moments; here without `param_groups`."""
    entry = {
        "step": 3,
        "exp_avg": torch.randn(4, 3),
        "exp_avg_sq": torch.randn(4, 3),
        "GG": [torch.randn(4, 4)],
        "Q": [],
    }
    manifest, state = converted(saved({"model": layer(), "foo": {0: entry, 1: dict(entry)}}, tmp_path))
    assert_same_tensors(state, layer())
    assert list(manifest["accounting"]["left_out"]) == ["optimizer"]


@pytest.mark.parametrize("key", ["encoder", "net"])
def test_indices_beside_a_model_do_not_hide_it(tmp_path: Path, key: str) -> None:
    manifest, state = converted(saved({"indices": torch.arange(20), key: layer()}, tmp_path))
    assert_same_tensors(state, layer())
    assert manifest["accounting"]["left_out"] == {"index_table": 160}


def test_flattening_a_state_dict_keeps_parameters_named_like_counters(tmp_path: Path) -> None:
    state = {**layer(), "step": torch.randn(3), "loss": torch.randn(2, 2), "rng_state": torch.randn(3)}
    assert_same_tensors(converted(saved(state, tmp_path), flatten=True)[1], state)
    pair = (torch.randn(2), torch.randn(3))
    _, found = converted(saved({**state, "pair": pair}, tmp_path), flatten=True)
    assert_same_tensors(found, {**state, "pair.0": pair[0], "pair.1": pair[1]})


def test_flattening_leaves_counters_beside_modules(tmp_path: Path) -> None:
    value = {"enc": layer(), "dec": layer(2), "best_acc": torch.tensor(0.5), "losses": torch.rand(9)}
    manifest, state = converted(saved(value, tmp_path), flatten=True)
    assert set(state) == {f"{part}.{name}" for part in ("enc", "dec") for name in layer()}
    assert manifest["accounting"]["left_out"] == {"metrics": 40}


@pytest.mark.parametrize(
    "change",
    [
        lambda accounting: accounting.update(taken_bytes=accounting["taken_bytes"] - 1),
        lambda accounting: accounting.update(source_tensor_bytes=accounting["source_tensor_bytes"] + 8),
        lambda accounting: accounting["left_out"].pop("metrics"),
        lambda accounting: accounting["left_out"].update(optimizer=1),
    ],
    ids=["taken", "source", "role gone", "role more"],
)
def test_a_doctored_accounting_fails_its_verification(tmp_path: Path, change: Any) -> None:
    converted(saved({"model": layer(), "losses": torch.rand(9)}, tmp_path))
    stored = tmp_path / "out" / "weights.bin.manifest.json"
    assert ptbin.verify(str(stored)) == []
    manifest = json.loads(stored.read_text())
    change(manifest["accounting"])
    stored.write_text(json.dumps(manifest))
    assert ptbin.verify(str(stored)) != []


def test_rows_that_a_doctored_manifest_hides_are_missed(tmp_path: Path) -> None:
    converted(saved({"model": layer(), "losses": torch.rand(9)}, tmp_path))
    stored = tmp_path / "out" / "weights.bin.manifest.json"
    manifest = json.loads(stored.read_text())
    manifest["left_out"] = []
    stored.write_text(json.dumps(manifest))
    assert ptbin.verify(str(stored)) != []


def test_inspect_says_the_same_as_convert(tmp_path: Path) -> None:
    path = saved({"model": layer(), "prototypes": torch.randn(9, 9)}, tmp_path)
    seen = ptbin.inspect(str(path))
    with pytest.raises(PtbinError) as refusal:
        converted(path)
    assert (seen["reason"], seen["detail"]) == (refusal.value.reason, str(refusal.value))
    chosen = ptbin.ConvertOptions(select="model")
    manifest, _ = converted(path, select="model")
    seen = ptbin.inspect(str(path), options=chosen)
    assert seen["accounting"] == manifest["accounting"]
    assert manifest["accounting"]["left_out"] == {"not_selected": 4 * 81}


def test_what_a_view_in_a_plain_pickle_does_not_show_is_counted(tmp_path: Path) -> None:
    """There each tensor's storage is bytes inside the pickle, whole."""
    big = torch.randn(8)
    (tmp_path / "source.pkl").write_bytes(pickle.dumps({"m": {"a": big, "b": big[:2]}}))
    manifest, state = converted(tmp_path / "source.pkl")
    assert_same_tensors(state, {"a": big, "b": big[:2]})
    assert manifest["accounting"] == {
        "source_tensor_bytes": 64,
        "taken_bytes": 40,
        "left_out": {"unviewed": 24},
    }


def test_storages_of_one_byte_are_counted_each(tmp_path: Path) -> None:
    """Python keeps one object for every single byte, whoever asks for it."""
    flags = {"a": torch.tensor([True]), "b": torch.tensor([True]), "c": torch.tensor([1], dtype=torch.uint8)}
    (tmp_path / "source.pkl").write_bytes(pickle.dumps({"model": flags}))
    manifest, state = converted(tmp_path / "source.pkl")
    assert_same_tensors(state, flags)
    assert manifest["accounting"]["source_tensor_bytes"] == 3


@pytest.mark.parametrize("key", ["config_net", "scheduler_net", "settings_encoder"])
def test_a_net_is_one_whatever_it_is_for(tmp_path: Path, key: str) -> None:
    """Parameters without the usual names, in a part that is called after a configuration."""
    parts = {"main": layer(), key: {"alpha": torch.randn(4, 4), "queue": torch.randn(3)}}
    with pytest.raises(AmbiguousStateDictError):
        converted(saved(parts, tmp_path))
    flat = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
    assert_same_tensors(converted(saved(parts, tmp_path), flatten=True)[1], flat)


@pytest.mark.parametrize(
    "key", ["net_config", "model_args", "model_config", "hyper_parameters", "lr_scheduler"]
)
def test_a_configuration_is_one_whatever_it_is_of(tmp_path: Path, key: str) -> None:
    manifest, state = converted(saved({"main": layer(), key: {"anchors": torch.randn(4, 2)}}, tmp_path))
    assert_same_tensors(state, layer())
    assert len(manifest["accounting"]["left_out"]) == 1


@pytest.mark.parametrize(
    "part",
    [
        {"stats": {"observation": {"mean": torch.randn(3), "std": torch.rand(3)}}},
        {"input_stats": {"min": torch.randn(3), "max": torch.randn(3)}},
        {"scaler": {"mean": torch.randn(3), "std": torch.rand(3)}},
        {"scaler": {"mean_": torch.randn(3).numpy(), "scale_": torch.rand(3).numpy()}},
        {"noise_scheduler": {"alphas_cumprod": torch.rand(100)}},
        {"random_features": torch.randn(10, 10)},
        {"seed": {"queries": torch.randn(10, 10)}},
    ],
    ids=["stats", "ranges", "scaler", "scaler_of_arrays", "noise", "random_features", "seed"],
)
def test_what_a_model_needs_is_not_left_out_for_its_name(tmp_path: Path, part: dict[str, Any]) -> None:
    """Normalizers, noise levels, random projections: no optimizer's scaler, metric, or generator's state."""
    with pytest.raises(AmbiguousStateDictError):
        converted(saved({"model": layer(), **part}, tmp_path))


def test_numbers_of_training_are_left_out_by_their_names(tmp_path: Path) -> None:
    value = {
        "model": layer(),
        "scaler": {"scale": torch.tensor(2.0), "growth": torch.tensor(1)},
        "stats": {"mean": torch.tensor(0.1), "std": torch.tensor(1.0)},
        "rng": {"cpu_0": torch.zeros(10, dtype=torch.uint8)},
        "lr_scheduler": {"rates": torch.rand(10)},
    }
    manifest, state = converted(saved(value, tmp_path))
    assert_same_tensors(state, layer())
    assert set(manifest["accounting"]["left_out"]) == {"scaler", "metrics", "random_state", "scheduler"}


def test_flattening_keeps_single_whole_numbers_that_are_no_counters_by_name(tmp_path: Path) -> None:
    value = {"enc": layer(), "queue_ptr": torch.zeros(1, dtype=torch.int64), "global_step": torch.tensor(3)}
    _, state = converted(saved(value, tmp_path), flatten=True)
    assert "queue_ptr" in state
    assert "global_step" not in state


def test_inspect_names_an_unsafe_pickle_before_anything_that_it_lacks(tmp_path: Path) -> None:
    """Found by taking other people's files apart: convert said `unsafe_pickle`, inspect `no_state_dict`."""
    (tmp_path / "hostile.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(PtbinError) as refusal:
        ptbin.convert(str(tmp_path / "hostile.pkl"), str(tmp_path / "w.bin"))
    assert ptbin.inspect(str(tmp_path / "hostile.pkl"))["reason"] == refusal.value.reason == "unsafe_pickle"


@pytest.mark.parametrize("key", ["best_state", "results", "trainer_state", "loops", "optimizer", "config"])
def test_weights_that_are_no_state_dict_are_not_called_by_their_place(tmp_path: Path, key: str) -> None:
    """The mapping is turned down for what else is in it; the name of its place does not explain it away."""
    inner = {**layer(2), "alpha": torch.randn(4, 4), "pair": [torch.randn(2), 3]}
    with pytest.raises(AmbiguousStateDictError):
        converted(saved({"model": layer(), key: inner}, tmp_path))
    with pytest.raises(AmbiguousStateDictError):
        converted(saved({"model": layer(), key: {"deeper": inner, "beta": torch.randn(3, 3)}}, tmp_path))


@pytest.mark.thorough
def test_a_long_history_is_one_whatever_its_length(tmp_path: Path) -> None:
    history = [{"loss": torch.tensor(float(step)), "epoch": step} for step in range(11_000)]
    manifest, state = converted(saved({"model": layer(), "history": history}, tmp_path))
    assert_same_tensors(state, layer())
    assert manifest["accounting"]["left_out"] == {"metrics": 44_000}


def test_a_single_whole_number_may_be_a_weight(tmp_path: Path) -> None:
    value = {"model": layer(), "student": {"weight": torch.ones(1, dtype=torch.int8)}}
    with pytest.raises(AmbiguousStateDictError):
        converted(saved(value, tmp_path))


def test_whole_numbers_and_flags_under_a_weights_name_are_weights(tmp_path: Path) -> None:
    value = {"model": layer(), "encoder": {"running_mean": torch.ones(2, 3, dtype=torch.bool)}}
    with pytest.raises(AmbiguousStateDictError):
        converted(saved(value, tmp_path))


def test_whole_numbers_that_a_pair_calls_a_weight_are_no_table(tmp_path: Path) -> None:
    """Beside a model, in a list of pairs that is no state dict because one of them holds no tensor."""
    pairs = [("weight", torch.randint(0, 9, (3, 4))), ("version", 3)]
    torch.save({"model": {"weight": torch.randn(3, 3)}, "state_dict": pairs}, tmp_path / "x.pt")
    with pytest.raises(AmbiguousStateDictError, match=r"state_dict\.0\.1"):
        ptbin.convert(tmp_path / "x.pt", tmp_path / "x.bin")


def test_flattening_takes_lists_of_pairs(tmp_path: Path) -> None:
    value = {"net": layer(), "best_state": list(layer(2).items())}
    _, state = converted(saved(value, tmp_path), flatten=True)
    assert len(state) == 4


@pytest.mark.thorough
def test_parts_that_many_share_are_not_looked_through_for_each(tmp_path: Path) -> None:
    """Names of metrics call for a look at what is below; 40 kilobytes of pickle could ask for 10^8 looks."""
    shared: list[Any] = [*({"a": {}} for _ in range(5000)), {"alpha": torch.randn(2)}]
    value = {"model": layer(), **{f"loss_{number}": {"x": shared} for number in range(1000)}}
    path = saved(value, tmp_path)
    looks = 0
    real = tree.named_children

    def counted(node: Any) -> Any:
        nonlocal looks
        looks += 1
        return real(node)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(left_out, "named_children", counted)
        patch.setattr(left_out, "MAX_LOOKS", 20_000)
        _, state = converted(path)
    assert_same_tensors(state, layer())
    assert looks < 100_000


@pytest.mark.parametrize("name", ["best_state", "results"])
def test_what_is_saved_with_the_model_does_not_take_the_role_of_their_folder(
    tmp_path: Path, name: str
) -> None:
    extra = {"model": layer(), "_extra_state": {"amax": torch.randn(3)}}
    with pytest.raises(AmbiguousStateDictError):
        converted(saved({name: extra}, tmp_path))
    manifest, _ = converted(saved({name: extra | {"_extra_state": {"losses": torch.randn(3)}}}, tmp_path))
    (row,) = [row for row in manifest["left_out"] if row["nbytes"]]
    assert (row["path"], row["role"]) == (f"{name}._extra_state.losses", "metrics")
