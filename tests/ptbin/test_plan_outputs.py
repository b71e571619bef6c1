"""Where each output of a run goes, and what is refused because two would go to one place."""

from __future__ import annotations

import posixpath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ptbin
from ptbin import catalog
from ptbin.catalog import Found, Problem, plan_outputs
from ptbin.stores import Identity
from tests.servers.endpoint import S3Endpoint


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
