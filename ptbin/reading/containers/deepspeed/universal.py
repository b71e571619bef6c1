"""DeepSpeed's universal checkpoints: a folder for each parameter, `zero/<name>/fp32.pt`, whole already.

`ds_to_universal` writes there `{"param": tensor, "cat_dim": ...}`, or for ZeRO stage 3 without tensor
parallelism a flat tensor, whose shape the model states next to `zero/` have. Those also say which parameters
there are, which are tied, and hold buffers; their 16-bit weights are another precision of the same.
Sources: deepspeed/checkpoint/ds_to_universal.py, universal_checkpoint.py, 0.19.

Costs: the index of each `fp32.pt` and `step.pt` and of the model states; the optimizer's moments are not
opened.
"""

from __future__ import annotations

import math
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.deepspeed.models import Buffers, ModelStates, Shapes, model_files
from ptbin.reading.containers.deepspeed.partitions import Cutter
from ptbin.reading.containers.deepspeed.rules import rules_of, tensor_ranks_of
from ptbin.reading.containers.part_files import PartFiles
from ptbin.sources.deepspeed_names import OPTIM_STATES, UNIVERSAL, UNIVERSAL_OPTIMIZER
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import TensorRef, dense_strides


def read_deepspeed_universal(folder: Folder) -> Checkpoint:
    """Index the folder; `fp32` is the model.

    Raises:
        IncompleteCheckpointError: a parameter or the model states are missing, or of another step.
        UnsupportedFormatError: experts of AutoEP.
        CorruptArchiveError: the files contradict each other.
    """
    return _Universal(PartFiles(folder)).read()


