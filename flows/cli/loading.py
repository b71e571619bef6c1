"""The commands by name, each imported when it is asked for: to call one costs the start of that one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from importlib import import_module

import click

from flows.cli.environment import read_environment


class LoadedCommands(MutableMapping[str, click.Command]):
    """What click takes for the commands of a group; `flows.cli.<name>_command` has the one called `name`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._made: dict[str, click.Command | None] = dict.fromkeys(names)

    def __getitem__(self, name: str) -> click.Command:
        made = self._made[name]
        if made is None:
            word = f"{name}_command"
            made = self._made[name] = getattr(import_module(f"flows.cli.{word}"), word)
            read_environment([made])
        return made

    def __contains__(self, name: object) -> bool:
        return name in self._made

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
