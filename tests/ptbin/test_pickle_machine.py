"""The symbolic interpreter against CPython's own unpickler, and against streams made to hurt."""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptbin.errors import CorruptArchiveError, LimitExceededError, PtbinError
from ptbin.options import Limits
from ptbin.reading.pickle.interpreter import run_pickle
from ptbin.reading.pickle.machine import PickleTruncatedError
from ptbin.values.nodes import DictNode, Global, Instance, SetNode, iter_nodes
from tests.strategies import opcode_streams


def run(data: bytes, **options: Any) -> Any:
    return run_pickle(data, reducers={}, **options).root


def plain(node: Any) -> Any:
    """Records back to Python values, for comparison; only for values without classes."""
    if isinstance(node, DictNode):
        return {plain(k): plain(v) for k, v in node.pairs}
    if isinstance(node, SetNode):
        items = [plain(item) for item in node.items]
        return frozenset(items) if node.frozen else set(items)
    if isinstance(node, list):
        return [plain(item) for item in node]
    if isinstance(node, tuple):
        return tuple(plain(item) for item in node)
    return node


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 200), 1 << 200)
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300)
)
hashable = st.recursive(scalars, lambda inner: st.tuples(inner, inner), max_leaves=4)
values = st.recursive(
    scalars | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(hashable, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=values, protocol=st.integers(3, 5))
def test_plain_values_come_out_as_cpython_reads_them(value: Any, protocol: int) -> None:
    assert plain(run(pickle.dumps(value, protocol))) == value
    assert plain(run(pickletools.optimize(pickle.dumps(value, protocol)))) == value


@settings(max_examples=200, deadline=None)
@given(
    value=st.recursive(
        scalars, lambda inner: st.lists(inner) | st.dictionaries(scalars, inner), max_leaves=8
    ),
    protocol=st.integers(0, 2),
)
def test_old_protocols_too(value: Any, protocol: int) -> None:
    assert plain(run(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", range(3, 6))
def test_sets_bytes_and_shared_parts(protocol: int) -> None:
    shared = [1, 2]
    value = {"set": {1, 2}, "frozen": frozenset({3}), "bytes": b"\x00\xff", "a": shared, "b": shared}
    out = run_pickle(pickle.dumps(value, protocol), reducers={}).root
    assert out.get("a") is out.get("b")
    assert out.get("bytes") == b"\x00\xff"
    if protocol >= 4:
        assert plain(out) == value


def test_every_opcode_of_pickletools_is_known() -> None:
    from ptbin.reading.pickle.opcodes import DISPATCH

    known = {chr(code) for code, handler in enumerate(DISPATCH) if handler is not None} | {"."}
    assert known == {opcode.code for opcode in pickletools.opcodes}


# One stream for each opcode that can end in a call, a class, or a change of state.
CALLS = {
    "REDUCE": b"cos\nsystem\n(S'true'\ntR.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truet\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n(\x8c\x04truet}\x92.",
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'true'\no.",
    "OBJ then POP": b"(cos\nsystem\nS'true'\no0N.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "STACK_GLOBAL of memoised strings": (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x04true\x85R."
    ),
    "BUILD": b"cos\nsystem\n)\x81}S'x'\nS'y'\nsb.",
}


@pytest.mark.parametrize("stream", CALLS.values(), ids=CALLS.keys())
def test_what_a_call_names_is_recorded_and_nothing_is_imported(stream: bytes) -> None:
    before = set(sys.modules)
    program = run_pickle(stream, reducers={})
    assert ("os", "system") in program.globals
    assert set(sys.modules) == before


@settings(max_examples=400, deadline=None)
@given(stream=opcode_streams)
def test_any_stream_ends_in_a_record_or_in_one_clear_error(stream: bytes) -> None:
    try:
        program = run_pickle(stream, reducers={}, limits=Limits(opcodes=10_000))
    except PtbinError:
        return
    assert 0 < program.end <= len(stream)
    sum(1 for _ in iter_nodes(program.root))


def test_every_truncation_asks_for_more_bytes() -> None:
    data = pickle.dumps({"name": [1.5, "text", b"bytes", (None, True)], 2: {"deep": {"er": 1 << 90}}}, 4)
    for length in range(len(data)):
        with pytest.raises(PickleTruncatedError):
            run(data[:length])


@pytest.mark.thorough
def test_a_million_opcodes_end_before_the_test_s_limit() -> None:
    """They take two seconds. Were each to look at all before it, they would take days."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer, 2).dump([{"name": str(i), "value": i} for i in range(120_000)])
    program = run_pickle(buffer.getvalue(), reducers={})
    assert program.opcodes > 1_000_000


def test_a_tuple_graph_of_a_billion_leaves_is_walked_once() -> None:
    root = run(b"\x80\x02)" + b"2\x86" * 60 + b".")
    assert sum(1 for _ in iter_nodes(root)) == 61


def test_a_huge_memo_index_claims_nothing() -> None:
    assert run(b"\x80\x02]r\xff\xff\xff\x7f.") == []


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    ],
    ids=["BINUNICODE", "BINUNICODE8", "LONG4"],
)
def test_a_length_beyond_the_file_is_refused_before_it_is_used(stream: bytes) -> None:
    with pytest.raises(CorruptArchiveError):
        run(stream)


def test_the_opcode_limit_holds() -> None:
    with pytest.raises(LimitExceededError):
        run(b"(" * 1000 + b"N.", limits=Limits(opcodes=100))


def test_oddities_are_reported() -> None:
    assert run_pickle(b"\x80\x02\x82\x05.", reducers={}).oddities
    nested = b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x95\x01\x00\x00\x00\x00\x00\x00\x00N....."
    assert run_pickle(nested, reducers={}).oddities


def test_an_unknown_class_keeps_what_it_was_given() -> None:
    root = run(b"\x80\x02cmymodel\nNet\n)\x81}X\x01\x00\x00\x00aK\x01sb.")
    assert isinstance(root, Instance)
    assert isinstance(root.cls, Global)
    assert root.class_path == "mymodel.Net"
    attributes = root.attributes()
    assert attributes is not None
    assert attributes.by_name() == {"a": 1}
