"""`torch.export` archives (`.pt2`, torch 2.8 and later): the weights of the programs in them.

Members: `<root>/archive_format` (`pt2`), `<root>/data/weights/<model>_weights_config.json` (names, files,
types, shapes, strides), `<root>/data/weights/weight_<n>` (a storage's bytes each), constants and programs.
Sources: torch/export/pt2_archive/_package.py and constants.py, torch/_export/serde/schema.py (`ScalarType`,
`TensorMeta`, `PayloadConfig`), 2.13. No code of the program is looked at.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.reading.containers.checkpoint import Checkpoint, Opening
from ptbin.reading.containers.zip_directory import DEFLATED, ZipDirectory
from ptbin.values.dtypes import BY_NAME, DType
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import ByteRange, Storage, TensorRef

_CONFIG = re.compile(r"^(?P<root>[^/]+)/data/weights/(?P<model>[^/]+)_weights_config\.json$")

# schema.py, ScalarType: numbered from 1 on and, for later types, from 28 on
_FIRST = "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool bfloat16"
_LATER = "uint16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu uint32 uint64"
_DTYPES = dict(enumerate(_FIRST.split(), 1)) | dict(enumerate(_LATER.split(), 28))


def read_exported(opening: Opening, directory: ZipDirectory) -> Checkpoint | None:
    """Index the weights of an exported program; None where the archive holds none in this form.

    Raises:
        CorruptArchiveError: the configuration contradicts the archive.
        UnsupportedFormatError: weights in another form than plain bytes.
    """
    configs = {match["model"]: name for name in directory.members if (match := _CONFIG.match(name))}
    if not configs:
        return None
    uri = opening.file.uri
    storages: dict[str, Storage] = {}
    roots = {}
    for model, name in configs.items():
        root = DictNode("OrderedDict")
        for weight, row in _rows(uri, directory.read_member(name)).items():
            root.pairs.append(
                (weight, _tensor(uri, directory, name.rsplit("/", 1)[0], weight, row, storages))
            )
        roots[model] = root
    top = next(iter(roots.values())) if len(roots) == 1 else DictNode("dict", list(roots.items()))
    return opening.build("torch_export", top, storages, is_whole=True)


def _rows(uri: str, data: bytes) -> dict[str, Any]:
    try:
        rows = json.loads(data)["config"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CorruptArchiveError(f"{uri}: the list of its weights cannot be read: {error}") from error
    if not isinstance(rows, dict):
        raise CorruptArchiveError(f"{uri}: the list of its weights cannot be read")
    return rows


def _tensor(
    uri: str, directory: ZipDirectory, folder: str, name: str, row: Any, storages: dict[str, Storage]
) -> TensorRef:
    if not isinstance(row, dict) or row.get("use_pickle") is not False:
        raise UnsupportedFormatError(
            f"{uri}: weight {name[:200]!r} is stored as a pickle; "
            "load the program with torch.export.load and save its state_dict with torch.save"
        )
    path = row.get("path_name")
    meta = row.get("tensor_meta")
    meta = meta if isinstance(meta, dict) else {}
    kind = meta.get("dtype")
    dtype = BY_NAME.get(_DTYPES.get(kind, "")) if isinstance(kind, int) else None
    if dtype is None or not isinstance(path, str):
        raise CorruptArchiveError(f"{uri}: weight {name[:200]!r} is not described consistently")
    shape, stride = (_numbers(uri, name, meta.get(key)) for key in ("sizes", "strides"))
    offset = _numbers(uri, name, [meta.get("storage_offset")])[0]
    storage = storages.get(path) or _storage(uri, directory, f"{folder}/{path}", path)
    storages[path] = storage
    tensor = TensorRef(storage, dtype, shape, stride, offset)
    if len(shape) != len(stride) or tensor.span[1] > storage.nbytes:
        raise CorruptArchiveError(f"{uri}: weight {name[:200]!r} reaches beyond the bytes of {path!r}")
    _refuse_expanded(uri, name, tensor, dtype)
    return tensor


def _refuse_expanded(uri: str, name: str, tensor: TensorRef, dtype: DType) -> None:
    if tensor.nbytes > max(tensor.storage.nbytes, 1 << 20) and dtype.per_unit == 1:
        raise CorruptArchiveError(f"{uri}: weight {name[:200]!r} shows more elements than are stored")


def _numbers(uri: str, name: str, values: Any) -> tuple[int, ...]:
    """Symbolic integers as the schema writes them: `{"as_int": 3}`."""
    found: list[int] = []
    for value in values if isinstance(values, list) else [None]:
        number = value.get("as_int") if isinstance(value, dict) else None
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise CorruptArchiveError(f"{uri}: weight {name[:200]!r} has no fixed shape")
        found.append(number)
    return tuple(found)


def _storage(uri: str, directory: ZipDirectory, member_name: str, key: str) -> Storage:
    member = directory.members.get(member_name)
    if member is None:
        raise CorruptArchiveError(f"{uri}: its configuration names {member_name!r}, which is not there")
    if member.method == DEFLATED:
        raise UnsupportedFormatError(f"{uri}: compressed weights in an exported program")
    offset, crc = directory.data_offset_of(member), directory.crc32_of(member)
    return Storage(key, member.nbytes, ByteRange(offset, member.nbytes, crc, None, member_name))
