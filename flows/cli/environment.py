"""Options from the environment: `PTBIN_<OPTION>` for all commands, `PTBIN_<COMMAND>_<OPTION>` for one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import click

from flows.environment import OF_DEPLOYMENTS, PREFIX, SETTINGS, unread_line


def read_environment(commands: Iterable[click.Command]) -> None:
    """Let each option have its value from a variable."""
    for command in commands:
        for option in command.params:
            if isinstance(option, click.Option) and option.envvar is None:
                long = max(option.opts, key=len).lstrip("-").replace("-", "_").upper()
                option.envvar = [f"PTBIN_{str(command.name).upper()}_{long}", f"PTBIN_{long}"]


def unread_variables(commands: Iterable[click.Command], environment: Iterable[str]) -> str:
    """A line about misspelled variables; empty where there is none."""
    known = {*SETTINGS, *OF_DEPLOYMENTS}
    names = [name for name in environment if name.upper().startswith(PREFIX) and name not in known]
    if not names:  # else every command has to be imported
        return ""
    for command in commands:
        for option in command.params:
            known.update(option.envvar or ())
    return unread_line(names, known)


def origin_of(commands: Mapping[str, click.Command], words: Sequence[str], message: str) -> str:
    """Which variables the options came from that `message` is about; empty where they stood in the call."""
    command = next((commands[word] for word in words if word in commands), None)
    names = []
    for option in command.params if command is not None else ():
        given = any(word.split("=")[0] in option.opts for word in words)
        spoken = any(name in message for name in (*option.opts, f"{option.name}:"))
        if isinstance(option, click.Option) and spoken and not given:
            names += [name for name in option.envvar or () if os.environ.get(name) and name not in message][
                :1
            ]
    names = [name for name in names if name not in message]  # as in "'--workers' (from PTBIN_WORKERS)"
    return f" (set by {', '.join(names)} in the environment)" if names else ""
