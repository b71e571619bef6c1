"""`ptbin.diff`: which tensors of two checkpoints, outputs or manifests differ, and how.

Names, shapes and types are compared first. Of a pair that agrees in them, two digests decide where both sides
have one; where one side has, the other one's bytes are hashed; else the bytes themselves are compared. How
far two tensors are apart is computed only of those that differ, and not where both are known by their
digests alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from ptbin.differences.manifest_side import ManifestSide, is_manifest
from ptbin.differences.numbers import Tolerance, has_numbers
from ptbin.differences.sides import CheckpointSide, Side, SideTensor
from ptbin.differences.values import Difference, Numbers, SideFacts, TensorDifference, TensorFacts
from ptbin.differences.weights import Pair, Readers, compare_pairs, hash_views
from ptbin.errors import UsageError
from ptbin.options import ConvertOptions, given
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.keys import without_wrappers
from ptbin.reading.pickle.gc_pause import gc_paused
from ptbin.stores import Place, Where, place_of

Progress = Callable[[int], None]


def diff(
    a: Where,
    b: Where,
    *,
    options: ConvertOptions | None = None,
    options_b: ConvertOptions | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    check_dtype: bool = True,
    check_ties: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    storage_options_b: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Compare two checkpoints, outputs or manifests, of any containers and in any stores.

    Tensors are equal by bits: NaNs with other payloads differ, and so do 0.0 and -0.0 (with a largest
    difference of 0). Values that are not tensors are not compared. Memory does not grow with the files.

    Args:
        a: a file, an index of shards, a folder that is one checkpoint, or a manifest (`*.json`).
        b: the same.
        options: what is taken of a checkpoint and how its names are changed before they are compared:
            `select`, `flatten`, `strip_prefix`, `rename`, `drop`, `parts`, `on_unsafe`, `limits`. The others
            have no effect here.
        options_b: those of `b`, if they differ.
        rtol: |a - b| <= atol + rtol * |b| counts as equal (`torch.isclose`); then NaNs equal NaNs.
        atol: see `rtol`. Without both: equal bits.
        check_dtype: whether tensors with equal values of two types differ.
        check_ties: whether names that share memory on one side only make the two different.
        storage_options: fsspec storage options for `a`, and for `b` unless `storage_options_b` is given.
        progress: called with bytes compared; may be called by several threads.

    Returns:
        A `Difference`; its `equal` is true where nothing differs.

    Raises:
        UsageError: the call is wrong. CheckpointError: one of the two cannot be read, is damaged, unsafe,
            or has no single state dict. VerificationError: a manifest is not one. StorageError: from a store.
    """
    if not all(math.isfinite(value) and value >= 0 for value in (rtol, atol)):
        raise UsageError(f"rtol {rtol} and atol {atol} must be finite and not negative")
    options = given(options, ConvertOptions)
    if storage_options_b is None and not isinstance(b, Place):
        storage_options_b = storage_options
    with ExitStack() as stack:
        with gc_paused():
            side_a = _open(place_of(a, storage_options), options)
            stack.callback(side_a.close)
            side_b = _open(place_of(b, storage_options_b), options_b or options)
            stack.callback(side_b.close)
            comparison = _Comparison(side_a, side_b, Tolerance(rtol, atol), check_dtype, progress)
            comparison.classify()
        comparison.compare()
        with gc_paused():
            return comparison.result(check_ties=check_ties)


def _open(place: Place, options: ConvertOptions) -> Side:
    if is_manifest(place.name):
        return ManifestSide(place, options)
    return CheckpointSide(place, options)


