"""`ptbin diff`: which tensors of two checkpoints, outputs or manifests differ, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flows.cli.command import Shared, command
from flows.cli.printing import SHOWN_ROWS, align, section
from flows.parsing import build_options
from ptbin.errors import PtbinError, UsageError
from ptbin.options import ConvertOptions
from ptbin.runs.units import counted, format_nbytes
from ptbin.stores import public_uri
from ptbin.values.options import Option, options_of

if TYPE_CHECKING:
    from ptbin import Difference
    from ptbin.differences.values import SideFacts, TensorDifference, TensorFacts

EPILOG = """\b
Examples:
  ptbin diff run1/last.ckpt weights/last.bin
  ptbin diff old.bin.manifest.json new.bin.manifest.json
  ptbin diff s3://models/a.safetensors b.pt --rtol 1e-5 --atol 1e-8
  ptbin diff ddp.ckpt plain.pt --strip-prefix auto --json | jq .counts

A and B are files, indices of shards, folders that are one checkpoint, or manifests. Two manifests are
compared by their digests, and no weight is read. --source-options are for A, and for B as well where
there are no --dest-options.

Exit status: 0 equal; 1 different; 2 the call was wrong, or one of the two cannot be read."""


EQUAL = "What is equal"
_ENGINE = options_of(ConvertOptions)
OPTIONS = (
    replace(_ENGINE["select"], help="The state dict to take, on both sides."),
    replace(_ENGINE["select"], name="select_a", help="The same, of A alone."),
    replace(_ENGINE["select"], name="select_b", help="The same, of B alone."),
    replace(_ENGINE["flatten"], help="One state dict of nested ones, names joined by dots."),
    replace(_ENGINE["parts"], help="Compare one part of a checkpoint (a rank's file, a shard)."),
    replace(_ENGINE["strip_prefix"], help="Take P off all names; auto: module. and _orig_mod.", metavar="P"),
    replace(_ENGINE["rename"], help="Regex replacement on names."),
    replace(_ENGINE["drop"], help="Leave out names that match."),
    Option("rtol", "Equal is |A - B| <= ATOL + RTOL * |B|.", 0.0, "number", metavar="X", group=EQUAL),
    Option("atol", "See --rtol. Without both: equal bits.", 0.0, "number", metavar="X", group=EQUAL),
    Option("ignore_dtype", "Equal values of two types are equal.", False, "flag", group=EQUAL),
    Option("ignore_ties", "Which names share memory does not matter.", False, "flag", group=EQUAL),
    replace(
        _ENGINE["on_unsafe"],
        help="Pickles that can only be meant to run code: refuse, or compare the weights (running nothing).",
    ),
    Option("all", f"Print every row, not the first {SHOWN_ROWS} of each kind.", False, "flag"),
)


@command("diff", ("a", "b"), OPTIONS, EPILOG)
def diff_command(a: str, b: str, asked: dict[str, Any], shared: Shared) -> int:
    """Show which tensors of A and B differ, and how far."""
    import ptbin

    try:
        options_a, options_b = _options(asked)
        found = ptbin.diff(
            a,
            b,
            options=options_a,
            options_b=options_b,
            rtol=asked["rtol"],
            atol=asked["atol"],
            check_dtype=not asked["ignore_dtype"],
            check_ties=not asked["ignore_ties"],
            storage_options=shared.source_options,
            storage_options_b=shared.dest_options or None,
        )
    except PtbinError as error:
        return shared.refuse(error, 2, a=public_uri(a), b=public_uri(b))
    shared.answer(found.to_json, _lines(found, None if asked["all"] else SHOWN_ROWS))
    return 0 if found.equal else 1


def _options(asked: dict[str, Any]) -> tuple[ConvertOptions, ConvertOptions]:
    both = build_options(asked)
    if asked["select"] and (asked["select_a"] or asked["select_b"]):
        raise UsageError("--select is for both sides; give it, or --select-a and --select-b")
    return (
        both.replace(select=tuple(asked["select_a"]) or both.select),
        both.replace(select=tuple(asked["select_b"]) or both.select),
    )


def _lines(found: Difference, limit: int | None) -> Iterator[str]:
    close = [tensor for tensor in found.tensors if tensor.within_tolerance]
    sections: dict[str, list[tuple[str, ...]]] = {
        "only in A": [_only_row(tensor) for tensor in found.only_in_a],
        "only in B": [_only_row(tensor) for tensor in found.only_in_b],
        "different": [_tensor_row(tensor) for tensor in found.different],
        "within the tolerance": [_tensor_row(tensor) for tensor in close],
        "share memory only in A": [(" = ".join(names),) for names in found.ties_only_in_a],
        "share memory only in B": [(" = ".join(names),) for names in found.ties_only_in_b],
    }
    yield _verdict(found)
    yield from align([_side_row("A", found.a), _side_row("B", found.b)])
    yield f"  {_how(found)}"
    yield from (f"  note: {note}" for note in found.notes)
    for title, rows in sections.items():
        yield from section(title, rows, limit, "; --all or --json lists them all")


def _verdict(found: Difference) -> str:
    close = sum(tensor.within_tolerance for tensor in found.tensors)
    within = f", {close} of them within the tolerance" if close else ""
    common = counted(found.common, "tensor")
    if found.equal:
        ties = "; ties differ, which was not asked" if found.ties_differ else ""
        return f"equal: {common}{within}{ties}"
    parts = [
        f"{len(found.different)} of {common} differ" if found.different else "",
        f"{len(found.only_in_a)} only in A" if found.only_in_a else "",
        f"{len(found.only_in_b)} only in B" if found.only_in_b else "",
        "ties differ" if found.ties_differ and found.ties_count else "",
    ]
    if not found.different:
        parts.insert(0, f"{common} equal{within}" if found.common else "no name in common")
    return f"different: {', '.join(part for part in parts if part)}"


def _side_row(letter: str, side: SideFacts) -> tuple[str, ...]:
    return letter, side.uri, side.container, counted(side.tensors, "tensor"), format_nbytes(side.nbytes)


def _how(found: Difference) -> str:
    tolerance = f" with rtol {found.rtol:g} and atol {found.atol:g}" if found.rtol or found.atol else ""
    if not found.weight_bytes_read:
        return "compared by digests, names, shapes and types; no weight was read" + tolerance
    digests = f"{found.by_digest} by digests, " if found.by_digest else ""
    return f"compared {digests}by {format_nbytes(found.weight_bytes_read)} of weights{tolerance}"


def _only_row(tensor: TensorFacts) -> tuple[str, ...]:
    return tensor.name, tensor.dtype, _shape(tensor.shape)


def _tensor_row(tensor: TensorDifference) -> tuple[str, ...]:
    a, b, numbers = tensor.a, tensor.b, tensor.numbers
    dtype = a.dtype if a.dtype == b.dtype else f"{a.dtype} -> {b.dtype}"
    shape = _shape(a.shape) if a.shape == b.shape else f"{_shape(a.shape)} -> {_shape(b.shape)}"
    if numbers is None:
        return tensor.name, dtype, shape, ", ".join(tensor.what), "", "", ""
    where = f" at {list(numbers.index)}" if numbers.index else ""
    said = f"{numbers.different} of {numbers.elements} differ"
    if numbers.non_finite:
        said += f", {numbers.non_finite} of them infinite or NaN"
    if "quantizer" in tensor.what:
        said = f"quantizer, {said}"
    return (
        tensor.name,
        dtype,
        shape,
        f"max abs {_number(numbers.max_abs)}{where}",
        f"max rel {_number(numbers.max_rel)}",
        f"cosine {_number(numbers.cosine, digits=9)}",
        said,
    )


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
