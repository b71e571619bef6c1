"""Which files a run takes, where their outputs go, what is done already, and which calls are refused."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ptbin
from ptbin import catalog
from ptbin.catalog import Found, Job, Problem, plan_outputs
from ptbin.catalog.checks import check_request
from ptbin.catalog.request import RunRequest
from ptbin.errors import StorageError, UsageError
from ptbin.options import ConvertOptions
from ptbin.stores import Identity, ListedObject, Watch, open_store
from ptbin.stores.local import LocalStore
from tests.fakes import CountingStore, HookedStore, registered
from tests.servers.endpoint import S3Endpoint


def _touch(folder: Path, *paths: str) -> None:
    for path in paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"x")


def _paths(source: str | Path, **options: Any) -> list[str]:
    return sorted(found.path for found in catalog.find_checkpoints(str(source), **options))


# ------------------------------------------------------------------------------------ find_checkpoints


def test_names_decide_what_is_looked_into(tmp_path: Path) -> None:
    certain = ["a.pt", "b.pth", "c.ckpt", "d.bin", "e.th", "f.pth.tar", "UPPER.PT", "deep/er/g.pt", "h.7z"]
    uncertain = ["checkpoint-500", "deep/weights.v2", "noext"]
    others = ["config.json", "notes.md", "log.txt", ".hidden", "events.out.tfevents.123.host", "x.onnx"]
    _touch(tmp_path, *certain, *uncertain, *others)
    found = {one.path: one for one in catalog.find_checkpoints(str(tmp_path))}
    assert {path for path, one in found.items() if one.certain} == set(certain)
    assert {path for path, one in found.items() if not one.certain} == set(uncertain)


def test_what_ptbin_writes_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    _touch(
        tmp_path,
        "run/last.bin",
        "run/last.bin.manifest.json",
        "run/.last.bin.0123.ptbin-partial",
        "_ptbin/runs/1/state.pt",
        "run/_ptbin/x.pt",
    )
    assert _paths(tmp_path) == ["run/last.bin"]
    # not even where everything is asked for
    assert _paths(tmp_path, include=["*"]) == ["run/last.bin"]


def test_found_says_where_how_large_and_which(tmp_path: Path) -> None:
    _touch(tmp_path, "run/a.pt")
    (found,) = catalog.find_checkpoints(str(tmp_path))
    uri = str(tmp_path / "run" / "a.pt")
    store, path = open_store(uri)
    assert found == Found("run/a.pt", uri, 1, store.stat(path).identity, True)


def test_one_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    _touch(tmp_path, "notes.txt")
    (found,) = catalog.find_checkpoints(str(tmp_path / "notes.txt"))
    assert (found.path, found.certain) == ("notes.txt", True)


def test_a_source_that_is_not_there_is_an_error_and_not_an_empty_answer(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        list(catalog.find_checkpoints(str(tmp_path / "missing")))


TREE = ["a.pt", "b.ckpt", "run1/a.pt", "run1/epoch=3.ckpt", "run1/deep/a.pt", "run2/a.pt", "run2/opt.txt"]


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (["*.ckpt"], ["b.ckpt", "run1/epoch=3.ckpt"]),
        (["run1/*"], ["run1/a.pt", "run1/epoch=3.ckpt"]),
        (["run1/**"], ["run1/a.pt", "run1/deep/a.pt", "run1/epoch=3.ckpt"]),
        (["**/a.pt"], ["a.pt", "run1/a.pt", "run1/deep/a.pt", "run2/a.pt"]),
        (["*/a.pt"], ["run1/a.pt", "run2/a.pt"]),
        (["run?/**/a.pt"], ["run1/a.pt", "run1/deep/a.pt", "run2/a.pt"]),
        (["run[!1]/*"], ["run2/a.pt", "run2/opt.txt"]),  # what is asked for by name is looked into
        (["b.ckpt", "run2/a.pt"], ["b.ckpt", "run2/a.pt"]),
        (["A.PT"], []),
        (["nothing/*"], []),
    ],
)
def test_include(tmp_path: Path, include: list[str], expected: list[str]) -> None:
    _touch(tmp_path, *TREE)
    assert _paths(tmp_path, include=include) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (["*.ckpt"], ["a.pt", "run1/a.pt", "run1/deep/a.pt", "run2/a.pt"]),
        (["run1/**"], ["a.pt", "b.ckpt", "run2/a.pt"]),
        (["**/deep/**", "run2/*"], ["a.pt", "b.ckpt", "run1/a.pt", "run1/epoch=3.ckpt"]),
        (["*"], []),
    ],
)
def test_exclude(tmp_path: Path, exclude: list[str], expected: list[str]) -> None:
    _touch(tmp_path, *TREE)
    assert _paths(tmp_path, exclude=exclude) == expected


def test_exclude_wins_over_include(tmp_path: Path) -> None:
    _touch(tmp_path, *TREE)
    assert _paths(tmp_path, include=["**/a.pt"], exclude=["run1/**"]) == ["a.pt", "run2/a.pt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.pt", ["a.pt"]),
        ("run1/*.pt", ["run1/a.pt"]),
        ("run*/a.pt", ["run1/a.pt", "run2/a.pt"]),
        ("**/a.pt", ["a.pt", "run1/a.pt", "run1/deep/a.pt", "run2/a.pt"]),
        ("run[12]/**", ["run1/a.pt", "run1/deep/a.pt", "run1/epoch=3.ckpt", "run2/a.pt"]),
        ("run1/**/*.pt", ["run1/a.pt", "run1/deep/a.pt"]),
        ("run9/*", None),
    ],
)
def test_source_may_be_a_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str] | None
) -> None:
    _touch(tmp_path, *TREE)
    for root in (f"{tmp_path}/", f"file://{tmp_path}/", ""):
        monkeypatch.chdir(tmp_path)
        try:
            uris = sorted(found.uri for found in catalog.find_checkpoints(root + pattern))
        except StorageError:
            assert expected is None
        else:
            assert uris == [str(tmp_path / path) for path in expected or ()]


def test_a_path_that_is_there_wins_over_its_reading_as_a_glob(tmp_path: Path) -> None:
    _touch(tmp_path, "run[1].pt", "run1.pt")
    assert _paths(tmp_path / "run[1].pt") == ["run[1].pt"]


def test_a_directory_that_is_there_wins_over_its_reading_as_a_glob(tmp_path: Path) -> None:
    _touch(tmp_path, "run[1]/a.pt", "run1/b.pt")
    assert _paths(tmp_path / "run[1]") == ["a.pt"]


class _Listing(HookedStore):
    """A store that lists what it is told to."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(LocalStore())
        self.paths = paths

    def is_directory(self, path: str) -> bool:
        return True

    def iter_objects(self, path: str, watch: Watch | None = None) -> Iterator[ListedObject]:
        return (ListedObject(one, f"listed://{one}", 1, None) for one in self.paths)