class _Comparison:
    """Two open sides, and what was found so far."""

    def __init__(
        self, a: Side, b: Side, tolerance: Tolerance, check_dtype: bool, progress: Progress | None
    ) -> None:
        self.a, self.b = a, b
        self.tolerance = tolerance
        self.check_dtype = check_dtype
        self.progress = progress
        self.by_digest = 0
        self.common: list[str] = []
        self.to_hash: tuple[list[str], list[str]] = ([], [])
        self.to_read: list[str] = []
        self.found: dict[str, TensorDifference] = {}
        self.notes: list[str] = []
        self.readers = Readers(a, b)

    def classify(self) -> None:
        """Decide what names, shapes, types and digests decide; note what else has to be read."""
        for name, a in self.a.tensors.items():
            b = self.b.tensors.get(name)
            if b is None:
                continue
            self.common.append(name)
            if a.shape != b.shape:
                self._add(name)
            elif a.dtype is not b.dtype:
                readable = has_numbers(a.dtype) and has_numbers(b.dtype)
                if readable and (not self.check_dtype or self.tolerance or not (a.sha256 and b.sha256)):
                    self.to_read.append(name)
                else:
                    self._add(name)
            elif a.flags != b.flags or not (a.sha256 or b.sha256):
                self.to_read.append(name)
            elif a.sha256 and b.sha256:
                self.by_digest += 1
                self._decide(name, same=a.sha256 == b.sha256, numbers=bool(self.tolerance))
            else:
                self.to_hash[1 if a.sha256 else 0].append(name)

    def compare(self) -> None:
        """Read what has to be read.

        Raises:
            CheckpointError: what is read is damaged. StorageError: from the stores.
        """
        try:
            with as_checkpoint_errors(f"{self.a.uri} or {self.b.uri}"):
                self._hash(0, self.a, self.b)
                self._hash(1, self.b, self.a)
                self._read()
            self.readers.check_unchanged()
        finally:
            self.readers.close()

    def result(self, *, check_ties: bool) -> Difference:
        """What was found."""
        a, b = self.a.tensors, self.b.tensors
        ties_a, ties_b = (_among(side.ties, set(self.common)) for side in (self.a, self.b))
        return Difference(
            a=_facts(self.a),
            b=_facts(self.b),
            common=len(self.common),
            only_in_a=tuple(_tensor_facts(name, tensor) for name, tensor in a.items() if name not in b),
            only_in_b=tuple(_tensor_facts(name, tensor) for name, tensor in b.items() if name not in a),
            tensors=tuple(sorted(self.found.values(), key=_largest_first)),
            ties_only_in_a=tuple(sorted(ties_a - ties_b)),
            ties_only_in_b=tuple(sorted(ties_b - ties_a)),
            ties_count=check_ties,
            rtol=self.tolerance.rtol,
            atol=self.tolerance.atol,
            by_digest=self.by_digest,
            weight_bytes_read=self.readers.bytes_read,
            notes=(*self.notes, *_name_notes(list(a), list(b), len(self.common))),
        )

    def _hash(self, number: int, side: Side, other: Side) -> None:
        """Tensors of `side` by the digests that `other` has of them."""
        names = self.to_hash[number]
        views = {side.tensors[name].key: side.view(name) for name in names}
        digests = hash_views(list(views.values()), self.readers, number, self.progress)
        by_key = dict(zip(views, digests, strict=True))
        for name in names:
            same = by_key[side.tensors[name].key] == other.tensors[name].sha256
            self._decide(name, same=same, numbers=True)

    def _decide(self, name: str, *, same: bool, numbers: bool) -> None:
        """By digests; where they differ and `numbers` are wanted, the weights are read."""
        if same or not numbers:
            self._add(name, () if same else ("bytes",))
        else:
            self.to_read.append(name)

    def _read(self) -> None:
        names = self.to_read
        needed = [name for name in names if self._is_needed(name)]
        explaining = set(names) - set(needed)
        for side in (self.a, self.b):
            if explaining and isinstance(side, ManifestSide) and not side.has_weights():
                # digests have decided; only how far they are apart cannot be said
                self.notes.append(f"the outputs of {side.uri} are not there: no numbers of what differs")
                for name in explaining:
                    self._add(name, () if self._types_differ(name) else ("bytes",))
                names, explaining = needed, set()
        pairs: dict[Any, Pair] = {}
        chosen: dict[str, Pair] = {}
        for name in names:
            key = (self.a.tensors[name].key, self.b.tensors[name].key)
            if key not in pairs:
                pairs[key] = Pair(self.a.view(name), self.b.view(name))
            chosen[name] = pairs[key]
        compare_pairs(list(pairs.values()), self.readers, self.tolerance, self.progress)
        for name, pair in chosen.items():
            if not pair.differs:
                self._add(name)
                continue
            tally = pair.tally()
            elements = pair.a.numel if has_numbers(pair.a.dtype) else pair.a.nbytes // pair.a.dtype.itemsize
            changed = ("values" if self._types_differ(name) else "bytes",) if tally.different else ()
            self._add(name, changed, tally.numbers(elements, pair.a.shape))

    def _is_needed(self, name: str) -> bool:
        """Whether the verdict depends on the bytes; else they only explain it."""
        a, b = self.a.tensors[name], self.b.tensors[name]
        if self.tolerance or a.flags != b.flags:
            return True
        if self._types_differ(name):
            return not self.check_dtype
        return not (a.sha256 or b.sha256)

    def _types_differ(self, name: str) -> bool:
        return self.a.tensors[name].dtype is not self.b.tensors[name].dtype

    def _add(self, name: str, changed: tuple[str, ...] = (), numbers: Numbers | None = None) -> None:
        """Note what of a tensor differs, if anything does."""
        a, b = self.a.tensors[name], self.b.tensors[name]
        what = []
        if a.shape != b.shape:
            what.append("shape")
        if a.dtype is not b.dtype:
            what.append("dtype")
        if repr(a.quantizer) != repr(b.quantizer):  # by repr: a scale may be NaN
            what.append("quantizer")
        what += changed
        if not what:
            return
        ignored = {"dtype"} if not self.check_dtype and numbers is not None else set()
        if numbers is not None and not numbers.beyond_tolerance:
            ignored |= {"bytes", "values"}
        self.found[name] = TensorDifference(
            name=name,
            what=tuple(what),
            a=_tensor_facts(name, a),
            b=_tensor_facts(name, b),
            numbers=numbers,
            within_tolerance=set(what) <= ignored,
        )


