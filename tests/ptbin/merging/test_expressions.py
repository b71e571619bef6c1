"""Expressions in a user's recipe that would never end are refused, and those that people write are not."""

from __future__ import annotations

import json

import pytest

from ptbin.errors import UsageError
from ptbin.merging.recipes import parse_recipe


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$",
        "(a|a)*b",
        r"((\w*)\.?)*weight",
        r"(?:\d+)+x",
        "(x?){50}y",
        "(a|b|ab){50}c",
        r"((a|a)\.)*b",
        "a?" * 30 + "a" * 30,
        "(a|aa)" * 30 + "$",
        ".*.*.*.*.*x",
        "(?:a{1,}){2,}b",
        "([a-z]+)*[0-9]",
    ],
)
@pytest.mark.parametrize("rule", ["merge", "tensors"])
def test_an_expression_that_may_never_end_is_refused(text: str, rule: str) -> None:
    row = {"names": text, "how": "rows"} if rule == "merge" else {"from": ["w", text], "to": "w"}
    with pytest.raises(UsageError, match=rf"{rule} 0: matching .* may never end: "):
        parse_recipe(json.dumps({rule: [row]}))


@pytest.mark.parametrize(
    "text",
    [
        r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(.+)\.weight",
        r"(?P<layer>.+)\.(wq|wk|wv)\.(weight|bias)",
        r"(?:[^.]+\.)*norm\.weight",
        r"(?:(?:module|model)\.)*blocks\.(?P<n>\d+)\.attn(?:\.\w+)?",
        r"(?:module\.)*(?P<rest>.*?)\.(?:gamma|weight)",
        r"h\.(\d+)\.(\d+)\.(\d+)\.(\d+)\.(\d+)\.w[+*)]",
        r"a{2}b{3,5}",
    ],
)
def test_what_people_write_is_taken(text: str) -> None:
    assert parse_recipe(json.dumps({"merge": [{"names": text, "how": "rows"}]})).merges[0].names == text
