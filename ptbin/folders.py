"""Which files of a folder are one checkpoint: decided by their names alone. Pure.

Listing (`catalog`) and opening (`sources`) both ask here, so that both mean the same files. A checkpoint of
several files has a *handle*, the path that names it: the folder itself, or the index file in it.

Sources: torch.distributed.checkpoint's FileSystemWriter (`.metadata`, `__<rank>_<n>.distcp`), Lightning's
FSDP strategy (`meta.pt` beside those), DeepSpeed's engine (`_get_ckpt_name`, `_get_zero_ckpt_name`),
transformers' `SAFE_WEIGHTS_INDEX_NAME` and `WEIGHTS_INDEX_NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptbin.stores.joined import joint_identity

if TYPE_CHECKING:
    from ptbin.stores import Identity, ListedObject

__all__ = ["DCP_METADATA", "INDEX_SUFFIX", "Group", "Grouping", "is_folder_part", "main_handle"]

INDEX_SUFFIX = ".index.json"
DCP_METADATA = ".metadata"
LIGHTNING_METADATA = "meta.pt"

_INDEX = re.compile(r"^(?P<stem>.+)\.(?P<kind>bin|safetensors)\.index\.json$")
_SHARD = re.compile(r"^(?P<stem>.+)-\d{5,}-of-\d{5,}\.(?P<kind>bin|safetensors)$")
_OPTIM_STATES = re.compile(r"^(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt$")
_MODEL_STATES = re.compile(r"^(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt$")

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
        kind: `torch_dcp`, `deepspeed_zero` or `sharded`.
        handle: path of the folder (empty for the listed place itself) or of the index file.
        folder: path of the folder.
    """

    kind: str
    handle: str
    folder: str
    members: tuple[ListedObject, ...]

    @property
    def size(self) -> int:
        return sum(member.size for member in self.members)

    @property
    def identity(self) -> Identity:
        """Of all files together, by their names within the folder."""
        cut = len(self.folder) + 1 if self.folder else 0
        return joint_identity((m.path[cut:], m.size, m.identity) for m in self.members)


def is_folder_part(name: str) -> bool:
    """Whether a file of this name may be part of a checkpoint of several files."""
    suffixes = (".distcp", INDEX_SUFFIX, "_states.pt", ".bin", ".safetensors")
    return name in (DCP_METADATA, LIGHTNING_METADATA) or name.endswith(suffixes)


class Grouping:
    """Files of a listing, held back until it ends because a later one may claim them."""

    def __init__(self) -> None:
        self._folders: dict[str, list[ListedObject]] = {}

    def add(self, item: ListedObject) -> None:
        self._folders.setdefault(item.path.rpartition("/")[0], []).append(item)

    def finish(self) -> tuple[list[Group], list[ListedObject]]:
        """The groups found, and the files that belong to none."""
        groups: list[Group] = []
        single: list[ListedObject] = []
        for folder, items in self._folders.items():
            found = _groups_in(folder, items)
            claimed = {member.path for group in found for member in group.members}
            groups.extend(found)
            single.extend(item for item in items if item.path not in claimed)
        return groups, single


def _groups_in(folder: str, items: Sequence[ListedObject]) -> list[Group]:
    names = {item.path.rpartition("/")[2]: item for item in items}
    groups: list[Group] = []

    def add(kind: str, handle: str, members: Iterable[str]) -> None:
        groups.append(Group(kind, handle, folder, tuple(names[name] for name in sorted(members))))

    chunks = [name for name in names if name.endswith(".distcp")]
    if DCP_METADATA in names and chunks:
        add("torch_dcp", folder, [n for n in (DCP_METADATA, LIGHTNING_METADATA) if n in names] + chunks)
    optimizers = [name for name in names if _OPTIM_STATES.match(name)]
    if optimizers:
        add("deepspeed_zero", folder, optimizers + [name for name in names if _MODEL_STATES.match(name)])
    for name in sorted(names):
        match = _INDEX.match(name)
        if match is None:
            continue
        shards = [n for n in names if (m := _SHARD.match(n)) and m.groupdict() == match.groupdict()]
        whole = f"{match['stem']}.{match['kind']}"
        if not shards and whole in names:
            shards = [whole]
        if shards:
            add("sharded", names[name].path, [name, *shards])
    return groups


def main_handle(items: Iterable[ListedObject]) -> Group | ListedObject | None:
    """The one checkpoint that a folder is, from the files directly in it; None where it is not one.

    A DCP or DeepSpeed folder is its own; in a Hugging Face folder the weights come in transformers' order.
    """
    grouping = Grouping()
    for item in items:
        grouping.add(item)
    groups, single = grouping.finish()
    own = [group for group in groups if group.kind != "sharded"]
    if len(own) == 1:
        return own[0]
    if own:
        return None
    by_name: dict[str, Group | ListedObject] = {group.handle: group for group in groups}
    by_name.update({item.path: item for item in single})
    for name in _MAIN:
        if name in by_name:
            return by_name[name]
    return groups[0] if len(groups) == 1 else None