def _facts(side: Side) -> SideFacts:
    tensors = side.tensors.values()
    return SideFacts(
        side.uri,
        side.container,
        len(side.tensors),
        sum(tensor.nbytes for tensor in tensors),
        sum(tensor.sha256 is not None for tensor in tensors),
    )


def _tensor_facts(name: str, tensor: SideTensor) -> TensorFacts:
    return TensorFacts(name, tensor.dtype.name, tensor.shape)


def _largest_first(tensor: TensorDifference) -> tuple[Any, ...]:
    numbers = tensor.numbers
    structure = 0 if {"shape", "dtype", "quantizer"} & set(tensor.what) else 1
    apart = -1.0 if numbers is None or numbers.max_abs is None else float(numbers.max_abs)
    non_finite = 0 if numbers is None else numbers.non_finite
    return (tensor.within_tolerance, structure, non_finite == 0, -apart, tensor.name)


def _among(groups: list[tuple[str, ...]], names: set[str]) -> set[tuple[str, ...]]:
    """The groups, of these names only."""
    kept = (tuple(sorted(name for name in group if name in names)) for group in groups)
    return {group for group in kept if len(group) > 1}


def _name_notes(a: list[str], b: list[str], common: int) -> list[str]:
    """The option under which more names would match."""
    if common == len(a) or common == len(b):
        return []
    best, advice = common, ""
    met = len(set(without_wrappers(a)) & set(without_wrappers(b)))
    if met > best:
        best, advice = met, "--strip-prefix auto"
    for names, others in ((a, set(b)), (b, set(a))):
        parts = names[0].split(".")
        for depth in range(1, min(len(parts), 4)):
            prefix = ".".join(parts[:depth]) + "."
            met = sum(name.removeprefix(prefix) in others for name in names)
            if met > best:
                best, advice = met, f"--strip-prefix {prefix}"
    return [f"{best} names would match with {advice}"] if advice else []
