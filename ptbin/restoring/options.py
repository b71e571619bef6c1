"""What a restored file should be: one frozen value, checked where it is made. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ptbin.errors import UsageError
from ptbin.options import ConvertOptions

__all__ = ["RestoreOptions", "SaveAs"]

SaveAs = Literal["state-dict", "module", "torchscript", "exported"]

_UNRECORDED = ("force", "model_path")
_LATER = {"strip_prefix": None, "rename": (), "train": False}
"""Options that came later, with their defaults: recorded only where set, so that outputs stay up to date."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """What the restored file should be.

    Raises:
        UsageError: an unknown value, or one that needs a model where none is named.
    """

    model: str | None = None
    """`MODULE:CALLABLE` that builds the module, or `transformers`: the architecture of config.json."""
    model_args: dict[str, Any] | list[Any] | None = None
    """Keyword arguments, or positional ones."""
    model_path: str | None = None
    """Folder where the child processes look first for the module, and it for its neighbours."""
    save_as: SaveAs | None = None
    """None: `module` where a model is named, else `state-dict`."""
    example: str | None = None
    """`MODULE:CALLABLE` that returns inputs: to trace and export with, and to compare outputs by."""
    train: bool = False
    """Trace or export in training mode, not in evaluation mode."""
    allow_missing: tuple[str, ...] = ()
    """Globs of names that the weights need not have."""
    allow_unexpected: tuple[str, ...] = ()
    """Globs of names that the model need not have."""
    select: str | tuple[str, ...] | None = None
    """As `ConvertOptions` has it; `strip_prefix` and `rename` too."""
    strip_prefix: str | None = None
    rename: tuple[tuple[str, str], ...] = ()
    force: bool = field(default=False)
    """Restore even what is up to date, and replace whatever lies at DEST."""

    def __post_init__(self) -> None:
        if self.save_as is not None and self.save_as not in get_args(SaveAs):
            raise UsageError(f"as: {self.save_as!r} is not one of {', '.join(get_args(SaveAs))}")
        if self.model is None and self.save_as not in (None, "state-dict"):
            raise UsageError(f"--as {self.save_as} needs --model: only code can say what the module is")
        if self.model is not None and self.model != "transformers" and ":" not in self.model:
            raise UsageError(f"model: {self.model!r} is not of the form MODULE:CALLABLE")
        if self.train and self.form not in {"torchscript", "exported"}:
            raise UsageError("--train is for --as torchscript and --as exported: a module keeps its own mode")
        # Its own checks; one path is one path, however it was given.
        object.__setattr__(self, "select", self.conversion().select)

    @property
    def form(self) -> SaveAs:
        return self.save_as or ("state-dict" if self.model is None else "module")

    def to_json(self) -> dict[str, Any]:
        """What shapes the output, as the manifest records it beside a conversion's options."""
        recorded = {key: value for key, value in asdict(self).items() if key not in _UNRECORDED}
        recorded = {
            key: value for key, value in recorded.items() if key not in _LATER or value != _LATER[key]
        }
        return recorded | {"save_as": self.form}

    def conversion(self) -> ConvertOptions:
        """What is taken out of the source, whatever becomes of it."""
        return ConvertOptions(
            select=self.select, strip_prefix=self.strip_prefix, rename=self.rename, force=self.force
        )

    def fingerprint(self) -> str:
        if self.model is None:
            return self.conversion().fingerprint()
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), default=list)
        return hashlib.sha256(text.encode()).hexdigest()
