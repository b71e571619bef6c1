"""What a caller may ask of a conversion, as frozen values.

`ConvertOptions` decides *what* the output is; its fingerprint goes into the manifest, so that a
rerun can tell whether an output was made with the same options. What only decides *how* the work is
done (proof level, force, storage options, workers) stays out of the fingerprint. `Limits` bounds the
memory and time that a hostile file may claim. No value here is ever a secret: storage options travel
next to the options, never inside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from ptbin.errors import UsageError
from ptbin.values.dtypes import CAST_NAMES
from ptbin.values.options import option
from ptbin.writing.formats import FORMATS, OutputFormat

Layout = Literal["mirror", "hf"]
Naming = Literal["replace", "append"]
OnUnsafe = Literal["reject", "extract"]
VerifyLevel = Literal["none", "checksum", "load"]
FileDigest = Literal["sha256", "none"]
Options = TypeVar("Options")

MIB = 1 << 20

FORM = "Form of the output"
WEIGHTS = "Which weights"
NAMES = "Names of tensors"
PROOF = "Proof and safety"
FILES = "Which files"
"""Headings of the options in a command's help."""


def refuse_text(**sequences: Any) -> None:
    """Raises UsageError where one text stands for a sequence of texts: it would be taken letter by letter."""
    for name, value in sequences.items():
        if isinstance(value, (str, bytes)):
            raise UsageError(f"{name}: {value!r} is one text, and a sequence is expected: [{value!r}]")


