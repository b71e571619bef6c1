"""An option is declared once: the form, the command line and the engine agree on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner

from flows.cli import app
from flows.cli.app import cli
from flows.convert import convert
from flows.migrate import migrate
from flows.options import CONVERT, MIGRATE, RESTORE, SYNC, VERIFY
from flows.parsing import build_options, parse_duration, parse_size
from flows.restore import restore
from flows.sync import sync
from flows.verify import verify
from ptbin.errors import UsageError
from ptbin.options import ConvertOptions
from ptbin.values.dtypes import CAST_NAMES
from ptbin.values.options import Option, options_of

FLOWS: dict[str, tuple[Any, tuple[Option, ...]]] = {
    "convert": (convert, CONVERT),
    "sync": (sync, SYNC),
    "migrate": (migrate, MIGRATE),
    "restore": (restore, RESTORE),
    "verify": (verify, VERIFY),
}
OF_THE_RUN = {"source", "dest", "source_options", "dest_options", "run_id"}
OF_COMMANDS = {
    *("source", "dest", "dry_run", "help"),
    *("as_json", "quiet", "source_options", "dest_options", "log_level", "log_format"),
}


def property_of(name: str, parameter: str) -> dict[str, Any]:
    properties: dict[str, Any] = FLOWS[name][0].parameters.properties
    return dict(properties[parameter])


@pytest.mark.parametrize("name", FLOWS)
def test_the_form_and_the_command_line_have_the_same_options(name: str) -> None:
    flow, options = FLOWS[name]
    names = {entry.name for entry in options}
    assert flow.parameters.properties.keys() - OF_THE_RUN == names
    assert {parameter.name for parameter in cli.commands[name].params} - OF_COMMANDS == names


@pytest.mark.parametrize("name", FLOWS)
def test_each_says_the_same_of_an_option(name: str) -> None:
    flow, options = FLOWS[name]
    on_command_line: dict[str | None, Any] = {param.name: param for param in cli.commands[name].params}
    for entry in options:
        shown = flow.parameters.properties[entry.name]
        assert shown["description"] == entry.help
        default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        assert shown.get("default") == default
        assert on_command_line[entry.name].help.startswith(entry.help.removesuffix("."))


def test_the_engine_is_asked_for_what_the_options_say() -> None:
    engine = options_of(ConvertOptions)
    assert engine.keys() - {"layout", "force"} <= {entry.name for entry in CONVERT}
    asked = {entry.name: entry.default for entry in CONVERT}
    assert build_options(asked) == ConvertOptions()
    asked |= {
        "rename": ["a=b"],
        "max_shard_size": "5GB",
        "select": ["x", "y"],
        "drop": ["z"],
        "format": "raw",
    }
    found = build_options(asked, force=True)
    assert (found.rename, found.max_shard_size) == ((("a", "b"),), 5 * 10**9)
    assert (found.select, found.drop, found.format, found.force) == (("x", "y"), ("z",), "raw", True)


def test_choices_are_enumerations_in_the_form() -> None:
    types, none = property_of("convert", "dtype")["anyOf"]
    assert types["enum"] == list(CAST_NAMES)
    assert none == {"type": "null"}
    assert property_of("sync", "on_unsafe")["enum"] == ["reject", "extract"]
    assert property_of("migrate", "runner")["enum"] == ["threads", "processes", "dask", "ray"]


@pytest.mark.parametrize("text", ["90", "45m", "6h", "1h30m", "1h 30m", "1.5h", "2d"])
def test_a_duration_that_is_one_is_taken_by_the_form(text: str) -> None:
    assert parse_duration(text) > 0
    jsonschema.validate(text, property_of("convert", "deadline"))


@pytest.mark.parametrize("text", ["500MB", "5GB", "2GiB", "5 gb", "1024", "1.5TB", "7k"])
def test_a_size_that_is_one_is_taken_by_the_form(text: str) -> None:
    assert parse_size(text) > 0
    jsonschema.validate(text, property_of("convert", "max_shard_size"))


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        *(("deadline", text) for text in ("soon", "", "6 hours", "h", "-1", "1h30x")),
        *(("max_shard_size", text) for text in ("big", "", "5 apples", "GB", "-5GB")),
        ("dtype", "int3"),
        ("workers", 0),
        ("workers", 257),
        ("min_success", 0),
        ("runner", "spark"),
        ("source", ""),  # deployed by a shell that lacks PTBIN_SOURCE
        ("dest", ""),
    ],
)
def test_what_is_wrong_is_refused_before_there_is_a_run(parameter: str, value: Any) -> None:
    """Prefect's server holds the form's schema against what it is given, and so does the flow."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, property_of("convert", parameter))
    with pytest.raises(Exception, match=parameter):
        convert.validate_parameters({"source": "a", "dest": "b", parameter: value})


