"""DeepSpeed's `*_model_states.pt` of one tensor-parallel rank: names, shapes, buffers, frozen parameters.

One file for ZeRO stages 1 and 2, one for each data-parallel rank in stage 3, whose `module` has empty tensors
in the places of its parameters (deepspeed/runtime/engine.py, `_common_checkpoint_state`, 0.19). All are
opened: what they hold is accounted for, and their counters have to agree. Buffers that are floating numbers
are cast to float32, as `zero_to_fp32` casts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.reading.containers.deepspeed.partitions import FLOATING, Cutter, Vector, refuse_overlap, short
from ptbin.reading.containers.part_files import PartFiles
from ptbin.sources.deepspeed_names import MODEL_STATES
from ptbin.values.nodes import DictNode, Opaque, sizes_in
from ptbin.values.tensors import TensorRef

MAX_CAST_NBYTES = 64 << 20
"""All buffers together that are cast in memory; a model whose buffers are larger has its weights in them."""

Shapes = dict[str, tuple[int, ...]]


def mapping_in(files: PartFiles, name: str) -> DictNode:
    """The mapping that a file holds.

    Raises:
        CorruptArchiveError: it holds something else.
    """
    root = files.open(name).root
    if not isinstance(root, DictNode):
        raise CorruptArchiveError(f"{files.uri}: {name} holds no mapping")
    return root


def model_files(files: PartFiles) -> dict[int, dict[int | None, str]]:
    """Model states: tensor-parallel rank to data-parallel rank to file; None where one file serves all."""
    found: dict[int, dict[int | None, str]] = {}
    for name in files.reader.names:
        if (match := MODEL_STATES.match(name)) is not None:
            rank = None if match["rank"] is None else int(match["rank"])
            found.setdefault(int(match["mp"]), {})[rank] = name
    return found


def leave_out_states(files: PartFiles, name: str, root: DictNode, *, kept: str | None = None) -> None:
    """Leave out what another rank's model states hold; `kept` is the key of its model, which stays."""
    rest = [value for key, value in root.pairs if key not in (kept, "optimizer")]
    files.leave_out(name, [root.get("optimizer")], "optimizer")
    files.leave_out(name, rest, "trainer_state")


def _shapes_in(uri: str, node: Any, what: str) -> Shapes:
    """Name to shape, checked."""
    if not isinstance(node, DictNode):
        raise CorruptArchiveError(f"{uri}: {what} is not a mapping of names to shapes")
    shapes: Shapes = {}
    for name, shape in node.pairs:
        sizes = sizes_in(shape)
        if not isinstance(name, str) or sizes is None:
            raise CorruptArchiveError(f"{uri}: {what} has {short(name)} with shape {short(shape)}")
        shapes[name] = sizes
    return shapes