def given(options: Any, kind: type[Options]) -> Options:
    """The options of a call, or the default ones. Raises UsageError: something else stands in their place."""
    if options is None:
        return kind()
    if not isinstance(options, kind):
        hint = f": {kind.__name__}(**options)" if isinstance(options, dict) else ""
        raise UsageError(f"options: a {type(options).__name__}, and {kind.__name__} is expected{hint}")
    return options


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds on what one file may cost; units in the names."""

    pickle_nbytes: int = 512 * MIB
    """Longest pickle that is read into memory (a raw pickle holds its tensors inside)."""
    opcodes: int = 50_000_000
    members: int = 4_000_000
    """Entries in a zip directory."""
    directory_nbytes: int = 256 * MIB
    inflate_ratio: int = 1_100
    """Deflate cannot exceed 1032:1 (zlib FAQ); a member that claims more is a bomb or a lie."""
    inflated_member_nbytes: int = 64 * MIB
    """Largest deflated *index* member (pickle, code); deflated storages are streamed and not bound by it."""
    pickle_inflate_ratio: int = 100
    """A deflated pickle that grows by more is not a state dict's: those shrink about tenfold."""
    code_nbytes: int = 32 * MIB
    """All of a TorchScript archive's code together."""
    copied_nbytes: int = 256 * MIB
    """What all constructor calls of one pickle may copy (a call may name one large argument many times)."""
    expanded_nbytes: int = 1024 * MIB
    """Logical bytes beyond what is stored, of all expanded (stride 0) and overlapping tensors together."""
    tensors: int = 2_000_000
    tree_nodes: int = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What the output should be, and how far it is proven.

    Raises:
        UsageError: an unknown value, or a regular expression that does not compile.
    """

    format: OutputFormat = option(
        "torch",
        "; ".join(f"{name}: {row.help}" if row.help else name for name, row in FORMATS.items()) + ".",
        group=FORM,
    )
    dtype: str | None = option(
        None, "Cast floating-point tensors to this type, as torch does.", choices=CAST_NAMES, group=FORM
    )
    max_shard_size: int | None = option(
        None,
        "Cut larger outputs into shards of tensors with an index: 5GB, 500MiB, ...",
        kind="size",
        group=FORM,
    )
    tie_by_value: bool = option(False, "Store matrices that are equal bit for bit once, as tied.", group=FORM)
    recipe: str | None = option(
        None,
        "How parts make a whole, and other names and cuts: llama-hf, moe-fuse, ..., or JSON (docs/parts.md).",
        kind="recipe",
        metavar="NAME|FILE",
        group=WEIGHTS,
    )
    parts: bool = option(
        False, "Take one part of a checkpoint (a rank's file, a shard) as it is.", group=WEIGHTS
    )
    select: str | tuple[str, ...] | None = option(
        None,
        "The state dict to take, as `inspect` lists them; several: their union.",
        metavar="PATH",
        group=WEIGHTS,
    )
    flatten: bool = option(
        False, "Make one state dict of nested mappings, names joined by dots.", group=WEIGHTS
    )
    split: bool = option(False, "Give each state dict an output of its own: NAME.PATH.bin.", group=WEIGHTS)
    strip_prefix: str | None = option(
        None,
        "Take this off all names; auto: module. and _orig_mod., in any nesting.",
        metavar="PREFIX",
        group=NAMES,
    )
    rename: tuple[tuple[str, str], ...] = option(
        (),
        "Replace in names what a regular expression finds (re.sub), in order.",
        metavar="OLD=NEW",
        group=NAMES,
    )
    drop: tuple[str, ...] = option(
        (),
        "Leave out names in which one of these regular expressions is found.",
        metavar="REGEX",
        group=NAMES,
    )
    verify: VerifyLevel = option(
        "checksum",
        "Proof before an output counts: none, read it back, or also open it with torch (load).",
        group=PROOF,
    )
    on_unsafe: OnUnsafe = option(
        "reject",
        "Pickles that can only be meant to run code: reject, or extract the weights (running nothing).",
        group=PROOF,
    )
    file_digest: FileDigest = option(
        "sha256",
        "none: huge files proven by their tensors' digests, on all cores; not for sha256sum -c.",
        group=PROOF,
    )
    provenance: bool = option(
        False,
        "Write where it comes from next to each output (in-toto, SLSA); reads sources whole.",
        group=PROOF,
    )
    layout: Layout = option(
        "mirror",
        "hf: names that transformers looks for, configuration and tokenizer copied along.",
        group=FORM,
    )
    force: bool = option(
        False, "Do again what is up to date, and replace whatever lies at its place.", group=FILES
    )
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if isinstance(self.select, (list, tuple)):
            # One path is one path, however it was given: it fingerprints as it always did.
            paths = tuple(dict.fromkeys(self.select))
            object.__setattr__(self, "select", paths[0] if len(paths) == 1 else paths or None)
        kinds = (
            ("format", OutputFormat),
            ("layout", Layout),
            ("on_unsafe", OnUnsafe),
            ("verify", VerifyLevel),
            ("file_digest", FileDigest),
        )
        for name, kind in kinds:
            value = getattr(self, name)
            if value not in get_args(kind):
                raise UsageError(f"{name}: {value!r} is not one of {', '.join(get_args(kind))}")
        if self.dtype is not None and self.dtype not in CAST_NAMES:
            raise UsageError(f"dtype: {self.dtype!r} is not one of {', '.join(CAST_NAMES)}")
        if self.max_shard_size is not None and not (
            isinstance(self.max_shard_size, int) and self.max_shard_size > 0
        ):
            raise UsageError(f"max_shard_size: {self.max_shard_size!r} is not a positive number of bytes")
        if self.provenance and self.verify == "none":
            raise UsageError("provenance states digests of what is stored, which --verify none does not read")
        if self.layout == "hf" and self.format == "raw":
            raise UsageError("layout hf has no place for format raw, which transformers does not read")
        if self.recipe is not None:
            from ptbin.merging.shipped import find_recipe

            find_recipe(self.recipe)
        if self.split and self.flatten:
            raise UsageError("split gives each state dict an output of its own, flatten makes one of all")
        refuse_text(drop=self.drop, rename=self.rename)
        for pattern in (*self.drop, *(old for old, _ in self.rename)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error

    @property
    def selected_paths(self) -> tuple[str, ...]:
        """Paths that the caller named."""
        if self.select is None:
            return ()
        return (self.select,) if isinstance(self.select, str) else self.select

    def to_json(self) -> dict[str, Any]:
        """The options that shape the output, as the manifest records them.

        Those that came later are there only where they are set: outputs of before stay up to date.
        """
        later = {
            name: getattr(self, name)
            for name, default in (
                ("dtype", None),
                ("max_shard_size", None),
                ("layout", "mirror"),
                ("tie_by_value", False),
                ("recipe", None),
                ("parts", False),
                ("flatten", False),
                ("split", False),
            )
            if getattr(self, name) != default
        }
        return {
            "format": self.format,
            "select": list(self.select) if isinstance(self.select, tuple) else self.select,
            "strip_prefix": self.strip_prefix,
            "rename": [list(pair) for pair in self.rename],
            "drop": list(self.drop),
            "on_unsafe": self.on_unsafe,
            **later,
        }

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any], **others: Any) -> ConvertOptions:
        """The options a manifest records; `others` are the fields it does not."""
        fields = {**recorded, **others}
        fields.pop("restore", None)  # of the way back (`restoring`), which is not a conversion's
        fields["rename"] = tuple((old, new) for old, new in recorded["rename"])
        fields["drop"] = tuple(recorded["drop"])
        if isinstance(recorded.get("select"), list):
            fields["select"] = tuple(recorded["select"])
        return cls(**fields)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over `to_json()`: equal exactly where the same output is asked for."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def replace(self, **changes: Any) -> ConvertOptions:
        return dataclasses.replace(self, **changes)