def test_what_only_the_flow_can_tell_is_refused_by_it() -> None:
    with pytest.raises(Exception, match="deadline"):
        convert.validate_parameters({"source": "a", "dest": "b", "deadline": "0s"})
    with pytest.raises(UsageError, match="not a duration"):
        parse_duration("0s")


def test_a_kind_follows_from_the_type_of_a_field() -> None:
    kinds = {name: entry.kind for name, entry in options_of(ConvertOptions).items()}
    assert kinds["format"] == kinds["dtype"] == "choice"
    assert kinds["flatten"] == "flag"
    assert (kinds["rename"], kinds["drop"], kinds["select"]) == ("pairs", "list", "paths")
    assert Option("x", "A letter.").kind == "text"


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_begins_with_examples_and_has_options_below_headings(name: str) -> None:
    text = CliRunner().invoke(cli, [name, "--help"]).output
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert text.index("Examples:") < text.index(f"{headings[0]}:")
    grouped = {"convert": 8, "sync": 9, "migrate": 8, "restore": 6, "diff": 6}
    assert len(headings) >= grouped.get(name, 1)
    if name in FLOWS:  # what the engine or a flow takes has a heading of its own
        assert "Options" not in headings
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            assert f"{option.opts[0]}" in text


def test_the_commands_are_in_groups_with_whole_sentences() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    assert [title for title in app.COMMANDS if f"\n{title}:\n" not in text] == []
    flat = " ".join(text.split())
    sentences = [" ".join(str(command.help).split("\n\n")[0].split()) for command in cli.commands.values()]
    assert [sentence for sentence in sentences if sentence.rstrip(".") not in flat] == []


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (name, option)
        for name, command in sorted(cli.commands.items())
        for option in command.params
        if isinstance(option, click.Option)
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_option_has_its_environment_variables(command: str, option: click.Option) -> None:
    long = max(option.opts, key=len).lstrip("-").replace("-", "_").upper()
    assert option.envvar == [f"PTBIN_{command.upper()}_{long}", f"PTBIN_{long}"]


@pytest.mark.parametrize(
    ("command", "variable", "value"),
    [
        ("convert", "PTBIN_WORKERS", "abc"),
        ("convert", "PTBIN_CONVERT_WORKERS", "0"),
        ("sync", "PTBIN_DEADLINE", "soon"),
        ("convert", "PTBIN_FORCE", "perhaps"),
        ("diff", "PTBIN_DIFF_RTOL", "small"),
        ("runs", "PTBIN_LAST", "many"),
        ("status", "PTBIN_LOG_LEVEL", "loud"),
        ("convert", "PTBIN_DEST_OPTIONS", "secret"),
    ],
)
def test_a_wrong_value_names_the_variable_that_it_came_from(
    command: str,
    variable: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert app.run([command, "in", "out"][: 2 if command == "runs" else 3]) == 2
    said = capsys.readouterr().err
    assert f"(from {variable})" in said
    assert (value in said) == (value != "secret")


def test_a_wrong_value_that_was_typed_names_no_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PTBIN_WORKERS", "4")
    assert app.run(["convert", "in", "out", "--workers", "abc"]) == 2
    assert "'--workers': 'abc' is not a valid whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--retry-failed", "nosuchrun", "in", "out"], ["in", "out", "--retry-failed", "x"]]
)
def test_a_word_behind_retry_failed_that_is_no_run_is_said_to_be_none(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["convert", *words]) == 2
    said = capsys.readouterr().err
    assert f"--retry-failed {words[words.index('--retry-failed') + 1]}: that is not the id of a run" in said
    assert "glob" not in said


def test_of_a_recipe_the_command_line_takes_a_file_and_python_its_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["convert", "in", "out", "--recipe", str(tmp_path / "none.json")]) == 2
    assert "is neither a file nor one of llama-meta" in capsys.readouterr().err
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"merge": [{"names": ".*", "how": "rows"}]}')
    assert app.run(["convert", str(tmp_path / "in.pt"), "x.bin", "--recipe", str(recipe)]) == 2
    assert "recipe" not in capsys.readouterr().err.replace(str(tmp_path), "")
    with pytest.raises(UsageError, match="nor a recipe in JSON; of a file, give the content"):
        ConvertOptions(recipe=str(recipe))


@pytest.mark.parametrize(
    ("words", "number", "wanted"),
    [
        ("ptbin con", 1, "plain,convert"),
        ("ptbin convert che", 2, "file,che"),
        ("ptbin convert checkpoints/ wei", 3, "file,wei"),
        ("ptbin convert --form", 2, "plain,--format"),
        ("ptbin convert --format saf", 3, "plain,safetensors"),
        ("ptbin verify wei", 2, "file,wei"),
        ("ptbin status a", 2, "file,a"),
        ("ptbin runs w", 2, "file,w"),
    ],
)
def test_a_shell_completes(
    words: str, number: int, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_PTBIN_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(number))
    app.run([])
    assert wanted in capsys.readouterr().out.splitlines()
