"""Checkpoints by element type: every dtype that torch 2.13 saves, quantized and sparse tensors.

Values are random bits, NaN payloads included, so that anything but a move of bytes shows.
`torch.int1` ... `uint7` cannot be saved by torch itself (2.13: "dtype torch.int1 is not recognized").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from tests.checkpoints.registry import Checkpoint, checkpoint

__all__ = ["PLAIN_DTYPES", "random_bits", "random_state_dict"]

PLAIN_DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex128,
    torch.complex64,
    torch.complex32,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
)

_TYPES_WITH_A_STORAGE_CLASS = frozenset(
    [*PLAIN_DTYPES[:6], torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
)

_BITS_DTYPES = (torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """A contiguous tensor of random bits; only bool is kept to 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    count = 1
    for length in shape:
        count *= length
    raw = torch.randint(0, high, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def random_state_dict(*, seed: int = 0, layers: int = 2, width: int = 8) -> OrderedDict[str, torch.Tensor]:
    """A small float32 state dict with the names that `nn.Sequential` would give."""
    tensors: OrderedDict[str, torch.Tensor] = OrderedDict()
    for layer in range(layers):
        tensors[f"{layer}.weight"] = random_bits(torch.float32, (width, width), seed=seed + 2 * layer)
        tensors[f"{layer}.bias"] = random_bits(torch.float32, (width,), seed=seed + 2 * layer + 1)
    return tensors


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _register(dtype: torch.dtype, *, legacy: bool) -> None:
    name = f"{'legacy_' if legacy else ''}dtype_{_short(dtype)}"

    # torch writes legacy files of the types that have no storage class of their own, and cannot read them
    # back (2.13: "type object 'torch.storage.UntypedStorage' has no attribute 'dtype'").
    readable = not legacy or dtype in _TYPES_WITH_A_STORAGE_CLASS

    @checkpoint(name=name, torch_reads="weights_only" if readable else None)
    def build(path: Path) -> Checkpoint:
        tensors = {
            "matrix": random_bits(dtype, (5, 3), seed=1),
            "vector": random_bits(dtype, (33,), seed=2),
            "one": random_bits(dtype, (1,), seed=3),
            "scalar": random_bits(dtype, (), seed=4),
            "none": random_bits(dtype, (0, 4), seed=5),
        }
        torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
        return Checkpoint(path, tensors)


for _dtype in (*PLAIN_DTYPES, *_BITS_DTYPES):
    _register(_dtype, legacy=False)
    _register(_dtype, legacy=True)


@checkpoint()
def dtypes_all_in_one(path: Path) -> Checkpoint:
    tensors = {_short(dtype): random_bits(dtype, (3, 5), seed=7) for dtype in PLAIN_DTYPES}
    torch.save(tensors, path)
    return Checkpoint(path, tensors)


def _per_tensor(dtype: torch.dtype) -> torch.Tensor:
    values = torch.linspace(-1, 1, 32).reshape(4, 8)
    return torch.quantize_per_tensor(values, 0.05, 3 if dtype != torch.qint32 else 0, dtype)


def _per_channel(dtype: torch.dtype) -> torch.Tensor:
    values = torch.linspace(-1, 1, 32).reshape(4, 8)
    scales = torch.tensor([0.01, 0.02, 0.03, 0.04], dtype=torch.float64)
    return torch.quantize_per_channel(values, scales, torch.zeros(4, dtype=torch.int64), 0, dtype)


def _per_channel_float(dtype: torch.dtype) -> torch.Tensor:
    values = torch.linspace(-1, 1, 32).reshape(4, 8)
    scales = torch.tensor([0.1, 0.2, 0.3, 0.4])
    return torch.quantize_per_channel(values, scales, torch.tensor([0.0, 0.5, 1.0, 1.5]), 0, dtype)


_QUANTIZED: dict[str, tuple[Callable[[torch.dtype], torch.Tensor], torch.dtype]] = {
    "quantized_qint8": (_per_tensor, torch.qint8),
    "quantized_quint8": (_per_tensor, torch.quint8),
    "quantized_qint32": (_per_tensor, torch.qint32),
    "quantized_quint4x2": (_per_tensor, torch.quint4x2),
    "quantized_quint2x4": (_per_tensor, torch.quint2x4),
    "quantized_qint8_per_channel": (_per_channel, torch.qint8),
    "quantized_qint32_per_channel": (_per_channel, torch.qint32),
    "quantized_quint8_float_qparams": (_per_channel_float, torch.quint8),
    "quantized_quint4x2_float_qparams": (_per_channel_float, torch.quint4x2),
}


def _register_quantized(name: str, make: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype) -> None:
    @checkpoint(name=name)
    def build(path: Path) -> Checkpoint:
        tensors = {"q.weight": make(dtype), "q.bias": random_bits(torch.float32, (4,))}
        torch.save(tensors, path)
        return Checkpoint(path, tensors)


for _name, (_make, _qtype) in _QUANTIZED.items():
    _register_quantized(_name, _make, _qtype)


def _dense() -> torch.Tensor:
    return torch.tensor([[0.0, 2.0, 0.0, 0.5], [0.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -3.0, 4.0]])


_SPARSE: dict[str, Callable[[], torch.Tensor]] = {
    "sparse_coo": lambda: _dense().to_sparse(),
    "sparse_coo_uncoalesced": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 1], [2, 0, 0]]), torch.tensor([3.0, 4.0, 5.0]), (2, 4)
    ),
    "sparse_coo_empty": lambda: torch.zeros(3, 4).to_sparse(),
    "sparse_csr": lambda: _dense().to_sparse_csr(),
    "sparse_csc": lambda: _dense().to_sparse_csc(),
    "sparse_bsr": lambda: _dense().to_sparse_bsr((2, 2)),
    "sparse_bsc": lambda: _dense().to_sparse_bsc((2, 2)),
}


def _register_sparse(name: str, make: Callable[[], torch.Tensor]) -> None:
    @checkpoint(name=name)
    def build(path: Path) -> Checkpoint:
        tensors = {"s": make(), "plain": random_bits(torch.float32, (4,))}
        torch.save(tensors, path)
        return Checkpoint(path, tensors)


for _name, _sparse in _SPARSE.items():
    _register_sparse(_name, _sparse)
