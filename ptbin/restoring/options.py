"""What a restored file should be: one frozen value, checked where it is made. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ptbin.errors import UsageError
from ptbin.options import NAMES, ConvertOptions, refuse_text
from ptbin.values.options import option, same_option

SaveAs = Literal["state-dict", "module", "torchscript", "exported"]

MODEL = "The model"
_UNRECORDED = ("force", "model_path")
_LATER = {"strip_prefix": None, "rename": (), "train": False}
"""Options that came later, with their defaults: recorded only where set, so that outputs stay up to date."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """What the restored file should be.

    Raises:
        UsageError: an unknown value, or one that needs a model where none is named.
    """

    model: str | None = option(
        None,
        "What builds the module; transformers: the architecture of config.json. Its code is run.",
        metavar="MODULE:CALLABLE",
        group=MODEL,
    )
    model_args: dict[str, Any] | list[Any] | None = option(
        None,
        "Arguments for it: a JSON object of keyword arguments, or an array of positional ones.",
        metavar="JSON",
        group=MODEL,
    )
    model_path: str | None = option(None, "The folder in which its module lies.", metavar="DIR", group=MODEL)
    save_as: SaveAs | None = option(
        None, "What to save; with --model a whole module unless said otherwise.", flag="--as", group=MODEL
    )
    example: str | None = option(
        None,
        "Returns example inputs: to trace and export with, and to compare outputs by.",
        metavar="MODULE:CALLABLE",
        group=MODEL,
    )
    train: bool = option(False, "Trace or export in training mode.", group=MODEL)
    allow_missing: tuple[str, ...] = option(
        (), "Names that the weights need not have.", metavar="GLOB", group=NAMES
    )
    allow_unexpected: tuple[str, ...] = option(
        (), "Names that the model need not have.", metavar="GLOB", group=NAMES
    )
    select: str | tuple[str, ...] | None = same_option(ConvertOptions, "select")
    strip_prefix: str | None = same_option(ConvertOptions, "strip_prefix")
    rename: tuple[tuple[str, str], ...] = same_option(ConvertOptions, "rename")
    force: bool = same_option(ConvertOptions, "force")

    def __post_init__(self) -> None:
        if self.save_as is not None and self.save_as not in get_args(SaveAs):
            raise UsageError(f"as: {self.save_as!r} is not one of {', '.join(get_args(SaveAs))}")
        if self.model is None and self.save_as not in (None, "state-dict"):
            raise UsageError(f"--as {self.save_as} needs --model: only code can say what the module is")
        if self.model is not None and self.model != "transformers" and ":" not in self.model:
            raise UsageError(f"model: {self.model!r} is not of the form MODULE:CALLABLE")
        if self.train and self.form not in {"torchscript", "exported"}:
            raise UsageError("--train is for --as torchscript and --as exported: a module keeps its own mode")
        refuse_text(allow_missing=self.allow_missing, allow_unexpected=self.allow_unexpected)
        # Its own checks; one path is one path, however it was given.
        object.__setattr__(self, "select", self.conversion().select)

    @property
    def form(self) -> SaveAs:
        return self.save_as or ("state-dict" if self.model is None else "module")

    def to_json(self) -> dict[str, Any]:
        """What shapes the output, as the manifest records it next to a conversion's options."""
        recorded = {key: value for key, value in asdict(self).items() if key not in _UNRECORDED}
        recorded = {
            key: value for key, value in recorded.items() if key not in _LATER or value != _LATER[key]
        }
        return recorded | {"save_as": self.form}

    def conversion(self) -> ConvertOptions:
        """The options of the conversion that restoring begins with."""
        return ConvertOptions(
            select=self.select, strip_prefix=self.strip_prefix, rename=self.rename, force=self.force
        )

    def fingerprint(self) -> str:
        if self.model is None:
            return self.conversion().fingerprint()
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), default=list)
        return hashlib.sha256(text.encode()).hexdigest()
