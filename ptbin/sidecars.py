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
from collections.abc import Callable, Iterator, Mapping

from ptbin.draft import DraftFile
from ptbin.sources import SourcePlace
from ptbin.stores import ListedObject
from ptbin.vouching import OutputSite

__all__ = ["change_of", "copy_sidecars", "find_sidecars", "put_text", "with_dtype"]

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


def find_sidecars(source: SourcePlace) -> dict[str, ListedObject]:
    """By their names those that lie in the source's folder, or in its `huggingface/`.

    What lies next to the weights comes first. A file's path is below the source's folder.
    """
    found: dict[str, ListedObject] = {}
    for item in itertools.islice(source.store.iter_objects(source.folder), MAX_LISTED):
        name = item.path.removeprefix(f"{HUGGING_FACE_FOLDER}/")
        if "/" in name or not any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS):
            continue
        if name.isprintable() and item.size <= MAX_NBYTES and (name == item.path or name not in found):
            found[name] = item
    return found


def copy_sidecars(
    found: Mapping[str, ListedObject],
    source: SourcePlace,
    at: OutputSite,
    *,
    dtype: str | None,
    notes: list[str],
) -> Iterator[DraftFile]:
    """Copy them from the source's folder to the output's.

    They go along as they are, but for `config.json` where weights are cast to `dtype`: it says so then.

    Args:
        notes: for the manifest; what was changed is added.

    Raises:
        OutputExistsError: another file is at the place of one.
    """
    for name, item in found.items():
        if name == "config.json" and dtype is not None:
            data = source.store.read_bytes(f"{source.folder}/{item.path}", limit=MAX_CONFIG_NBYTES)
            data, note = with_dtype(data, dtype)
            notes += [note] if note else []
            yield put_text(at, name, data)
            continue
        crc = 0
        with (
            source.store.open_reader(f"{source.folder}/{item.path}") as reader,
            at.store.open_writer(at.path_of(name), size_hint=reader.size, claim=at.claim) as writer,
        ):
            for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
                crc = zlib.crc32(piece, crc)
                writer.write(piece)
            reader.check_unchanged()
            at.check(name, reader.size, crc)
            at.withdraw_manifest((name, reader.size, crc))
            writer.commit()
            yield DraftFile(name, reader.size, crc)


def put_text(at: OutputSite, name: str, data: bytes) -> DraftFile:
    """Write a small file next to an output. Raises OutputExistsError as `OutputSite.check`."""
    crc = zlib.crc32(data)
    at.check(name, len(data), crc)
    at.withdraw_manifest((name, len(data), crc))
    at.store.write_bytes(at.path_of(name), data, claim=at.claim)
    return DraftFile(name, len(data), crc)


def change_of(name: str, dtype: str | None) -> Callable[[bytes], bytes] | None:
    """What a mirror that casts to `dtype` changes in a file of this name; None where it copies it as it is.

    Only the configuration of a model of transformers', and only its element type: there may be others of the
    name, and no weights next to them.
    """
    if name != "config.json" or dtype is None:
        return None

    def change(config: bytes) -> bytes:
        changed, _ = with_dtype(config, dtype)
        if changed == config or _DTYPE.search(config):
            return changed
        known = json.loads(config)
        return changed if "model_type" in known or "architectures" in known else config

    return change


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
