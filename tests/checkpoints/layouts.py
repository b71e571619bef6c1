"""Checkpoints by how tensors lie in their storages: views, strides, ties, scalars, nothing at all."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from tests.checkpoints.dtypes import random_bits, random_state_dict
from tests.checkpoints.registry import Checkpoint, checkpoint


def _save(path: Path, tensors: dict[str, torch.Tensor], **options: object) -> Checkpoint:
    torch.save(tensors, path, **options)  # type: ignore[arg-type]
    return Checkpoint(path, tensors)


@checkpoint()
def plain_state_dict(path: Path) -> Checkpoint:
    return _save(path, random_state_dict())


@checkpoint()
def view_of_a_large_storage(path: Path) -> Checkpoint:
    """1,000 elements out of 10^6; torch saves all of them (pytorch/pytorch#1995)."""
    return _save(path, {"view": random_bits(torch.float32, (1_000_000,))[500:1500], "other": torch.ones(3)})


@checkpoint()
def views_of_one_storage(path: Path) -> Checkpoint:
    """Overlapping, adjacent and equal views, none of the whole."""
    whole = random_bits(torch.float32, (100,))
    return _save(
        path,
        {"a": whole[:40], "b": whole[30:60], "c": whole[60:], "d": whole[:40], "e": whole[10:50].view(8, 5)},
    )


@checkpoint()
def strided(path: Path) -> Checkpoint:
    base = random_bits(torch.float32, (12, 10))
    cube = random_bits(torch.int16, (4, 5, 6), seed=2)
    return _save(
        path,
        {
            "transposed": base.t(),
            "every_second": base[:, ::2],
            "column": base[:, 3],
            "block": base[2:5, 4:7],
            "permuted": cube.permute(2, 0, 1),
            "as_strided": torch.as_strided(base, (3, 3), (7, 2), 5),
            "overlapping": torch.as_strided(base, (4, 4), (1, 1), 0),
        },
    )


@checkpoint()
def channels_last(path: Path) -> Checkpoint:
    weight = random_bits(torch.float32, (4, 3, 5, 5)).contiguous(memory_format=torch.channels_last)
    return _save(path, {"conv.weight": weight, "conv.bias": torch.zeros(4)})


@checkpoint()
def expanded_stride_zero(path: Path) -> Checkpoint:
    row = random_bits(torch.float32, (1, 16))
    return _save(path, {"rows": row.expand(64, 16), "scalar": torch.tensor(2.5).expand(3, 5)})


@checkpoint()
def odd_strides_of_short_dimensions(path: Path) -> Checkpoint:
    """Dimensions of length 1 with meaningless strides: contiguous all the same."""
    base = random_bits(torch.float32, (24,))
    return _save(
        path,
        {
            "lead": torch.as_strided(base, (1, 24), (999, 1)),
            "tail": torch.as_strided(base, (24, 1), (1, 77)),
            "nothing": torch.as_strided(base, (0, 5), (123, 456)),
        },
    )


@checkpoint()
def tied(path: Path) -> Checkpoint:
    embedding = random_bits(torch.float32, (32, 8))
    return _save(
        path,
        {
            "embed.weight": embedding,
            "lm_head.weight": embedding,
            "norm.weight": random_bits(torch.float32, (8,), seed=3),
        },
    )


@checkpoint()
def tied_by_value_of_two_objects(path: Path) -> Checkpoint:
    """Two tensors, one storage: a tie that the pickle's memo does not show."""
    embedding = random_bits(torch.float32, (32, 8))
    return _save(path, {"embed.weight": embedding, "lm_head.weight": embedding.detach(), "t": embedding.t()})


@checkpoint()
def scalars_and_nothing(path: Path) -> Checkpoint:
    return _save(
        path,
        {
            "scalar": torch.tensor(3.5),
            "tracked": torch.tensor(41, dtype=torch.int64),
            "none": torch.empty(0),
            "none_wide": torch.empty(3, 0, 2, dtype=torch.float16),
            "none_of_a_view": random_bits(torch.float32, (10,))[4:4],
        },
    )


@checkpoint()
def only_empty_tensors(path: Path) -> Checkpoint:
    return _save(path, {"a": torch.empty(0), "b": torch.empty(0, 7, dtype=torch.int64)})


@checkpoint()
def meta_tensors(path: Path) -> Checkpoint:
    """No bytes at all: torch keeps them, an output of weights lists them as left out."""
    return _save(path, {"m": torch.empty(3, 4, device="meta"), "w": random_bits(torch.float32, (4,))})


@checkpoint()
def parameters(path: Path) -> Checkpoint:
    marked = nn.Parameter(random_bits(torch.float32, (4,), seed=2))
    marked.tensor_parallel = True  # type: ignore[attr-defined]  # what Megatron does: _rebuild_parameter_with_state
    frozen = nn.Parameter(random_bits(torch.float32, (5,), seed=3), requires_grad=False)
    made = {"p": nn.Parameter(random_bits(torch.float32, (3, 4))), "marked": marked, "frozen": frozen}
    torch.save(made, path)
    return Checkpoint(path, {name: tensor.detach() for name, tensor in made.items()})


@checkpoint()
def tensors_with_attributes(path: Path) -> Checkpoint:
    """`_rebuild_from_type_v2` around `torch.Tensor`, as accelerate's FSDP files have it."""
    tensor = random_bits(torch.float32, (6,))
    tensor.note = "saved by fsdp"  # type: ignore[attr-defined]
    return _save(path, {"w": tensor, "buffer": nn.Buffer(random_bits(torch.float32, (3,), seed=1))})


class _Labelled(torch.Tensor):
    """A tensor subclass that the reader does not have."""


@checkpoint(torch_reads=None)
def tensor_subclass(path: Path) -> Checkpoint:
    plain = random_bits(torch.float32, (6,))
    torch.save({"w": plain.as_subclass(_Labelled), "v": random_bits(torch.float32, (2,), seed=1)}, path)
    return Checkpoint(path, {"w": plain, "v": random_bits(torch.float32, (2,), seed=1)})


@checkpoint()
def conjugate_and_negative_views(path: Path) -> Checkpoint:
    """Bits that torch keeps beside the tensor: the values are not what the storage's bytes say."""

    def values() -> torch.Tensor:
        return torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)

    return _save(path, {"conj": values().conj(), "imag_of_conj": values().conj().imag, "plain": values()})


