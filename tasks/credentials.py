"""Where storage options come from, so that none of them is ever a parameter that Prefect stores and shows.

A deployment names where they lie: `block:NAME`, a Prefect Secret block; `block:KIND/NAME`, a block of another
kind (`tasks.credential_blocks`); `env:NAME`, a variable of the worker's environment. Secrets and variables
hold one JSON object. The reference is visible, what it refers to is not. The command line has them by value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptbin.errors import UsageError


@dataclass(frozen=True, slots=True)
class Credentials:
    """Storage options on their way to a task in another process: a reference if there is one, else values.

    A reference is looked up where the task runs. Values go over the runner's own connection, which is why
    runs on other machines are better given references (deployments/README.md). `repr` shows neither.
    """

    reference: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def to_send(cls, reference: str | None, options: Mapping[str, Any]) -> Credentials:
        return cls(reference) if reference is not None else cls(None, dict(options))

    def load(self) -> dict[str, Any]:
        """Raises UsageError where the reference leads nowhere from here."""
        return load_options(self.reference) if self.reference is not None else dict(self.options)


def load_options(reference: str | None) -> dict[str, Any]:
    """The options that `block:NAME`, `block:KIND/NAME` or `env:NAME` refers to; None: no options.

    Raises:
        UsageError: another form, nothing of that name, or not a JSON object. Never quotes what it found.
    """
    if reference is None:
        return {}
    kind, _, name = reference.partition(":")
    if kind == "env" and name:
        value: Any = os.environ.get(name)
        if value is None:
            raise UsageError(f"storage options: no environment variable {name} on this worker")
    elif kind == "block" and name:
        from tasks.credential_blocks import read_block  # here, because few runs have any

        slug, _, block_name = name.rpartition("/")
        value = read_block(slug or "secret", block_name)
    else:
        # Not quoted: it may be the options themselves, which would be stored with the parameters.
        raise UsageError(
            "storage options of a flow run are given as block:NAME or env:NAME, or as block:KIND/NAME, "
            "never by value"
        )
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise UsageError(f"storage options: {reference} does not hold a JSON object")
    return value