class ModelStates:
    """The model states of one tensor-parallel rank.

    Attributes:
        names: its files, that of data-parallel rank 0 first.
        root: of the first file.
        module: its 16-bit weights, or what stands in their places.
    """

    def __init__(self, files: PartFiles, names: Sequence[str], label: str) -> None:
        self.files = files
        self.names = list(names)
        self.label = label
        self.root, *self._others = [self._open(name) for name in self.names]
        self.module: DictNode = self.root.get("module")

    @property
    def uri(self) -> str:
        return self.files.uri

    def _open(self, name: str) -> DictNode:
        model = mapping_in(self.files, name)
        self.files.opened.append((name, model))
        where = f"{self.uri}: {name}"
        if isinstance(model.get("ds_autoep_layers") or model.get("autoep_layers"), list):
            raise UnsupportedFormatError(
                f"{where}: experts are partitioned by AutoEP; convert it with DeepSpeed's ds_to_universal.py"
            )
        if not isinstance(model.get("module"), DictNode) or model.get("param_shapes") is None:
            raise UnsupportedFormatError(
                f"{where}: names no parameters of a ZeRO optimizer (pipeline parallel, or saved without it); "
                "convert it with DeepSpeed's ds_to_universal.py"
            )
        if not isinstance(model.get("buffer_names"), list):
            raise CorruptArchiveError(f"{where}: no buffer_names, so these are not DeepSpeed's model states")
        return model

    def groups(self) -> list[Shapes]:
        """The parameters that the optimizer trains, group by group."""
        node = self.root.get("param_shapes")
        if not isinstance(node, (list, tuple)):
            raise CorruptArchiveError(f"{self.uri}: param_shapes is not a list of groups")
        groups: list[Shapes] = []
        seen: set[str] = set()
        for entry in node:
            shapes = _shapes_in(self.uri, entry, "param_shapes")
            twice = next((name for name in shapes if name in seen), None)
            if twice is not None:
                raise CorruptArchiveError(f"{self.uri}: param_shapes names {short(twice)} in two groups")
            seen.update(shapes)
            groups.append(shapes)
        return groups

    def is_whole(self) -> bool:
        """Whether the module has its parameters: in stage 3 it has empty tensors in their places."""
        held = self.module.by_name()
        shapes = {name: shape for group in self.groups() for name, shape in group.items()}
        shapes.update(self._frozen_shapes())
        return all(isinstance(t := held.get(name), TensorRef) and t.shape == s for name, s in shapes.items())

    def buffer_names(self) -> set[str]:
        return {name for name in self.root.get("buffer_names") if isinstance(name, str)}

    def buffers(self, casts: Buffers) -> dict[str, Any]:
        """Buffers by name, as float32 where they are floating numbers."""
        names = self.buffer_names()
        return {n: casts.as_float32(value) for n, value in self.module.by_name().items() if n in names}

    def ties(self, found: dict[str, Any]) -> None:
        """Give tied parameters, which are stored once, their other names."""
        shared = self.root.get("shared_params")
        for name, target in shared.pairs if isinstance(shared, DictNode) else ():
            if isinstance(name, str) and isinstance(target, str) and target in found:
                found[name] = found[target]

    def _frozen_shapes(self) -> Shapes:
        node = self.root.get("frozen_param_shapes")
        return {} if node is None else _shapes_in(self.uri, node, "frozen_param_shapes")

    def frozen(self, stage: int, cutter: Cutter) -> Iterator[tuple[str, TensorRef]]:
        """Parameters that no optimizer holds, in the type they were trained with."""
        shapes = self._frozen_shapes()
        if not shapes:
            return
        fragments = [self._fragments(self.names[0], self.root, shapes)]
        if stage <= 2:
            for name, shape in shapes.items():
                if fragments[0][name].shape != shape:
                    raise CorruptArchiveError(
                        f"{self.uri}: frozen {short(name)} has shape {list(fragments[0][name].shape)}, "
                        f"expected {list(shape)}"
                    )
                yield name, fragments[0][name]
            return
        others = zip(self.names[1:], self._others, strict=True)
        fragments += [self._fragments(file, model, shapes) for file, model in others]
        for name, shape in shapes.items():
            share = -(-math.prod(shape) // len(self.names))
            vectors = []
            for file, held in zip(self.names, fragments, strict=True):
                vector = Vector(self.uri)
                vector.append(held[name], f"frozen {short(name)} in {file}")
                if vector.numel < share or vector.dtype != fragments[0][name].dtype:
                    raise CorruptArchiveError(
                        f"{self.uri}: frozen {short(name)} in {file} has {vector.numel} elements, a share "
                        f"of shape {list(shape)} over {len(self.names)} ranks has {share}"
                    )
                vectors.append((vector, 0))
            yield name, cutter.shared_out(f"{self.label}{name}", shape, vectors)

    def _fragments(self, file: str, model: DictNode, shapes: Shapes) -> dict[str, TensorRef]:
        node = model.get("frozen_param_fragments")
        held = node.by_name() if isinstance(node, DictNode) else {}
        for name in shapes:
            if not isinstance(held.get(name), TensorRef):
                raise CorruptArchiveError(f"{self.uri}: {file} has no fragment of frozen {short(name)}")
        found = {name: held[name] for name in shapes}
        refuse_overlap(f"{self.uri}: {file}", found.values())
        return found


class Buffers:
    """Casts the buffers of one checkpoint; tied ones stay tied."""

    def __init__(self, files: PartFiles) -> None:
        self._files = files
        self._nbytes = 0
        self._casts: dict[tuple[Any, ...], TensorRef | Opaque] = {}

    def as_float32(self, value: Any) -> Any:
        """A buffer as `zero_to_fp32` gives it: floating numbers as float32, anything else as it is.

        What is too large or too odd to cast here becomes an `Opaque`, an error once `fp32` is converted.
        """
        if not isinstance(value, TensorRef) or not value.dtype.name.startswith(FLOATING):
            return value
        if value.dtype.name == "float32":
            return value
        known = self._casts.get(value.layout_key())
        if known is None:
            known = self._casts[value.layout_key()] = self._cast(value)
        return known

    def _cast(self, tensor: TensorRef) -> TensorRef | Opaque:
        kind = f"{tensor.dtype.name} buffer"
        if not self._files.small.can_read(tensor):
            return Opaque(kind, "it would have to be cast to float32; --select module takes it as it is")
        first, end = tensor.span
        self._nbytes += max(end - first, tensor.storage.nbytes) + 4 * tensor.numel
        if self._nbytes > MAX_CAST_NBYTES:
            return Opaque(kind, f"buffers of more than {MAX_CAST_NBYTES} bytes to be cast to float32")
        made = self._files.small.as_float32(f"fp32/buffer/{len(self._casts)}", tensor)
        self._files.storages[made.storage.key] = made.storage
        return made
