"""Path templates: both ways, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptbin.errors import UsageError
from ptbin.registries.layouts import Layout, parse_layout
from ptbin.registries.values import natural_order

NAMES = st.text("abcXYZ019._- ", min_size=1, max_size=12).filter(lambda name: name not in (".", ".."))


@given(NAMES, NAMES)
def test_what_a_template_makes_it_splits_again(name: str, version: str) -> None:
    for template in ("{name}/{version}", "models/{name}/v{version}", "{version}/{name}/weights"):
        layout = parse_layout(template)
        folder = layout.folder(name, version)
        assert layout.split(f"{folder}/data/model.pth") == (name, version, "data/model.pth")


NO_TEMPLATES = """
nonsense {version} {name}/{other} ../{name} {name}/../x {name}//{version} /{name} {name}{name} _ptbin/{name}
{name
""".split()


@pytest.mark.parametrize("text", NO_TEMPLATES)
def test_no_template(text: str) -> None:
    with pytest.raises(UsageError, match="layout"):
        parse_layout(text)


def test_ready_layouts() -> None:
    assert parse_layout("hf") == Layout("hf", "{name}/{version}")
    assert parse_layout("hf:{name}") == Layout("hf", "{name}")
    assert parse_layout("{name}/v{version}").style == "mirror"
    triton = parse_layout("triton")
    assert triton.split("resnet/1/model.pt") == ("resnet", "1", "model.pt")
    assert triton.split("resnet/01/model.pt") is None, "Triton's versions are plain numbers"
    assert triton.split("resnet/config.pbtxt") is None


def test_the_folder_of_a_model() -> None:
    assert parse_layout("mirror").model_folder("a") == "a"
    assert parse_layout("models/{name}/v{version}/x").model_folder("a") == "models/a"
    assert parse_layout("{version}/{name}").model_folder("a") is None


def test_versions_sort_as_people_read_them() -> None:
    names = ["v10", "v2", "2", "10", "1.10.0", "1.9.0", "main"]
    assert sorted(names, key=natural_order) == ["1.9.0", "1.10.0", "2", "10", "main", "v2", "v10"]
