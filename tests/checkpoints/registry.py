"""One named factory per kind of checkpoint, and what a converter must make of it.

Owns the register itself; knows nothing of torch, files or formats. See the package's docstring.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["FACTORIES", "Checkpoint", "Factory", "MadeOnce", "checkpoint", "factories"]


@dataclass(frozen=True)
class Checkpoint:
    """A file that a factory made.

    Attributes:
        path: the file.
        expected: name -> tensor that the output must hold, bit for bit; None where no weights can be
            had. A refused file may still have them: they are what `--on-unsafe extract` must give.
        reason: stable reason code of the refusal; None where the file must be converted.
        values: plain values of the state dict that must stay in the output beside the tensors.
        left_out: names in the state dict that must not be in the output.
        options: `ConvertOptions` fields that the conversion needs, `select` for one.
        canary: a path that exists as soon as anybody unpickles the file (hostile files only).
    """

    path: Path
    expected: Mapping[str, torch.Tensor] | None = None
    reason: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    canary: Path | None = None


@dataclass(frozen=True)
class Factory:
    """`make(folder)` writes `<folder>/<name><suffix>` and says what it is.

    Attributes:
        reason: as in `Checkpoint`, known without making the file, so that tests can select by it.
        torch_reads: how torch itself reads the file back: "weights_only", "pickle" (only with
            `weights_only=False`; nobody should, our tests do it for files that they made) or None.
        slow: writes or hashes gigabytes.
        thorough: imports another project whole, for seconds; so do the tests on it.
    """

    name: str
    suffix: str
    room: str
    reason: str | None
    torch_reads: str | None
    slow: bool
    thorough: bool
    build: Callable[[Path], Checkpoint]

    def make(self, folder: Path) -> Checkpoint:
        """Write the file into `folder`, which must exist."""
        with warnings.catch_warnings():
            # What torch and Lightning say while they write old or quantized things is not our test.
            warnings.simplefilter("ignore")
            made = self.build(folder / f"{self.name}{self.suffix}")
        if made.reason != self.reason:
            raise AssertionError(f"{self.name}: made {made.reason!r}, registered {self.reason!r}")
        return made

    def __str__(self) -> str:
        return self.name


FACTORIES: dict[str, Factory] = {}

MadeOnce = Callable[[Factory], Checkpoint]
"""The fixture `made_once`."""


def checkpoint(
    *,
    suffix: str = ".pt",
    reason: str | None = None,
    torch_reads: str | None = "weights_only",
    slow: bool = False,
    thorough: bool = False,
    name: str | None = None,
) -> Callable[[Callable[[Path], Checkpoint]], Callable[[Path], Checkpoint]]:
    """Register a function `(path) -> Checkpoint` under its own name, or under `name`."""

    def register(build: Callable[[Path], Checkpoint]) -> Callable[[Path], Checkpoint]:
        key = name or build.__name__
        if key in FACTORIES:
            raise AssertionError(f"two factories named {key}")
        room = build.__module__.rpartition(".")[2]
        reads = torch_reads if reason is None else None
        FACTORIES[key] = Factory(key, suffix, room, reason, reads, slow, thorough, build)
        return build

    return register


def factories(
    *, room: str | None = None, refused: bool | None = None, slow: bool | None = False
) -> list[Factory]:
    """Factories to parametrize over; None leaves a question open."""
    return [
        factory
        for factory in FACTORIES.values()
        if (room is None or factory.room == room)
        and (refused is None or (factory.reason is not None) == refused)
        and (slow is None or factory.slow == slow)
    ]
