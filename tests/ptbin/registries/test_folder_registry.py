"""Directory registries as a source: what cannot be read is a problem of its version, or one of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ptbin.options import ConvertOptions
from ptbin.registries import open_registry
from ptbin.registries.migration import prepare
from ptbin.registries.planning import Migration


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two models, with two versions and one."""
    for name in ("net/1/model.pt", "net/2/model.pt", "other/1/model.pt"):
        (tmp_path / "source" / name).parent.mkdir(parents=True)
        (tmp_path / "source" / name).write_bytes(b"weights")
    return tmp_path / "source"


def plan(source: Path, exclude: tuple[str, ...] = ()) -> Migration:
    here, there = (open_registry(str(place), None, {}) for place in (source, source.parent / "dest"))
    return prepare(here, there, (), exclude, "all", ConvertOptions())


def actions(migration: Migration) -> dict[str, str]:
    return {step.version.path: step.reason or step.action for step in migration.steps()}


def test_a_version_of_which_a_folder_cannot_be_read_is_refused_and_the_others_are_not(
    source: Path, closed: Callable[[Path], None]
) -> None:
    closed(source / "net/2/extra")
    found = plan(source)
    assert actions(found) == {"net/1": "migrate", "net/2": "storage_error", "other/1": "migrate"}
    (step,) = [step for step in found.steps() if step.reason]
    assert str(source / "net/2/extra") in step.detail


def test_a_version_that_cannot_be_read_at_all_is_one_problem(
    source: Path, closed: Callable[[Path], None]
) -> None:
    closed(source / "net/3")
    assert actions(plan(source)) == {
        "net/1": "migrate",
        "net/2": "migrate",
        "net/3": "storage_error",
        "other/1": "migrate",
    }


def test_a_folder_of_no_version_is_a_problem_of_its_own(source: Path, closed: Callable[[Path], None]) -> None:
    closed(source / "lost+found")
    found = plan(source)
    assert set(actions(found).values()) == {"migrate"}
    assert [model.model.name for model in found.models if model.problem] == ["lost+found"]
    assert not any(model.problem for model in plan(source, exclude=("lost+found",)).models)


def test_the_registry_itself_has_to_be_readable(source: Path, closed: Callable[[Path], None]) -> None:
    closed(source)
    with pytest.raises(PermissionError):
        plan(source)
