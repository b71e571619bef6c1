"""Which files of a folder are one checkpoint: decided by their names alone. Pure.

Listing (`catalog`) and opening (`sources`) both ask here, so that both mean the same files. A checkpoint of
several files has a *handle*, the path that names it: the folder itself, or the index file in it.

Sources: torch.distributed.checkpoint's FileSystemWriter (`.metadata`, `__<rank>_<n>.distcp`), Lightning's
FSDP strategy (`meta.pt` next to those), Megatron-LM (`common.pt`), DeepSpeed's engine (`_get_ckpt_name`,
`_get_zero_ckpt_name`), transformers' `SAFE_WEIGHTS_INDEX_NAME` and `WEIGHTS_INDEX_NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptbin.sources.deepspeed_names import UNIVERSAL_OPTIMIZER, deepspeed_checkpoint
from ptbin.sources.leftovers import is_leftover
from ptbin.sources.part_names import (
    INDEX_SUFFIX,
    META_PARAMETERS,
    find_parts,
    is_megatron_name,
    is_meta_name,
    is_only_rank,
    may_be_part,
    split_place,
)
from ptbin.stores.joined import joint_identity

if TYPE_CHECKING:
    from ptbin.stores import Identity, ListedObject

DCP_METADATA = ".metadata"
LIGHTNING_METADATA = "meta.pt"
COMMON_STATE = "common.pt"
"""Megatron's arguments and counters next to its `torch_dist` folders; they hold no weights."""

_INDEX = re.compile(r"^(?P<stem>.+)\.(?P<kind>bin|safetensors)\.index\.json$")
_SHARD = re.compile(r"^(?P<stem>.+)-\d{5,}-of-\d{5,}\.(?P<kind>bin|safetensors)$")
_OWN_FOLDER = (
    "torch_dcp",
    "deepspeed_zero",
    "deepspeed_experts",
    "deepspeed_layers",
    "deepspeed_ranks",
    "deepspeed_universal",
)
_EACH_BY_ITSELF = ("deepspeed_experts", "deepspeed_layers", "deepspeed_ranks")
"""Whose files are weights by themselves, for callers that take parts knowingly."""

_MERGED = ("torch_ranks", "meta_parts", "megatron_parts", "hf_shards")
"""Parts that are put together; a name such as `rank0.pt` is a weaker sign than a folder's index."""


# In the order in which transformers and peft look for them.
_MAIN = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


@dataclass(frozen=True, slots=True)
class Group:
    """The files of one checkpoint, by path below the listed place.

    Attributes:
        kind: one of `_OWN_FOLDER` or `_MERGED`, `sharded`, or `parts` for
            those that nothing here puts together.
        handle: path of the folder (empty for the listed place itself), the index file or the first part.
        folder: path of the folder.
        why: of `parts`, what they are and what to do.
    """

    kind: str
    handle: str
    folder: str
    members: tuple[ListedObject, ...]
    why: str = ""

    @property
    def size(self) -> int:
        return sum(member.size for member in self.members)

    @property
    def identity(self) -> Identity:
        """Of all files together, by their names within the folder."""
        cut = len(self.folder) + 1 if self.folder else 0
        return joint_identity((m.path[cut:], m.size, m.identity) for m in self.members)


def is_folder_part(name: str) -> bool:
    """Whether a file of this name (by `split_place`) may be part of a checkpoint of several files."""
    suffixes = (".distcp", INDEX_SUFFIX, "_states.pt", ".bin", ".safetensors")
    beside = (DCP_METADATA, LIGHTNING_METADATA, COMMON_STATE, META_PARAMETERS, UNIVERSAL_OPTIMIZER)
    return name in beside or name.endswith(suffixes) or may_be_part(name)


class Grouping:
    """Files of a listing, held back until it ends because a later one may claim them.

    With `parts` those that are weights by themselves stay single: the caller takes each knowingly.
    """

    def __init__(self, *, parts: bool = False) -> None:
        self._parts = parts
        self._folders: dict[str, list[ListedObject]] = {}

    def add(self, item: ListedObject) -> None:
        self._folders.setdefault(split_place(item.path)[0], []).append(item)

    def finish(self) -> tuple[list[Group], list[ListedObject]]:
        """The groups found, and the files that belong to none."""
        groups: list[Group] = []
        single: list[ListedObject] = []
        for folder, items in self._folders.items():
            found, rest = _grouped(folder, items, parts=self._parts)
            groups += found
            single += rest
        return groups, single