@checkpoint()
def requires_grad_leaves(path: Path) -> Checkpoint:
    leaf = random_bits(torch.float32, (3,)).requires_grad_()
    torch.save({"w": leaf, "v": torch.ones(2)}, path)
    return Checkpoint(path, {"w": leaf.detach(), "v": torch.ones(2)})


@checkpoint()
def many_small_tensors(path: Path) -> Checkpoint:
    tensors = {f"layers.{i}.w": random_bits(torch.float16, (3,), seed=i) for i in range(500)}
    return _save(path, tensors)


@checkpoint()
def names_of_all_kinds(path: Path) -> Checkpoint:
    """Names that are no paths, whatever they look like."""
    names = [
        "",
        " ",
        "../../etc/passwd",
        "/abs",
        "C:\\x",
        "a\nb",
        "ключ",
        "權重",
        "💾",
        "x" * 300,
        "a\0b",
        "%s{0}",
    ]
    return _save(path, {name: random_bits(torch.float32, (2,), seed=i) for i, name in enumerate(names)})


@checkpoint()
def ordered_dict_with_metadata(path: Path) -> Checkpoint:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    state = model.state_dict()
    torch.save(state, path)
    return Checkpoint(path, OrderedDict((name, tensor.detach()) for name, tensor in state.items()))


@checkpoint()
def legacy_plain(path: Path) -> Checkpoint:
    return _save(path, random_state_dict(), _use_new_zipfile_serialization=False)


@checkpoint()
def legacy_views_ties_and_strides(path: Path) -> Checkpoint:
    whole = random_bits(torch.float32, (100,))
    matrix = random_bits(torch.float64, (6, 7))
    tensors = {
        "a": whole[:40],
        "b": whole[40:],
        "m": matrix,
        "t": matrix.t(),
        "tied": matrix,
        "z": torch.empty(0),
    }
    return _save(path, tensors, _use_new_zipfile_serialization=False)


@checkpoint(torch_reads=None)
def protocol_four(path: Path) -> Checkpoint:
    """torch writes it on demand, `weights_only=True` cannot read it (pytorch/pytorch#118092)."""
    return _save(path, random_state_dict(), pickle_protocol=4)


@checkpoint(torch_reads=None)
def protocol_five(path: Path) -> Checkpoint:
    return _save(path, random_state_dict(), pickle_protocol=5)


@checkpoint(torch_reads=None)
def legacy_protocol_five(path: Path) -> Checkpoint:
    return _save(path, random_state_dict(), pickle_protocol=5, _use_new_zipfile_serialization=False)
