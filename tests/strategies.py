"""Hypothesis: state dicts, honest and odd archives around them, streams of pickle opcodes.

Owns how random input is drawn and shrunk; what must hold for it is the tests' business. Streams of
opcodes come in two kinds: any bytes at all, and opcodes with well-formed arguments in any order, which
get further into an interpreter.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import strategies as st

from tests.checkpoints.craft import Member, named, text
from tests.checkpoints.dtypes import PLAIN_DTYPES, random_bits

__all__ = ["archives", "mutations", "names", "opcode_streams", "state_dicts", "tensors"]

names = st.text(min_size=0, max_size=12) | st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,4}){0,3}", fullmatch=True)
"""Names of tensors: mostly as modules name them, sometimes anything. Surrogates cannot be pickled."""
names = names.filter(lambda name: not any("\ud800" <= char <= "\udfff" for char in name))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, up to 4 dimensions, contiguous or a view, a slice, a permutation, an expansion."""
    dtype = draw(st.sampled_from(PLAIN_DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    tensor = random_bits(dtype, shape, seed=draw(st.integers(0, 1000)))
    if tensor.dim() == 0:
        return tensor
    shapes = st.sampled_from(["as is", "slice", "permute", "expand", "step"])
    match draw(shapes):
        case "slice":
            start = draw(st.integers(0, shape[0]))
            return tensor[start : draw(st.integers(start, shape[0]))]
        case "permute":
            return tensor.permute(*draw(st.permutations(range(tensor.dim()))))
        case "expand":
            return tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *shape)
        case "step":
            return tensor[:: draw(st.integers(1, 3))]
    return tensor


@st.composite
def state_dicts(draw: st.DrawFn) -> OrderedDict[str, torch.Tensor]:
    """One to six tensors, some of them tied or views of one another's storage."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name in draw(st.lists(names, min_size=1, max_size=6, unique=True)):
        earlier = [tensor for tensor in state.values() if tensor.dim()]
        if earlier and draw(st.integers(0, 3)) == 0:
            shared = draw(st.sampled_from(earlier))
            state[name] = draw(st.sampled_from([shared, shared.detach(), shared[:1]]))
        else:
            state[name] = draw(tensors())
    return state


@st.composite
def archives(draw: st.DrawFn, members: list[Member]) -> dict[str, Any]:
    """Arguments for `craft.write_zip`: the same members in other framing, which must not matter."""
    align = draw(st.sampled_from([1, 4, 64, 512]))
    framed = [
        Member(
            member.name,
            member.data,
            deflate=draw(st.booleans()),
            align=align if "/data/" in member.name else 1,
            zip64=draw(st.booleans()),
        )
        for member in draw(st.permutations(members))
    ]
    return {"members": framed, "zip64": draw(st.booleans()), "tail": draw(st.binary(max_size=40))}


mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "delete", "insert", "cut"]),
        st.integers(0, 1 << 30),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
).map(lambda steps: lambda raw: _mutated(raw, steps))
"""Functions bytes -> bytes that damage a file in one to four places."""


def _mutated(raw: bytes, steps: list[tuple[str, int, int]]) -> bytes:
    data = bytearray(raw)
    for kind, place, value in steps:
        at = place % (len(data) + 1)
        if kind == "insert":
            data.insert(at, value)
        elif kind == "cut":
            del data[at:]
        elif at < len(data):
            if kind == "flip":
                data[at] ^= 1 << (value % 8)
            elif kind == "set":
                data[at] = value
            else:
                del data[at]
    return bytes(data)


_GLOBALS = [
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"),
    ("torch.storage", "_load_from_bytes"),
    ("builtins", "list"),
    ("copyreg", "_reconstructor"),
    ("numpy", "dtype"),
    ("somewhere.else", "Net"),
]

_opcodes = st.one_of(
    st.sampled_from(
        [bytes([code]) for code in b"().0123NRQ]abedlostu}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]
    ),
    st.integers(-3, 300).map(lambda value: b"J" + struct.pack("<l", value)),
    st.integers(0, 3).map(lambda index: b"q" + bytes([index])),
    st.integers(0, 3).map(lambda index: b"h" + bytes([index])),
    st.floats().map(lambda value: b"G" + struct.pack(">d", value)),
    st.sampled_from(["", "storage", "0", "cpu", "weight", "_parameters"]).map(text),
    st.binary(max_size=6).map(lambda raw: b"C" + bytes([len(raw)]) + raw),
    st.sampled_from(_GLOBALS).map(lambda pair: named(*pair)),
)

opcode_streams = st.one_of(
    st.binary(max_size=60),
    st.lists(_opcodes, max_size=40).map(lambda codes: b"\x80\x02" + b"".join(codes) + b"."),
)
"""Pickles that were never anybody's object."""
