"""Which file names an output may have beside its own: shards, an index, the parts of `--split`. Pure."""

from __future__ import annotations

import re

from ptbin.sources.companions import is_sidecar
from ptbin.sources.part_names import INDEX_SUFFIX

SHARD_NUMBER = re.compile(r"-\d{5,}-of-\d{5,}(?=\.[a-z]+$)")


def split_bases(name: str) -> list[str]:
    """Outputs that a file of this name may be a part of by `--split`: `a/last.model.ema.bin` of
    `a/last.model.bin` or of `a/last.bin`.
    """
    folder, slash, file = SHARD_NUMBER.sub("", name).rpartition("/")
    stem, _, suffix = file.rpartition(".")
    bases = []
    while "." in stem:
        stem = stem.rpartition(".")[0]
        bases.append(f"{folder}{slash}{stem}.{suffix}")
    return bases


def is_named_after(name: str, base: str) -> bool:
    """Whether an output called `base` may have a file called `name`.

    Nothing is deleted on a manifest's word alone: it may be anybody's, and list anybody's files.
    """
    whole = SHARD_NUMBER.sub("", name.removesuffix(INDEX_SUFFIX))
    return whole == base or base in split_bases(whole) or is_sidecar(name)