def _grouped(
    folder: str, items: Sequence[ListedObject], *, parts: bool
) -> tuple[list[Group], list[ListedObject]]:
    """The groups among a folder's files, and the files of none; `parts` as `Grouping` has it.

    The folder names one checkpoint: where several are in it that are put together, each is `parts`.
    """
    cut = len(folder) + 1 if folder else 0
    names = {item.path[cut:]: item for item in items}
    left = dict(names)
    groups: list[Group] = []

    def take(kind: str, handle: str, members: Sequence[str], why: str = "") -> None:
        groups.append(Group(kind, handle, folder, tuple(names[name] for name in members), why))
        for name in members:
            left.pop(name, None)

    chunks = [name for name in left if name.endswith(".distcp")]
    if DCP_METADATA in left and chunks:
        beside = (DCP_METADATA, LIGHTNING_METADATA, COMMON_STATE)
        take("torch_dcp", folder, sorted([name for name in beside if name in left] + chunks))
    kind, members = deepspeed_checkpoint(names)
    if kind and not (parts and kind in _EACH_BY_ITSELF):
        take(kind, folder, sorted(members))
    for index, match in ((name, _INDEX.match(name)) for name in sorted(names)):
        if match is not None:
            shards = [n for n in names if (m := _SHARD.match(n)) and m.groupdict() == match.groupdict()]
            whole = f"{match['stem']}.{match['kind']}"
            if shards or whole in names:
                take("sharded", names[index].path, sorted([index, *(shards or [whole])]))
    if parts:
        return groups, list(left.values())
    has_own = any(group.kind in _OWN_FOLDER for group in groups)
    # An index that names shards of its own vouches for them; the others' index is missing.
    found = find_parts(left)
    merged = [group for group in found if group.kind]
    for group in found:
        why = group.why
        if group.kind and len(merged) == 1 and not has_own:
            take(group.kind, folder, group.members)
            continue
        if group.kind:
            others = ", ".join(other.members[0] for other in merged if other is not group)
            why += f"; next to other parts in one folder ({others}), of which each needs a folder of its own"
        take("parts", names[group.members[0]].path, group.members, why)
    return groups, list(left.values())


def main_handle(items: Iterable[ListedObject]) -> Group | ListedObject | None:
    """The one checkpoint that a folder is, from the files directly in it; None where it is not one.

    A DCP or DeepSpeed folder is its own; in a Hugging Face folder the weights come in transformers' order.
    """
    grouping = Grouping()
    for item in items:
        grouping.add(item)
    groups, single = grouping.finish()
    own = [group for group in groups if group.kind in _OWN_FOLDER]
    if len(own) == 1:
        return own[0]
    if own:
        return None
    alone = [item for item in single if is_only_rank(item.path) or is_meta_name(item.path)]
    ranks = [item for item in single if is_megatron_name(item.path)]
    if len(ranks) == 1 and not groups:
        return Group("megatron_parts", "", "", tuple(ranks))
    if len(alone) == 1 and not groups:
        parameters = [item for item in single if item.path == META_PARAMETERS]
        if is_meta_name(alone[0].path) and parameters:
            return Group("meta_parts", "", "", (*alone, *parameters))
        return alone[0]
    parts = [group for group in groups if group.kind == "parts" or group.kind in _MERGED]
    by_name: dict[str, Group | ListedObject] = {group.handle: group for group in groups if group not in parts}
    by_name.update({item.path: item for item in single})
    for name in _MAIN:
        if name in by_name:
            return by_name[name]
    whole = [group for group in groups if group not in parts]
    if len(whole) == 1 and not parts:
        return whole[0]
    # Parts and nothing that could be meant instead.
    if not parts or whole or any(_may_be_weights(item.path) for item in single):
        return None
    return next((group for group in parts if group.kind in _MERGED), parts[0])


def _may_be_weights(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors")) and not is_leftover(name)
