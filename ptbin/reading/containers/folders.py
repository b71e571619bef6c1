"""Checkpoints in several files: which kind of folder it is, by the names of the files."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.dcp.folder import read_dcp
from ptbin.reading.containers.deepspeed.experts import read_deepspeed_experts
from ptbin.reading.containers.deepspeed.layers import read_deepspeed_layers
from ptbin.reading.containers.deepspeed.ranks import read_deepspeed_ranks
from ptbin.reading.containers.deepspeed.universal import read_deepspeed_universal
from ptbin.reading.containers.deepspeed.zero import read_deepspeed
from ptbin.reading.containers.hf_shards import read_hf_shards
from ptbin.reading.containers.indexed import read_indexed
from ptbin.reading.containers.megatron_parts import read_megatron_parts
from ptbin.reading.containers.meta_parts import read_meta_parts
from ptbin.reading.containers.rank_files import read_rank_files
from ptbin.sources.deepspeed_names import deepspeed_checkpoint
from ptbin.sources.folders import DCP_METADATA
from ptbin.sources.part_names import (
    INDEX_SUFFIX,
    is_megatron_name,
    is_meta_name,
    is_rank_name,
    is_torch_shard,
)

FOLDER_CONTAINERS: tuple[tuple[Callable[[Collection[str]], bool], Callable[[Folder], Checkpoint]], ...] = (
    (lambda names: DCP_METADATA in names, read_dcp),
    (lambda names: deepspeed_checkpoint(names)[0] == "deepspeed_universal", read_deepspeed_universal),
    (lambda names: deepspeed_checkpoint(names)[0] == "deepspeed_layers", read_deepspeed_layers),
    (lambda names: deepspeed_checkpoint(names)[0] == "deepspeed_experts", read_deepspeed_experts),
    (lambda names: deepspeed_checkpoint(names)[0] == "deepspeed_zero", read_deepspeed),
    (lambda names: deepspeed_checkpoint(names)[0] == "deepspeed_ranks", read_deepspeed_ranks),
    (lambda names: any(is_torch_shard(name) for name in names), read_hf_shards),
    (lambda names: is_meta_name(next(iter(names))), read_meta_parts),
    (lambda names: is_megatron_name(next(iter(names))), read_megatron_parts),
    (lambda names: any(name.endswith(INDEX_SUFFIX) for name in names), read_indexed),
    (lambda names: is_rank_name(next(iter(names))), read_rank_files),
)
"""By the names of the files: whose they are, and its reader."""
