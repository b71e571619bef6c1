"""What a checkpoint without a state dict is: an optimizer, a scheduler, random generators, ... Pure.

Told by what it holds, never by how it is called: `roles` knows the states, this module the files made of them
and trainers' argument objects.
"""

from __future__ import annotations

from typing import Any

from ptbin.reading.roles import role_of_content
from ptbin.reading.tree import holds_data
from ptbin.values.nodes import DictNode, Instance, NdArray, Opaque
from ptbin.values.tensors import SparseTensor, TensorRef

__all__ = ["role_of_leftover"]

_WORDS = {
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "scaler": "scaler",
    "random_state": "random generators",
}
# Names of random generators in the files of transformers, accelerate, Lightning and verl.
_RANDOM = frozenset(
    """python numpy cpu cuda xla npu mlu musa random_state numpy_random_seed torch_manual_seed
    torch_cuda_manual_seed torch_xpu_manual_seed rng rng_state random torch torch_cuda step""".split()
)
_ARGUMENT_CLASSES = ("Arguments", "Config", "Args")
_DATA = (TensorRef, SparseTensor, Opaque, NdArray)
MAX_DEPTH = 4


def role_of_leftover(root: Any) -> str | None:
    """What the record at the top is, in a word or two; None where it is nothing that training leaves."""
    return _role(root, 0)


def _role(node: Any, depth: int) -> str | None:
    if depth > MAX_DEPTH:
        return None
    if isinstance(node, Instance):
        is_arguments = node.class_path == "argparse.Namespace" or node.class_path.endswith(_ARGUMENT_CLASSES)
        return "training arguments" if is_arguments and not holds_data(node) else None
    if isinstance(node, TensorRef):
        return "random generators" if _is_twister(node) else None
    if isinstance(node, (list, tuple)):
        return _common_role(node, depth)
    if not isinstance(node, DictNode):
        return None
    content = role_of_content(node)
    if content in _WORDS:
        return _WORDS[content]
    named = node.by_name()
    if named and named.keys() <= _RANDOM and not any(isinstance(v, DictNode) for v in named.values()):
        return "random generators"
    return _common_role(list(named.values()), depth)


def _common_role(values: Any, depth: int) -> str | None:
    """Of a container whose every entry that could hold anything has a role: several optimizers, say."""
    roles = [
        _role(value, depth + 1)
        for value in values[:1000]
        if isinstance(value, (DictNode, Instance, list, tuple, *_DATA))
    ]
    if not roles or None in roles:
        return None
    return roles[0] if len(set(roles)) == 1 else "training state"


def _is_twister(tensor: TensorRef) -> bool:
    # at::CPUGeneratorImpl, legacy layout, and the CUDA generators' seed and offset
    return tensor.dtype.name == "uint8" and len(tensor.shape) == 1 and tensor.nbytes in (5056, 5048, 16)
