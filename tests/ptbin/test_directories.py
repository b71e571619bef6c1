"""A whole store without Prefect: the same outputs, manifests, record and history as by the flow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import ptbin
from ptbin import catalog
from ptbin.catalog.plan import Plan
from ptbin.catalog.request import RunRequest
from ptbin.errors import UsageError
from ptbin.history.records import iter_runs
from ptbin.runs.result import RunResult


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two good checkpoints, a damaged one, an optimizer, two that collide, and something else."""
    source = tmp_path / "in"
    (source / "run").mkdir(parents=True)
    for number in range(2):
        torch.save({"state_dict": {"w": torch.full((64,), float(number))}}, source / "run" / f"{number}.pt")
    good = (source / "run" / "0.pt").read_bytes()
    (source / "cut.pt").write_bytes(good[:-40])
    (source / "twin.pt").write_bytes(good)
    (source / "twin.ckpt").write_bytes(good)
    (source / "notes").write_text("not a checkpoint")
    torch.save({"state": {}, "param_groups": []}, source / "optimizer.pt")
    return source


COUNTS = {"converted": 2, "up_to_date": 0, "rejected": 3, "failed": 0, "left_alone": 1, "new": 3}


def counts(result: RunResult) -> dict[str, int]:
    return {name: result.counts[name] for name in COUNTS}


