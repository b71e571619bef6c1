"""DeepSpeed's tensor-parallel ranks without ZeRO: `mp_rank_<n>_model_states.pt`, each a slice of `module`.

AutoTP and Megatron-DeepSpeed say in the files how the slices make a whole; GPT-NeoX's are known by their
names (`rules`). Costs: the index of each file, and small tensors that are summed over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptbin.errors import CorruptArchiveError
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.deepspeed.models import leave_out_states, mapping_in, model_files
from ptbin.reading.containers.deepspeed.rules import (
    Rules,
    merge_states,
    parallel_degree,
    rules_of,
    tensor_ranks_of,
)
from ptbin.reading.containers.part_files import PartFiles
from ptbin.values.nodes import DictNode


@dataclass(frozen=True, slots=True)
class Ranks:
    """Model states of all tensor-parallel ranks, put together.

    Attributes:
        names: of the files, in the order of the ranks.
        root: of the first one; its `module` is the whole.
        rules: by which it was put together.
    """

    names: Sequence[str]
    root: DictNode
    rules: Rules


def read_deepspeed_ranks(folder: Folder) -> Checkpoint:
    """Index the ranks' files; `module` is the model.

    Raises:
        IncompleteCheckpointError: a rank is missing or of another save; nothing says how slices make a whole.
    """
    files = PartFiles(folder)
    ranks = merge_model_states(files, model_ranks(files))
    return files.checkpoint("deepspeed_ranks", ranks.root, preferred="module")


def model_ranks(files: PartFiles) -> dict[int, str]:
    """Tensor-parallel rank to the name of its model states."""
    found = model_files(files)
    for name in (name for own in found.values() for rank, name in own.items() if rank is not None):
        files.refuse(
            f"{name} is of ZeRO stage 3, whose parameters lie in the *_optim_states.pt files; convert the "
            "folder with those files in it"
        )
    return {number: own[None] for number, own in found.items()}


def merge_model_states(files: PartFiles, ranks: Mapping[int, str]) -> Ranks:
    """Open the files and merge their `module`.

    Raises: as `read_deepspeed_ranks`.
    """
    missing = [number for number in range(max(ranks) + 1) if number not in ranks]
    if missing:
        files.refuse_missing(
            f"mp_rank_{missing[0]:02d}_model_states.pt", f" of {max(ranks) + 1} ranks or more"
        )
    names = [ranks[number] for number in sorted(ranks)]
    roots = [_opened(files, name, len(names)) for name in names]
    rules = rules_of(files, roots[0], names[0], files.folder.recipe)
    buffers = roots[0].get("buffer_names")
    buffer_names = (
        set(buffers) if isinstance(buffers, list) and all(type(b) is str for b in buffers) else set()
    )
    module: DictNode = roots[0].get("module")
    if len(roots) > 1:
        states = [(name, dict(root.get("module").pairs)) for name, root in zip(names, roots, strict=True)]
        module.pairs = merge_states(files, states, rules, buffer_names)
    for name, root in zip(names[1:], roots[1:], strict=True):
        leave_out_states(files, name, root, kept="module")
    return Ranks(names, roots[0], rules)


def _opened(files: PartFiles, name: str, count: int) -> DictNode:
    root = mapping_in(files, name)
    if not isinstance(root.get("module"), DictNode):
        raise CorruptArchiveError(f"{files.uri}: {name} holds no mapping `module`")
    stated = tensor_ranks_of(root)
    if stated is not None and stated != count:
        files.refuse(
            f"{name} is of {stated} tensor-parallel ranks, {count} are there"
            + (f": mp_rank_{count:02d}_model_states.pt is missing" if stated > count else "")
            + "; fetch the folder again, whole"
        )
    pipeline = parallel_degree(root, "pp_degree")
    if pipeline is not None and pipeline > 1:
        files.refuse(
            f"{name} is of {pipeline} stages of a pipeline, whose layers lie in files that are not there"
        )
    return root
