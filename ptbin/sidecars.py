"""Files that belong to a Hugging Face model beside its weights: configuration, tokenizer, chat template.

Chosen by name, out of the source's folder or the `huggingface/` in it, where verl puts them. Code (`*.py`)
stays where it is: a folder that ptbin writes never makes anybody run some.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator

from ptbin.draft import DraftFile
from ptbin.sources import SourcePlace
from ptbin.stores import Store

__all__ = ["copy_sidecars", "with_dtype"]

# transformers' and tokenizers' file names (utils/hub.py, tokenization_utils_base.py), and peft's.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "configuration.json",
)
HUGGING_FACE_FOLDER = "huggingface"
"""In a folder of rank files (verl's FSDP checkpoint manager, SkyRL)."""

MAX_NBYTES = 256 << 20
MAX_CONFIG_NBYTES = 16 << 20
MAX_LISTED = 10_000
CHUNK_NBYTES = 1 << 20


def copy_sidecars(
    source: SourcePlace,
    dest: Store,
    folder: str,
    check: Callable[[str, int, int], None],
    *,
    dtype: str | None,
    notes: list[str],
) -> Iterator[DraftFile]:
    """Copy those that lie in the source's folder, or in its `huggingface/`, to `folder`.

    They go along as they are, but for `config.json` where weights are cast to `dtype`: it says so then.

    Args:
        check: called with name, size and CRC-32 before a file is put in its place; it may refuse.
        notes: for the manifest; what was changed is added.
    """
    for name, path in _find(source).items():
        if name == "config.json" and dtype is not None:
            found = source.store.read_bytes(f"{source.folder}/{path}", limit=MAX_CONFIG_NBYTES)
            data, note = with_dtype(found, dtype)
            check(name, len(data), zlib.crc32(data))
            dest.write_bytes(f"{folder}/{name}", data)
            notes += [note] if note else []
            yield DraftFile(name, len(data), zlib.crc32(data))
            continue
        crc = 0
        with (
            source.store.open_reader(f"{source.folder}/{path}") as reader,
            dest.open_writer(f"{folder}/{name}", size_hint=reader.size) as writer,
        ):
            for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
                crc = zlib.crc32(piece, crc)
                writer.write(piece)
            reader.check_unchanged()
            check(name, reader.size, crc)
            writer.commit()
            yield DraftFile(name, reader.size, crc)


def _find(source: SourcePlace) -> dict[str, str]:
    """Name to path below the source's folder; what lies next to the weights comes first."""
    found: dict[str, str] = {}
    for item in itertools.islice(source.store.iter_objects(source.folder), MAX_LISTED):
        name = item.path.removeprefix(f"{HUGGING_FACE_FOLDER}/")
        if "/" in name or not any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS):
            continue
        if name.isprintable() and item.size <= MAX_NBYTES and (name == item.path or name not in found):
            found[name] = item.path
    return found


# `torch_dtype` until transformers 4.55, `dtype` since (configuration_utils.py); either is read by both.
_DTYPE = re.compile(rb'("(?:torch_)?dtype"\s*:\s*)("[A-Za-z0-9_.]*"|null)')


def with_dtype(config: bytes, dtype: str) -> tuple[bytes, str]:
    """A model's `config.json` with its element type, and a note of what was changed; empty where nothing was.

    Nothing else of the text changes. One that is not a JSON object stays as it is.
    """
    try:
        known = json.loads(config)
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict):
        return config, ""
    value = json.dumps(dtype).encode()
    before = sorted({match[2].decode().strip('"') for match in _DTYPE.finditer(config)} - {dtype})
    if _DTYPE.search(config):
        changed = _DTYPE.sub(lambda match: match[1] + value, config)
    else:
        end = config.rindex(b"}")
        comma = b"," if known else b""
        changed = config[:end].rstrip() + comma + b'\n  "torch_dtype": ' + value + b"\n" + config[end:]
        before = ["nothing"]
    return (
        (changed, f"config.json says dtype {dtype}, in place of {', '.join(before)}")
        if before
        else (config, "")
    )