def _glob_oracle(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """A glob folder by folder, `**` for any number of folders, or at the end for all that lies below."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(parts)
        return any(_glob_oracle(parts[count:], pattern[1:]) for count in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _glob_oracle(parts[1:], pattern[1:])


_segments = st.text(alphabet="ab.-^", min_size=1, max_size=3)
_names = _segments.filter(lambda name: not name.startswith("."))  # hidden ones: test_odd_entries.py
_patterns = st.lists(
    st.sampled_from(
        ["**", "*", "?", "a*", "*b", "[ab]*", "[!a]", "a.b", "a", ".*", "[", "a]", "*.", "+", "(b"]
    )
    | _segments,
    min_size=2,
    max_size=4,
)


@given(pattern=_patterns, paths=st.lists(st.lists(_names, min_size=1, max_size=4), max_size=8))
@example(pattern=["[", "[ab]*"], paths=[["a"], ["[", "a"]])
@example(pattern=["**", "a"], paths=[["a"], ["ba"], ["b", "a"], ["b", "ba"]])
@example(pattern=["a", "**", "**", "b"], paths=[["a", "b"], ["a", "a", "b"], ["a"]])
def test_globs_mean_what_they_mean_in_a_shell(pattern: list[str], paths: list[list[str]]) -> None:
    listed = ["/".join(parts) for parts in paths]
    with registered("listed", _Listing(listed)):
        found = [one.path for one in catalog.find_checkpoints("listed://", include=["/".join(pattern)])]
    assert found == ["/".join(parts) for parts in paths if _glob_oracle(parts, pattern)]


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("d/[z-a].pt", [], ["d/z.pt"]),
        ("d/[^a].pt", ["d/^.pt", "d/a.pt"], ["d/b.pt"]),
        ("d/[[]1].pt", ["d/[1].pt"], ["d/1.pt"]),
        ("d/[a&&b].pt", ["d/&.pt"], ["d/c.pt"]),
    ],
)
def test_odd_character_classes(pattern: str, matches: list[str], others: list[str]) -> None:
    with registered("listed", _Listing([*matches, *others])):
        found = [one.path for one in catalog.find_checkpoints("listed://", include=[pattern])]
    assert found == matches


def test_listing_asks_nothing_of_single_files(tmp_path: Path) -> None:
    _touch(tmp_path, *TREE)
    with registered("counted", CountingStore(LocalStore())) as store:
        assert len(_paths(f"counted://{tmp_path}")) == 6
    assert [call.operation for call in store.calls] == ["is_directory", "list"]


def test_s3_prefix_and_glob(moto_s3: S3Endpoint) -> None:
    bucket, store = moto_s3.make_bucket(), moto_s3.store()
    for key in ("m/a.pt", "m/run/b.ckpt", "m/config.json", "mother/c.pt", "m/run/_ptbin/d.pt"):
        store.write_bytes(f"{bucket}/{key}", b"x")
    options = moto_s3.storage_options
    assert _paths(f"s3://{bucket}/m", storage_options=options) == ["a.pt", "run/b.ckpt"]
    assert _paths(f"s3://{bucket}/m/", storage_options=options) == ["a.pt", "run/b.ckpt"]
    assert _paths(f"s3://{bucket}/m/*/*.ckpt", storage_options=options) == ["run/b.ckpt"]
    assert _paths(f"s3://{bucket}", storage_options=options) == ["m/a.pt", "m/run/b.ckpt", "mother/c.pt"]
    (found,) = catalog.find_checkpoints(f"s3://{bucket}/m/a.pt", storage_options=options)
    assert found.identity == store.stat(f"{bucket}/m/a.pt").identity


# ---------------------------------------------------------------------------------------- plan_outputs


def _found(path: str, *, certain: bool = True) -> Found:
    return Found(path, f"s3://bucket/{path}", 10, Identity("etag", path), certain)


def _planned(*paths: str | Found, **options: Any) -> tuple[dict[str, str], dict[str, str]]:
    found = [path if isinstance(path, Found) else _found(path) for path in paths]
    jobs, problems = plan_outputs(found, "/out", **options)
    return {job.path: job.dest_uri for job in jobs}, {one.source: one.reason for one in problems}


@pytest.mark.parametrize(
    ("path", "replaced"),
    [
        ("run1/last.ckpt", "run1/last.bin"),
        ("a.pt", "a.bin"),
        ("a.bin", "a.bin"),
        ("best.pth.tar", "best.bin"),
        ("BEST.PTH.TAR", "BEST.bin"),
        ("a.tar", "a.bin"),
        ("v1.2/model.v1.pt", "v1.2/model.v1.bin"),
        ("v1.2/model.v1", "v1.2/model.v1.bin"),
        ("folder.pt/noext", "folder.pt/noext.bin"),
        ("folder/.pt", "folder/.pt.bin"),
        ("épôque 3.ckpt", "épôque 3.bin"),
    ],
)
def test_where_an_output_goes(path: str, replaced: str) -> None:
    assert _planned(path) == ({path: f"/out/{replaced}"}, {})
    assert _planned(path, naming="append") == ({path: f"/out/{path}.bin"}, {})


@pytest.mark.parametrize("dest", ["/out", "/out/", "out", "s3://bucket/prefix/", "memory://out"])
def test_outputs_lie_below_dest_with_one_slash(dest: str) -> None:
    ((job,), problems) = plan_outputs([_found("run/a.pt")], dest)
    assert (job.dest_uri, problems) == (f"{dest.rstrip('/')}/run/a.bin", [])


@pytest.mark.parametrize(
    "paths",
    [
        ("run/a.pt", "run/a.ckpt"),
        ("run/a.pt", "run/A.pt"),  # one file where names are not case-sensitive
        ("run/a.pt", "Run/a.pt"),
        ("a.pth.tar", "a.pth"),
        ("straße.pt", "STRASSE.pt"),
        ("a.pt", "a.ckpt", "a.bin"),
    ],
)
def test_sources_that_share_an_output_are_all_refused(paths: tuple[str, ...]) -> None:
    planned, problems = _planned(*paths, "other.pt")
    assert planned == {"other.pt": "/out/other.bin"}
    assert problems == {f"s3://bucket/{path}": "output_collision" for path in paths}


def test_a_collision_names_the_others_and_the_way_out() -> None:
    _, problems = plan_outputs([_found("a.pt"), _found("a.ckpt")], "/out")
    for problem, other in zip(problems, ("a.ckpt", "a.pt"), strict=True):
        assert other in problem.detail
        assert "--naming append" in problem.detail
    planned, none = _planned("a.pt", "a.ckpt", naming="append")
    assert (sorted(planned.values()), none) == (["/out/a.ckpt.bin", "/out/a.pt.bin"], {})


def test_a_file_that_may_be_anything_does_not_stop_a_checkpoint() -> None:
    maybe = _found("model", certain=False)
    assert _planned(maybe, "model.pt") == ({"model.pt": "/out/model.bin"}, {})
    assert _planned(maybe) == ({"model": "/out/model.bin"}, {})
    planned, problems = _planned(maybe, "model.pt", "model.ckpt")
    assert planned == {}
    assert set(problems) == {"s3://bucket/model.pt", "s3://bucket/model.ckpt"}


@pytest.mark.parametrize(
    "path", ["a/../b.pt", "../b.pt", "a//b.pt", "./a.pt", "/etc/a.pt", "..\\b.pt", "a\0.pt", ""]
)
def test_names_from_a_store_never_become_paths_out_of_dest(path: str) -> None:
    planned, problems = _planned(path, "fine.pt")
    assert planned == {"fine.pt": "/out/fine.bin"}
    assert list(problems.values()) == ["unsafe_path"]


def test_unsafe_object_keys_of_a_real_listing(moto_s3: S3Endpoint) -> None:
    bucket, client = moto_s3.make_bucket(), moto_s3.store().client
    for key in ("m/run/../../../b.pt", "m//c.pt", "m/good.pt"):
        client.call("put_object", bucket, Bucket=bucket, Key=key, Body=b"x")
    found = catalog.find_checkpoints(f"s3://{bucket}/m", storage_options=moto_s3.storage_options)
    jobs, problems = plan_outputs(found, "/out")
    assert [job.dest_uri for job in jobs] == ["/out/good.bin"]
    assert [problem.reason for problem in problems] == ["unsafe_path", "unsafe_path"]


_names = st.text(alphabet="aAbß.\\/ ", min_size=1, max_size=4) | st.sampled_from(
    ["..", ".", "x.pt", "X.ckpt", "x"]
)
_founds = st.lists(
    st.builds(
        lambda parts, certain: _found("/".join(parts), certain=certain),
        st.lists(_names, min_size=1, max_size=3),
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda one: one.path,
)


@given(found=_founds, naming=st.sampled_from(["replace", "append"]))
def test_a_plan_keeps_its_promises(found: list[Found], naming: Any) -> None:
    jobs, problems = plan_outputs(found, "/out", naming=naming)
    outputs = [job.dest_uri for job in jobs]
    assert len({uri.casefold() for uri in outputs}) == len(outputs)
    for uri in outputs:
        assert uri == posixpath.normpath(uri)
        assert uri.startswith("/out/")
    answered = {job.source_uri for job in jobs} | {problem.source for problem in problems}
    assert len(jobs) + len(problems) == len(answered)
    # nothing that is certainly a checkpoint goes without an answer
    assert {one.uri for one in found if one.certain} <= answered
    backwards, _ = plan_outputs(found[::-1], "/out", naming=naming)
    assert set(backwards) == set(jobs)


def test_an_error_as_a_row_of_the_summary() -> None:
    refused = catalog.problem_of("a.pt", ptbin.errors.NoStateDictError("nothing in it"))
    assert refused == Problem("a.pt", "no_state_dict", "nothing in it")
    foreign = catalog.problem_of("a.pt", ZeroDivisionError("oops"))
    assert foreign == Problem("a.pt", "internal_error", "ZeroDivisionError: oops")
    reasons = {"unsafe_pickle": True, "source_changed": True, "unsafe_path": True, "storage_error": False}
    assert {reason: catalog.is_rejection(reason) for reason in reasons} == reasons
    assert not catalog.is_rejection("verification_failed")


# --------------------------------------------------------------------------------------- is_up_to_date


@pytest.fixture
def done(tmp_path: Path) -> Job:
    """A converted checkpoint, as the next run meets it."""
    source = tmp_path / "source" / "model.pt"
    source.parent.mkdir()
    torch.save({"w": torch.arange(10.0)}, source)
    job = _job(source, tmp_path / "out")
    ptbin.convert(job.source_uri, job.dest_uri)
    return job


def _job(source: Path, dest: Path) -> Job:
    ((job,), _) = plan_outputs(catalog.find_checkpoints(str(source.parent)), str(dest))
    return job


def _again(job: Job) -> Job:
    """The job as a new listing would make it."""
    return _job(Path(job.source_uri), Path(job.dest_uri).parent)


def _manifest(job: Job) -> Path:
    return Path(f"{job.dest_uri}.manifest.json")


def _edit_manifest(job: Job, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(_manifest(job).read_bytes())
    edit(manifest)
    _manifest(job).write_text(json.dumps(manifest))


DEFAULT = ConvertOptions()


def test_a_finished_conversion_is_up_to_date(done: Job) -> None:
    assert catalog.is_up_to_date(_again(done), DEFAULT)


def test_asking_costs_one_small_read_and_one_stat(done: Job) -> None:
    with registered("counted", CountingStore(LocalStore())) as store:
        job = dataclasses.replace(done, dest_uri=f"counted://{done.dest_uri}")
        assert catalog.is_up_to_date(job, DEFAULT)
    assert (store.count("read"), store.count("stat"), len(store.calls)) == (1, 1, 3)


def test_a_touched_source_is_converted_again(done: Job) -> None:
    os.utime(done.source_uri, ns=(0, 1))
    assert not catalog.is_up_to_date(_again(done), DEFAULT)


def test_a_source_overwritten_by_one_of_equal_size_is_converted_again(done: Job) -> None:
    size = Path(done.source_uri).stat().st_size
    torch.save({"w": torch.arange(10.0) + 1}, done.source_uri)
    assert Path(done.source_uri).stat().st_size == size
    assert not catalog.is_up_to_date(_again(done), DEFAULT)
    # a store whose identity says nothing of the size
    assert not catalog.is_up_to_date(dataclasses.replace(done, source_size=size + 1), DEFAULT)


def test_the_same_file_at_another_place_is_another_source(done: Job, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    Path(done.source_uri).parent.rename(moved)
    assert not catalog.is_up_to_date(_job(moved / "model.pt", tmp_path / "out"), DEFAULT)


@pytest.mark.parametrize(
    "changes",
    [
        {"select": "."},
        {"strip_prefix": "auto"},
        {"rename": (("w", "v"),)},
        {"drop": ("nothing",)},
        {"on_unsafe": "extract"},
        {"force": True},
        {"verify": "load"},
    ],
    ids=str,
)
def test_other_wishes_are_converted_again(done: Job, changes: dict[str, Any]) -> None:
    assert not catalog.is_up_to_date(done, ConvertOptions(**changes))


def test_a_higher_proof_is_enough_for_a_lower_one(done: Job) -> None:
    assert catalog.is_up_to_date(done, ConvertOptions(verify="none"))
    for level, enough in {"none": False, "checksum": True, "load": True, "nonsense": False}.items():
        verification = {"level": level, "status": "verified"}
        _edit_manifest(done, functools.partial(dict.update, verification=verification))
        assert catalog.is_up_to_date(done, DEFAULT) == enough


def test_an_output_that_is_missing_short_or_long_is_converted_again(done: Job) -> None:
    output = Path(done.dest_uri)
    whole = output.read_bytes()
    for wrong in (whole[:-1], whole + b"x", b""):
        output.write_bytes(wrong)
        assert not catalog.is_up_to_date(done, DEFAULT)
    output.unlink()
    assert not catalog.is_up_to_date(done, DEFAULT)
    output.write_bytes(whole)
    assert catalog.is_up_to_date(done, DEFAULT)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"schema_version": 2}'])
def test_a_manifest_that_is_none_does_not_count(done: Job, text: bytes) -> None:
    _manifest(done).write_bytes(text)
    assert not catalog.is_up_to_date(done, DEFAULT)
    _manifest(done).unlink()
    assert not catalog.is_up_to_date(done, DEFAULT)


def test_a_manifest_cut_short_anywhere_does_not_count(done: Job) -> None:
    whole = _manifest(done).read_bytes().rstrip()
    for nbytes in range(len(whole)):
        _manifest(done).write_bytes(whole[:nbytes])
        assert not catalog.is_up_to_date(done, DEFAULT)


@pytest.mark.parametrize("path", ["../out/model.bin", "/etc/passwd", "..", "", "a\\b"])
def test_a_manifest_that_points_out_of_its_folder_does_not_count(done: Job, path: str) -> None:
    _edit_manifest(done, lambda manifest: manifest["outputs"][0].update(path=path))
    assert not catalog.is_up_to_date(done, DEFAULT)
    assert [issue.reason for issue in ptbin.verify(str(_manifest(done)))] == ["bad_manifest"]


def test_a_manifest_without_outputs_vouches_for_nothing(done: Job) -> None:
    _edit_manifest(done, lambda manifest: manifest.update(outputs=[]))
    Path(done.dest_uri).unlink()
    assert not catalog.is_up_to_date(done, DEFAULT)


def test_a_manifest_nested_without_end_does_not_count(done: Job) -> None:
    _manifest(done).write_bytes(b"[" * 100_000)
    assert not catalog.is_up_to_date(done, DEFAULT)


def test_without_an_identity_nothing_is_known(done: Job) -> None:
    assert not catalog.is_up_to_date(dataclasses.replace(done, identity=None), DEFAULT)


# ------------------------------------------------------------------------ find_manifests, find_orphans


def test_manifests_and_orphans(done: Job) -> None:
    out = Path(done.dest_uri).parent
    _touch(out, "run/orphan.bin", "run/readme.md", "_ptbin/runs/1/x.bin", "_ptbin/runs/1/y.bin.manifest.json")
    _touch(out, "lost.bin.manifest.json")  # a manifest whose output is gone is verify's to find
    assert sorted(catalog.find_manifests(str(out))) == [f"{out}/lost.bin.manifest.json", str(_manifest(done))]
    assert list(catalog.find_orphans(str(out))) == [f"{out}/run/orphan.bin"]


def test_manifests_of_one_output(done: Job, tmp_path: Path) -> None:
    for uri in (done.dest_uri, str(_manifest(done))):
        assert list(catalog.find_manifests(uri)) == [str(_manifest(done))]
    with pytest.raises(StorageError):
        list(catalog.find_manifests(str(tmp_path / "missing.bin")))


def test_an_output_whose_manifest_lies_in_another_folder_is_an_orphan(done: Job) -> None:
    _touch(Path(done.dest_uri).parent, "run/model.bin")
    orphans = list(catalog.find_orphans(str(Path(done.dest_uri).parent)))
    assert orphans == [str(Path(done.dest_uri).parent / "run" / "model.bin")]


# ------------------------------------------------------------------------------------------ check_call


def _refused(kind: type[Exception], source: str | Path, dest: str | Path | None, **options: Any) -> str:
    with pytest.raises(kind) as refusal:
        catalog.check_call(str(source), None if dest is None else str(dest), **options)
    message = str(refusal.value)
    assert "\n" not in message
    return message


@pytest.fixture
def source(tmp_path: Path) -> Path:
    _touch(tmp_path, "source/a.pt", "source/run/b.pt")
    return tmp_path / "source"


def test_a_call_that_can_work_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for one in (source, f"{source}/", f"{source}/*.pt", f"{source}/a.pt", f"file://{source}"):
        catalog.check_call(str(one), str(tmp_path / "new" / "deep"))
        catalog.check_call(str(one), None)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    for name in ("missing", "missing.pt", "missing/*.pt"):
        assert "missing" in _refused(UsageError, tmp_path / name, tmp_path / "out")


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    assert "empty" in _refused(UsageError, tmp_path / "empty", tmp_path / "out")


def test_dest_equal_to_source_is_refused(source: Path) -> None:
    for dest in (source, f"{source}/", f"file://{source}", source / "run" / ".."):
        _refused(UsageError, source, dest)
    _refused(UsageError, source / "a.pt", source / "a.pt")


def test_dest_inside_source_is_refused(source: Path) -> None:
    for dest in (source / "out", source / "run", source / "deep" / "er", f"file://{source}/out"):
        assert "inside" in _refused(UsageError, source, dest)
    _refused(UsageError, f"{source}/**/*.pt", source / "out")


def test_dest_beside_or_above_source_is_fine(source: Path, tmp_path: Path) -> None:
    for dest in (f"{source}-out", tmp_path / "sourc", tmp_path / "out"):
        catalog.check_call(str(source), str(dest))
    catalog.check_call(str(source / "a.pt"), str(source / "a.bin"))


def test_dest_inside_source_by_way_of_a_link_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    _refused(UsageError, source, tmp_path / "link" / "out")
    _refused(UsageError, tmp_path / "link", source / "out")


def test_a_mirror_is_apart_from_its_source_whatever_the_names(source: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path)
    for dest in (tmp_path, f"file://{tmp_path}", tmp_path / "alias", tmp_path / "source" / ".."):
        with pytest.raises(UsageError, match="inside"):
            check_request(RunRequest(str(source), str(dest), kind="sync"))
    apart = RunRequest(str(source), str(tmp_path / "out"), kind="sync")
    check_request(dataclasses.replace(apart, deletes=True, backup_dir=str(tmp_path / "old")))


def test_a_dest_that_cannot_be_written_is_refused(source: Path, tmp_path: Path) -> None:
    _touch(tmp_path, "file")
    _refused(StorageError, source, tmp_path / "file" / "out")
    _refused(StorageError, source, "/proc/ptbin/out")
    catalog.check_call(str(source), "/proc/ptbin/out", writes=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_dest_without_permission_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    _refused(PermissionError, source, tmp_path / "locked" / "out")


@pytest.mark.parametrize("uri", ["", "nosuch://bucket/x", "s3://", "s3:///x"])
def test_a_uri_that_means_nothing_is_refused(source: Path, tmp_path: Path, uri: str) -> None:
    _refused(UsageError, uri, tmp_path / "out")
    _refused(UsageError, source, uri)


def test_s3_refusals(source: Path, moto_s3: S3Endpoint) -> None:
    bucket, options = moto_s3.make_bucket(), moto_s3.storage_options
    moto_s3.store().write_bytes(f"{bucket}/m/a.pt", b"x")
    both: dict[str, Any] = {"source_options": options, "dest_options": options}
    catalog.check_call(f"s3://{bucket}/m", f"s3://{bucket}/out", **both)
    catalog.check_call(f"s3://{bucket}/m", f"s3://{bucket}/m-out", **both)
    assert "no-such" in _refused(StorageError, source, "s3://no-such-bucket/out", dest_options=options)
    assert "no-such" in _refused(StorageError, "s3://no-such-bucket/m", source, source_options=options)
    _refused(UsageError, f"s3://{bucket}/missing", f"s3://{bucket}/out", **both)
    _refused(UsageError, f"s3://{bucket}/m", f"s3://{bucket}/m/out", **both)
    _refused(UsageError, f"s3://{bucket}", f"s3://{bucket}/out", **both)
    assert [one.path for one in moto_s3.store().iter_objects(bucket)] == ["m/a.pt"]
    assert moto_s3.uploads_in(bucket) == []


def test_no_secret_is_in_a_refusal(source: Path, moto_s3: S3Endpoint) -> None:
    options = {**moto_s3.storage_options, "secret": "hunter2"}
    assert "hunter2" not in _refused(StorageError, source, "s3://no-such-bucket/out", dest_options=options)