def test_what_is_converted_and_what_is_told(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = ptbin.convert_directory(store, out)
    assert (counts(first), first.succeeded, first.kind) == (COUNTS, False, "convert")
    assert {problem["reason"] for problem in first.problems} == {"corrupt_archive", "output_collision"}
    assert Path(first.record).is_file()
    assert "cut.pt" in Path(first.report).read_text()
    assert sorted(Path(uri).name for uri in first.manifests) == ["0.bin.manifest.json", "1.bin.manifest.json"]
    assert torch.load(out / "run" / "1.bin", weights_only=True)["w"][0] == 1
    for name in ("cut.pt", "twin.pt"):
        (store / name).unlink()
    second = ptbin.convert_directory(store, out)
    assert second.succeeded
    assert (second.counts["converted"], second.counts["up_to_date"], second.counts["resolved"]) == (1, 2, 3)
    assert [run.run_id for run in iter_runs(out)] == [second.run_id, first.run_id]
    assert ptbin.verify_directory(out).succeeded
    assert not (out / "_ptbin" / "leases").exists() or not list((out / "_ptbin" / "leases").iterdir())


def test_the_files_that_it_is_asked_for(store: Path, tmp_path: Path) -> None:
    options = ptbin.ConvertOptions(format="safetensors")
    result = ptbin.convert_directory(store, tmp_path / "out", options, files=["run/1.pt", "gone.pt"])
    assert [Path(uri).name for uri in result.manifests] == ["1.safetensors.manifest.json"]
    assert [Path(problem["source"]).name for problem in result.problems] == ["gone.pt"]
    result = ptbin.convert_directory(
        store, tmp_path / "globs", include=["run/*"], exclude=["*/0.pt"], workers=1
    )
    assert (result.counts["converted"], result.succeeded) == (1, True)


def test_what_verification_finds(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ptbin.convert_directory(store, out)
    data = bytearray((out / "run" / "0.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "run" / "0.bin").write_bytes(data)
    (out / "orphan.bin").write_bytes(b"x")
    found = ptbin.verify_directory(out)
    assert (found.succeeded, found.counts["proven"], found.counts["failed"]) == (False, 1, 1)
    assert {Path(problem["source"]).name for problem in found.problems} >= {"0.bin", "orphan.bin"}
    assert ptbin.convert_directory(store, out).counts["converted"] == 1, "what verify noted is made anew"


def test_an_interrupted_run_leaves_its_record(store: Path, tmp_path: Path) -> None:
    def interrupted(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptbin.convert_directory(store, tmp_path / "out", progress=interrupted)
    (run,) = iter_runs(tmp_path / "out")
    assert run.facts["interrupted"] is True
    assert ptbin.convert_directory(store, tmp_path / "out").counts["converted"] == 2


def test_calls_that_cannot_work(store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.json").write_text("{}")
    for call in (
        lambda: ptbin.convert_directory(store, store / "below"),
        lambda: ptbin.convert_directory(tmp_path / "empty", tmp_path / "out"),
        lambda: ptbin.verify_directory(tmp_path / "empty"),
        lambda: ptbin.convert_directory(store, tmp_path / "out", run_id="../x"),
    ):
        with pytest.raises(UsageError):
            call()
    assert not list((tmp_path / "out").rglob("*.bin"))


ALONE = """
import sys, ptbin
result = ptbin.convert_directory(sys.argv[1], sys.argv[2])
assert result.counts["converted"] == 2
assert ptbin.verify_directory(sys.argv[2]).succeeded
print(sorted(name for name in ("prefect", "torch", "flows", "tasks", "click") if name in sys.modules))
"""


@pytest.mark.parametrize("call", ["source", "dest", "verify"])
def test_a_password_in_a_uri_is_refused(call: str, store: Path) -> None:
    secret = "sftp://me:hidden@host/runs"
    calls = {
        "source": partial(ptbin.convert_directory, secret, store),
        "dest": partial(ptbin.convert_directory, store, secret),
        "verify": partial(ptbin.verify_directory, secret),
    }
    with pytest.raises(UsageError, match="storage options") as refused:
        calls[call]()
    assert "hidden" not in str(refused.value)


def test_one_text_is_not_taken_for_a_sequence_of_letters(store: Path, tmp_path: Path) -> None:
    for name in ("include", "exclude", "files"):
        with pytest.raises(UsageError, match=f"{name}: .* a sequence is expected"):
            ptbin.convert_directory(store, tmp_path / "out", **cast("Any", {name: "*.pt"}))
    for name in ("drop", "rename"):
        with pytest.raises(UsageError, match=f"{name}: .* a sequence is expected"):
            ptbin.ConvertOptions(**cast("Any", {name: "bias"}))
    with pytest.raises(UsageError, match="'5GB' is not a positive number of bytes"):
        ptbin.ConvertOptions(max_shard_size="5GB")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_dict_is_not_taken_for_options(store: Path, tmp_path: Path) -> None:
    options = cast("Any", {"dtype": "bfloat16"})
    source, out = store / "run" / "0.pt", tmp_path / "out.bin"
    calls: list[Callable[[], object]] = [
        lambda: ptbin.convert(source, out, options),
        lambda: ptbin.convert_directory(store, tmp_path / "out", options),
        lambda: ptbin.inspect(source, options=options),
        lambda: ptbin.restore(source, out, options),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"a dict, and \w+Options is expected"):
            call()
    assert not out.exists()


@pytest.mark.starts_processes
def test_neither_prefect_nor_torch_is_imported(store: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, store, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- places as paths ---------------------------------------------------------------------------------

Calls = dict[str, Callable[[Path, Path], Any]]


def _draft(source: Path, out: Path) -> ptbin.Draft:
    return ptbin.stage(source, out / "staged.bin")


CALLS: Calls = {
    "commit": lambda source, out: ptbin.commit(_draft(source, out)),
    "convert": lambda source, out: ptbin.convert(source, out / "x.bin"),
    "convert_directory": lambda source, out: ptbin.convert_directory(source.parent, out / "all"),
    "diff": lambda source, out: ptbin.diff(source, source),
    "inspect": lambda source, out: ptbin.inspect(source),
    "load": lambda source, out: ptbin.load(source).close(),
    "publish": lambda source, out: ptbin.publish(_draft(source, out)),
    "restore": lambda source, out: ptbin.restore(source, out / "x.pt"),
    "stage": _draft,
    "verify": lambda source, out: [ptbin.convert(source, out / "x.bin"), ptbin.verify(out / "x.bin")],
    "verify_directory": lambda source, out: [
        ptbin.convert(source, out / "x.bin"),
        ptbin.verify_directory(out),
    ],
}
CATALOG: Calls = {
    "check_call": lambda source, out: catalog.check_call(source.parent, out),
    "find_checkpoints": lambda source, out: list(catalog.find_checkpoints(source.parent)),
    "find_manifests": lambda source, out: list(catalog.find_manifests(source.parent)),
    "find_one": lambda source, out: catalog.find_one(source),
    "find_orphans": lambda source, out: list(catalog.find_orphans(source.parent)),
    "plan_outputs": lambda source, out: catalog.plan_outputs([catalog.find_one(source)], out),
    # Of values that hold no place of their own:
    "is_rejection": lambda source, out: None,
    "is_up_to_date": lambda source, out: None,
    "problem_of": lambda source, out: None,
    "relative_output": lambda source, out: None,
}


def _functions(module: Any) -> set[str]:
    public = {name: getattr(module, name) for name in module.__all__}
    return {name for name, value in public.items() if callable(value) and not isinstance(value, type)}


def test_the_tables_above_hold_every_public_function() -> None:
    assert CALLS.keys() == _functions(ptbin)
    assert CATALOG.keys() == _functions(catalog)


@pytest.mark.parametrize("name", [*CALLS, *CATALOG])
def test_public_functions_take_paths(name: str, tmp_path: Path) -> None:
    source = tmp_path / "in" / "a.pt"
    source.parent.mkdir()
    torch.save({"w": torch.ones(4)}, source)
    out = tmp_path / "out"
    out.mkdir()
    (CALLS | CATALOG)[name](source, out)


def test_plans_take_paths(store: Path, tmp_path: Path) -> None:
    request = RunRequest(store, tmp_path / "out")  # type: ignore[arg-type]
    plan = Plan(request)
    plan.make()
    assert plan.work.count() == 5
    plan.close()
