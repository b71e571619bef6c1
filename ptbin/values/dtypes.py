"""The element types torch can save, as data: name, width, how torch names their storages.

Owns the mapping between dtype names (`float32`), the storage classes that pickles name
(`torch.FloatStorage`) and element widths. Imports no torch and no numpy; `numpy_name` gives the name
under which numpy (or ml_dtypes) knows the type.

Source of the names: torch/storage.py, `_dtype_to_storage_type_map()` and `_new_dtypes()`, 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: torch's name without the `torch.` before it.
        itemsize: bytes per stored unit. For `quint4x2` and `quint2x4` a unit holds 2 or 4 elements.
        storage_class: class under `torch.` that tags such storages in a pickle; None for the types
            that torch saves through `UntypedStorage` and `_rebuild_tensor_v3`.
        swap_nbytes: width of the integers that change order between big and little endian files.
        per_unit: elements in one stored unit.
        numpy_name: name for `numpy.dtype` or `ml_dtypes`; None where neither has the type.
    """

    name: str
    itemsize: int
    storage_class: str | None
    swap_nbytes: int
    per_unit: int = 1
    numpy_name: str | None = None

    @property
    def quantized(self) -> bool:
        return self.name.startswith(("qint", "quint"))

    def nbytes_of(self, elements: int) -> int:
        """Bytes that hold `elements` consecutive elements."""
        return -(-elements // self.per_unit) * self.itemsize


_ALL = (
    DType("float64", 8, "DoubleStorage", 8, numpy_name="float64"),
    DType("float32", 4, "FloatStorage", 4, numpy_name="float32"),
    DType("float16", 2, "HalfStorage", 2, numpy_name="float16"),
    DType("bfloat16", 2, "BFloat16Storage", 2, numpy_name="bfloat16"),
    DType("int64", 8, "LongStorage", 8, numpy_name="int64"),
    DType("int32", 4, "IntStorage", 4, numpy_name="int32"),
    DType("int16", 2, "ShortStorage", 2, numpy_name="int16"),
    DType("int8", 1, "CharStorage", 1, numpy_name="int8"),
    DType("uint8", 1, "ByteStorage", 1, numpy_name="uint8"),
    DType("bool", 1, "BoolStorage", 1, numpy_name="bool"),
    DType("complex128", 16, "ComplexDoubleStorage", 8, numpy_name="complex128"),
    DType("complex64", 8, "ComplexFloatStorage", 4, numpy_name="complex64"),
    DType("qint8", 1, "QInt8Storage", 1),
    DType("qint32", 4, "QInt32Storage", 4),
    DType("quint8", 1, "QUInt8Storage", 1),
    DType("quint4x2", 1, "QUInt4x2Storage", 1, per_unit=2),
    DType("quint2x4", 1, "QUInt2x4Storage", 1, per_unit=4),
    DType("uint16", 2, None, 2, numpy_name="uint16"),
    DType("uint32", 4, None, 4, numpy_name="uint32"),
    DType("uint64", 8, None, 8, numpy_name="uint64"),
    DType("complex32", 4, None, 2),
    DType("float8_e4m3fn", 1, None, 1, numpy_name="float8_e4m3fn"),
    DType("float8_e4m3fnuz", 1, None, 1, numpy_name="float8_e4m3fnuz"),
    DType("float8_e5m2", 1, None, 1, numpy_name="float8_e5m2"),
    DType("float8_e5m2fnuz", 1, None, 1, numpy_name="float8_e5m2fnuz"),
    DType("float8_e8m0fnu", 1, None, 1, numpy_name="float8_e8m0fnu"),
    DType("float4_e2m1fn_x2", 1, None, 1),
    DType("bits8", 1, None, 1),
    DType("bits16", 2, None, 2),
    DType("bits1x8", 1, None, 1),
    DType("bits2x4", 1, None, 1),
    DType("bits4x2", 1, None, 1),
)

BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}
BY_STORAGE_CLASS: dict[str, DType] = {d.storage_class: d for d in _ALL if d.storage_class is not None}

# What `--dtype` casts from and to. Left out: float8_e8m0fnu, which has neither sign nor zero and holds
# scales, not weights; float4_e2m1fn_x2, for which torch has no casts; integers and complex numbers, because a
# cast is about the precision of weights.
CAST_NAMES = tuple(
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz".split()
)

QUANTIZER_SCHEMES = (
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)
"""How `torch._utils._rebuild_qtensor` says that a tensor is quantized."""

# safetensors' names (its `Dtype` enum); what is missing here it cannot hold. Of F4 it counts single numbers
# where torch counts pairs: the last dimension is twice as long there.
SAFETENSORS_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}

PAIRED = SAFETENSORS_NAMES["float4_e2m1fn_x2"]

# Second names that torch gives the same objects (torch/__init__.pyi); old files may hold them.
_ALIASES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "cdouble": "complex128",
    "cfloat": "complex64",
    "chalf": "complex32",
}


def dtype_by_name(name: str) -> DType | None:
    """The element type torch calls `name` (without `torch.`), aliases included."""
    return BY_NAME.get(_ALIASES.get(name, name))
