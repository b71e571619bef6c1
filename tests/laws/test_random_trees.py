"""The law over random checkpoints, by every writer and with every way to choose."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import ptbin
from tests.laws.law import hold, write
from tests.laws.producers import producers
from tests.laws.trees import Tree, trees

EXAMPLES = int(os.environ.get("PTBIN_LAW_EXAMPLES", "0"))

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore"),  # what torch says of quantized tensors, old storages, sparse ones
    pytest.mark.timeout(0 if EXAMPLES else 300),
]

WRITERS = st.sampled_from(["zip", "zip", "legacy", "pickle"])
long = settings(
    deadline=None,
    max_examples=EXAMPLES or 80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    print_blob=True,
)


def _saved(tree: Tree, folder: str, writer: str) -> Path:
    path = Path(folder) / "source.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(tree.value, path, writer)
    return path


@long
@given(trees(), WRITERS)
def test_everything_is_taken_or_named_or_refused(tree: Tree, writer: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reason = hold(_saved(tree, folder, writer), models=tree.models)
    event(f"reason {reason}")


@long
@given(producers(), WRITERS)
def test_the_law_holds_for_changed_layouts_of_well_known_scripts(tree: Tree, writer: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reason = hold(_saved(tree, folder, writer), models=tree.models)
    event(f"reason {reason}")


@long
@given(trees(ordinary=True), WRITERS)
def test_ordinary_checkpoints_convert(tree: Tree, writer: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = _saved(tree, folder, writer)
        detail = ptbin.inspect(str(path))["detail"]
        assert hold(path, models=tree.models) is None, detail


@long
@given(trees(), WRITERS, st.data())
def test_the_law_holds_for_what_the_caller_chooses(tree: Tree, writer: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = _saved(tree, folder, writer)
        offered = [found["path"] for found in ptbin.inspect(str(path))["state_dicts"]]
        places = [place for place in offered if "#" not in place]  # copies inside are in test_averages
        options: dict[str, Any] = data.draw(
            st.sampled_from(
                [{"flatten": True}, {"split": True}, {"select": True}, {"select": True, "flatten": True}]
            )
        )
        if options.get("select"):
            choices = st.lists(st.sampled_from([*places, *tree.models]), min_size=1, max_size=2, unique=True)
            options = {**options, "select": tuple(data.draw(choices))}
        reason = hold(path, models=tree.models, **options)
    event(f"{sorted(options)}: {reason}")