class _Universal:
    def __init__(self, files: PartFiles) -> None:
        self.files = files
        self.uri = files.uri
        self.parameters: dict[str, dict[str, str]] = {}
        for path in files.reader.names:
            match = UNIVERSAL.match(path)
            if match is not None:
                self.parameters.setdefault(match["name"], {})[match["state"]] = path

    def read(self) -> Checkpoint:
        models = self._models()
        first = models[0]
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for model in models:
            for name, shape in _flattened(model.groups()).items():
                shapes.setdefault(name, []).append(shape)
        buffers = first.buffers(Buffers(self.files))
        missing = [name for name in shapes if name not in self.parameters]
        missing += [name for name, states in self.parameters.items() if "fp32" not in states]
        if missing:
            self.files.refuse(f"zero/{missing[0]}/fp32.pt is missing ({len(missing)} such); fetch it")
        self._compare_steps()
        found: dict[str, Any] = {}
        found.update(buffers)
        frozen = dict(
            first.frozen(3 if len(first.names) > 1 else 2, Cutter(self.uri, self.files.folder.limits))
        )
        for name in [*shapes, *(name for name in sorted(self.parameters) if name not in shapes)]:
            path = self.parameters[name]["fp32"]
            value = self._parameter(path, shapes.get(name, []))
            if name in buffers:
                self.files.leave_out(path, [value], "precision_copy")  # a cast copy, of whole numbers too
                continue
            if name not in shapes and len(models) > 1 and not self._is_replicated(first, name):
                self.files.refuse(
                    f"{path} is of no parameter that was trained, of which ds_to_universal keeps the first "
                    "tensor-parallel rank's slice alone; convert the folder that it was made from"
                )
            found[name] = value
        for name, value in frozen.items():
            found.setdefault(name, value)
        first.ties(found)
        for name, value in first.module.by_name().items():
            if name not in found and (not isinstance(value, TensorRef) or value.numel):
                found[name] = value
        fp32 = DictNode(first.module.kind, list(found.items()))
        fp32.state = first.module.state
        root = DictNode("dict", [("fp32", fp32)])
        if len(models) == 1 and first.is_whole():
            root.pairs.append(("module", first.module))
        kept = {"module", "buffer_names", "frozen_param_fragments", "fp32"}
        root.pairs.extend((key, value) for key, value in first.root.pairs if key not in kept)
        for name, held in self.files.opened:
            self.files.leave_out(name, [held], "precision_copy")
        unread = [path for path in self.files.reader.names if self._is_unread(path)]
        self.files.leave_out_unopened(unread, "optimizer")
        roles = {"fp32": "precision_copy", "module": "precision_copy"}
        return self.files.checkpoint("deepspeed_universal", root, preferred="fp32", roles=roles)

    def _is_replicated(self, model: ModelStates, name: str) -> bool:
        """Whether every tensor-parallel rank holds all of it."""
        rules = rules_of(self.files, model.root, model.names[0])
        return rules.lists is not None and name in rules.lists["tp_replicated_parameter_patterns"]

    def _is_unread(self, path: str) -> bool:
        match = UNIVERSAL.match(path)
        moments = match is not None and match["state"] not in ("fp32", "step")
        return moments or path == UNIVERSAL_OPTIMIZER or OPTIM_STATES.match(path) is not None

    def _models(self) -> list[ModelStates]:
        """The model states of each tensor-parallel rank."""
        found = model_files(self.files)
        ranks = {number: {rank or 0: name for rank, name in own.items()} for number, own in found.items()}
        for number in range(max(ranks, default=0) + 1):
            if number not in ranks:
                self.files.refuse(
                    f"mp_rank_{number:02d}_model_states.pt is missing, which says what parameters "
                    "there are; fetch it"
                )
        models = []
        for number in sorted(ranks):
            own = ranks[number]
            absent = next((rank for rank in range(max(own) + 1) if rank not in own), None)
            if absent is not None:
                self.files.refuse_missing(f"zero_pp_rank_{absent}_mp_rank_{number:02d}_model_states.pt")
            models.append(ModelStates(self.files, [own[rank] for rank in sorted(own)], "fp32/"))
        first = models[0]
        info = first.root.get("universal_checkpoint_info")
        if isinstance(info, DictNode) and info.get("ds_autoep_layers") is not None:
            raise UnsupportedFormatError(f"{self.uri}: experts of AutoEP, which ptbin does not put together")
        stated = tensor_ranks_of(first.root)
        if stated is not None and stated > len(models):
            self.files.refuse(
                f"{first.names[0]} is of {stated} tensor-parallel ranks, {len(models)} are there"
            )
        return models

    def _parameter(self, path: str, shapes: list[tuple[int, ...]]) -> TensorRef:
        root = self.files.open(path).root
        value = root.get("param") if isinstance(root, DictNode) else root
        if not isinstance(value, TensorRef):
            raise CorruptArchiveError(f"{self.uri}: {path} holds no parameter")
        if isinstance(root, DictNode):
            self.files.leave_out(path, [v for k, v in root.pairs if k != "param"], "trainer_state")
            if shapes and value.numel > sum(math.prod(shape) for shape in shapes):
                raise CorruptArchiveError(
                    f"{self.uri}: {path} has {list(value.shape)}, its slices {shapes[:4]}"
                )
            return value
        # flat, without padding (`merge_zero3_slices`)
        if len(shapes) != 1 or math.prod(shapes[0]) != value.numel or not value.contiguous:
            raise CorruptArchiveError(
                f"{self.uri}: {path} holds {value.numel} elements, the model states give it {shapes[:4]}"
            )
        return TensorRef(
            value.storage, value.dtype, shapes[0], dense_strides(shapes[0]), value.storage_offset
        )

    def _compare_steps(self) -> None:
        """Counters of all parameters agree."""
        for states in self.parameters.values():
            path = states.get("step")
            if path is None:
                continue
            root = self.files.open(path).root
            self.files.leave_out(path, [root], "optimizer")
            step = self.files.small.counter(root)
            if step is not None:
                self.files.compare_counter("optimizer step", path, step)


def _flattened(groups: list[Shapes]) -> Shapes:
    return {name: shape for group in groups for name, shape in group.items()}
