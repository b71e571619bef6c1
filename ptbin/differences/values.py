"""What a comparison found, as frozen values. Pure data.

A is the first of the two, B the second; relative differences are relative to B, as numpy and torch.testing
have it (B is what was expected).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SideFacts:
    """One of the two.

    Attributes:
        container: as `inspect` names it; `manifest` where a manifest was given.
        tensors: how many tensors it has, under the names that were compared.
        nbytes: logical bytes of all of them, each name counted.
        digests: how many of them a manifest states a SHA-256 of.
    """

    uri: str
    container: str
    tensors: int
    nbytes: int
    digests: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Name, element type (torch's name) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """How the elements of two tensors of one shape differ.

    Differences are taken in float64, between integers exactly. Of quantized tensors the stored integers are
    compared; of complex ones a difference is its modulus. Pairs with a NaN or an infinity on either side are
    left to `non_finite`: the numbers below are of the finite pairs.

    Attributes:
        elements: elements of each. Of types that pack several elements in a byte, stored bytes.
        different: elements that differ in any bit; in value, where the types differ.
        beyond_tolerance: those of them that are not close enough.
        non_finite: those of them where one side is infinite or NaN.
        max_abs: largest |a - b|; None where the type has no numbers or no pair is finite.
        max_rel: largest |a - b| / |b| over the elements where b is not 0; None where all are 0.
        index: of the largest |a - b|; None where nothing differs in value.
        cosine: cosine of the angle between the two, flattened; None where one of them is all zeros.
    """

    elements: int
    different: int
    beyond_tolerance: int
    non_finite: int
    max_abs: float | None
    max_rel: float | None
    index: tuple[int, ...] | None
    cosine: float | None

    def to_json(self) -> dict[str, Any]:
        finite = {"max_abs": _json_number(self.max_abs), "max_rel": _json_number(self.max_rel)}
        return asdict(self) | finite | {"index": None if self.index is None else list(self.index)}


def _json_number(value: float | None) -> float | None:
    """JSON has neither infinities nor NaN."""
    return value if value is None or isinstance(value, int) or math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A tensor that both sides have and that is not the same.

    Attributes:
        what: of `shape`, `dtype`, `quantizer` (scale, zero point, scheme, axis), `bytes` (types agree and a
            bit differs), `values` (types differ, and so does an element).
        numbers: how the elements differ; None where shapes differ, or where digests alone decided.
        within_tolerance: it counts as equal, by the tolerance that was asked for.
    """

    name: str
    what: tuple[str, ...]
    a: TensorFacts
    b: TensorFacts
    numbers: Numbers | None = None
    within_tolerance: bool = False

    def to_json(self) -> dict[str, Any]:
        sides = {
            key: {"dtype": side.dtype, "shape": list(side.shape)}
            for key, side in (("a", self.a), ("b", self.b))
        }
        numbers = None if self.numbers is None else self.numbers.to_json()
        return asdict(self) | sides | {"what": list(self.what), "numbers": numbers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What `ptbin.diff` found.

    Attributes:
        common: tensors that both have.
        only_in_a, only_in_b: tensors that the other one lacks.
        tensors: those of both that are not the same: shapes and types first, then the largest differences.
        ties_only_in_a, ties_only_in_b: groups of names that share memory here, and not so in the other one;
            only names that both have.
        ties_count: whether ties that differ make the two different.
        by_digest: tensors that the digests of manifests decided; of the others weights were read.
        weight_bytes_read: bytes of weights that were read, of both sides together.
        notes: what else a reader should know: the option that would make names meet, say.
    """

    a: SideFacts
    b: SideFacts
    common: int
    only_in_a: tuple[TensorFacts, ...]
    only_in_b: tuple[TensorFacts, ...]
    tensors: tuple[TensorDifference, ...]
    ties_only_in_a: tuple[tuple[str, ...], ...]
    ties_only_in_b: tuple[tuple[str, ...], ...]
    ties_count: bool
    rtol: float
    atol: float
    by_digest: int
    weight_bytes_read: int
    notes: tuple[str, ...] = ()

    @property
    def different(self) -> tuple[TensorDifference, ...]:
        """The tensors that count as different: not those within the tolerance."""
        return tuple(tensor for tensor in self.tensors if not tensor.within_tolerance)

    @property
    def ties_differ(self) -> bool:
        return bool(self.ties_only_in_a or self.ties_only_in_b)

    @property
    def equal(self) -> bool:
        """Nothing differs: names, shapes, types, bits (or values within the tolerance), ties."""
        return not (
            self.only_in_a or self.only_in_b or self.different or (self.ties_count and self.ties_differ)
        )

    def to_json(self) -> dict[str, Any]:
        """As `ptbin diff --json` prints it."""
        different = len(self.different)
        return {
            "equal": self.equal,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "counts": {
                "common": self.common,
                "equal": self.common - len(self.tensors),
                "within_tolerance": len(self.tensors) - different,
                "different": different,
                "only_in_a": len(self.only_in_a),
                "only_in_b": len(self.only_in_b),
            },
            "only_in_a": [tensor.to_json() for tensor in self.only_in_a],
            "only_in_b": [tensor.to_json() for tensor in self.only_in_b],
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "ties_only_in_a": [list(names) for names in self.ties_only_in_a],
            "ties_only_in_b": [list(names) for names in self.ties_only_in_b],
            "ties_count": self.ties_count,
            "tolerance": {"rtol": self.rtol, "atol": self.atol},
            "by_digest": self.by_digest,
            "weight_bytes_read": self.weight_bytes_read,
            "notes": list(self.notes),
        }
