"""Checkpoints of every kind, made on the spot: one factory each, and what must become of it.

    from tests.checkpoints import factories

    @pytest.mark.parametrize("factory", factories(refused=False), ids=str)
    def test_converts(factory, tmp_path):
        made = factory.make(tmp_path)          # writes tmp_path / "<name><suffix>"
        ...                                    # made.path, made.expected, made.options

    @pytest.mark.parametrize("factory", factories(refused=True), ids=str)
    def test_refused(factory, tmp_path):
        made = factory.make(tmp_path)          # made.reason is a code of ptbin.errors

A test that only reads the file takes it from the fixture `made_once` instead: `made_once(factory)`.
`factories(room="hostile")` narrows to one module of this package, `factories(slow=None)` adds those that
take gigabytes, `FACTORIES["tied"]` is one of them. In hostile files `made.canary` is a path that must
never come to exist. The rooms:

    dtypes      every element type, quantized, sparse; `random_bits` for more of the kind
    layouts     views, strides, ties, scalars, empty and meta tensors, Parameters, legacy twins
    falling_short  modules and tensors that are more than their data: kept whole, or refused
    odd_mappings   state dicts in mappings of other kinds, names that mislead, averages by producer
    ordinary    what the scripts of well-known repositories write, and what of it is for the user to choose
    training    training dicts, EMA beside raw weights, prefixes, Lightning
    modules     whole modules with and without their classes, TorchScript
    pickles     raw pickles, numpy arrays and scalars; and files that hold no weights
    archives    checkpoints inside tars and zips
    old_torch   torch 0.1 to 0.4, pickle protocols 0 and 1, bytes that look like another container's
    containers  framing: deflated, zip64, CRCs off, big-endian, truncated, flipped, disguised
    parts       one part of a whole by its content; folders in parts
    harmless    values that look dangerous and are not
    hostile     canaries per opcode, bombs, impossible tensors

`craft` puts archives and pickles together by hand for tests that need one more.

The expectations are torch's own wherever torch reads the file (`Factory.torch_reads`): the suite holds
each factory to that in tests/test_checkpoints.py, and shows there that each canary is a live one.
"""

from tests.checkpoints import (
    archives,
    containers,
    dtypes,
    falling_short,
    harmless,
    hostile,
    layouts,
    modules,
    odd_mappings,
    old_torch,
    ordinary,
    parts,
    pickles,
    training,
)
from tests.checkpoints.registry import FACTORIES, Checkpoint, Factory, MadeOnce, factories

__all__ = [
    "FACTORIES",
    "Checkpoint",
    "Factory",
    "MadeOnce",
    "archives",
    "containers",
    "dtypes",
    "factories",
    "falling_short",
    "harmless",
    "hostile",
    "layouts",
    "modules",
    "odd_mappings",
    "old_torch",
    "ordinary",
    "parts",
    "pickles",
    "training",
]
