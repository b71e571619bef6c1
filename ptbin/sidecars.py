"""Files that belong to a Hugging Face model beside its weights: configuration, tokenizer, chat template.

Chosen by name. Code (`*.py`) stays where it is: a folder that ptbin writes never makes anybody run some.
"""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Callable, Iterator

from ptbin.draft import DraftFile
from ptbin.sources import SourcePlace
from ptbin.stores import Store

__all__ = ["copy_sidecars"]

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
MAX_NBYTES = 256 << 20
MAX_LISTED = 10_000
CHUNK_NBYTES = 1 << 20


def copy_sidecars(
    source: SourcePlace, dest: Store, folder: str, check: Callable[[str, int, int], None]
) -> Iterator[DraftFile]:
    """Copy those that lie in the source's folder to `folder`, as they are.

    `check` is called with name, size and CRC-32 before a file is put in its place, and may refuse.
    """
    for listed, item in enumerate(source.store.iter_objects(source.folder)):
        if listed > MAX_LISTED:
            return
        name = item.path
        if "/" in name or not any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS):
            continue
        if not name.isprintable() or item.size > MAX_NBYTES:
            continue
        crc = 0
        with (
            source.store.open_reader(f"{source.folder}/{name}") as reader,
            dest.open_writer(f"{folder}/{name}", size_hint=reader.size) as writer,
        ):
            for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
                crc = zlib.crc32(piece, crc)
                writer.write(piece)
            reader.check_unchanged()
            check(name, reader.size, crc)
            writer.commit()
            yield DraftFile(name, reader.size, crc)
