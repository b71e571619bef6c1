"""Meta's `consolidated.NN.pth`: tensor-parallel parts of a Llama, with `params.json` next to them.

Each file is a flat state dict of one rank's parts under the same names; how they make a whole is recipe
`llama-meta` (`merging.shipped`). A folder of one part is whole already; it is read here for the numbers in
`params.json`, which `--recipe llama-hf` needs. Costs: the index of each file.
"""

from __future__ import annotations

import json

from ptbin.errors import CorruptArchiveError
from ptbin.merging.recipes import Merge
from ptbin.merging.shipped import find_recipe
from ptbin.merging.tiles import Part
from ptbin.reading.containers.checkpoint import Checkpoint, Folder
from ptbin.reading.containers.merges import merge_parts
from ptbin.reading.containers.part_files import PartFiles
from ptbin.sources.part_names import META_PARAMETERS
from ptbin.stores.joined import JoinedReader
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import TensorRef

MAX_PARAMETERS_NBYTES = 1 << 20
MAX_NUMBER = 1 << 40
DEFAULT_RECIPE = "llama-meta"


def read_meta_parts(folder: Folder) -> Checkpoint:
    """Index all parts.

    Raises:
        IncompleteCheckpointError: parts that do not go together. UsageError: a name that no rule merges.
    """
    reader, recipe = folder.reader, folder.recipe
    files = PartFiles(folder)
    names = sorted(name for name in reader.names if name != META_PARAMETERS)
    found: dict[str, list[Part]] = {}
    root: DictNode | None = None
    for name in names:
        own = files.open(name).root
        if not isinstance(own, DictNode):
            raise CorruptArchiveError(f"{files.uri}: {name} holds no mapping of names to tensors")
        held = own.by_name()
        for key, value in held.items():
            if isinstance(value, TensorRef):
                found.setdefault(key, []).append(Part(value, name))
            elif root is not None:
                files.leave_out(name, [value])
        root = own if root is None else root
    assert root is not None
    facts = _parameters(reader)
    norm = found.get("norm.weight")
    if norm is not None and len(norm[0].tensor.shape) == 1:
        facts.setdefault("dim", norm[0].tensor.shape[0])
    if "n_heads" in facts:
        facts.setdefault("n_kv_heads", facts["n_heads"])
    _refuse_missing(files, found, facts, names)
    whole = {}
    for key, parts in found.items():
        if len(parts) != len(names):
            absent = next(name for name in names if name not in {part.home for part in parts})
            files.refuse(f"{key[:200]!r} is in {parts[0].home} and not in {absent}: they are not of one save")
        whole[key] = merge_parts(files, key, parts, _merges(recipe), facts)
    root.pairs = [(key, whole.get(key, value) if type(key) is str else value) for key, value in root.pairs]
    return files.checkpoint("meta_parts", root, facts=facts)


def _refuse_missing(
    files: PartFiles, found: dict[str, list[Part]], facts: dict[str, int], names: list[str]
) -> None:
    """Hold the parts against the rows that queries have: nothing else says how many parts there are."""
    rows = facts.get("dim")
    if "head_dim" in facts and "n_heads" in facts:
        rows = facts["head_dim"] * facts["n_heads"]
    query = next((parts for key, parts in found.items() if key.endswith(".attention.wq.weight")), None)
    if rows is None or query is None or files.folder.parts:
        return
    held = sum(part.tensor.shape[0] for part in query if part.tensor.shape)
    if held < rows:
        absent = f"consolidated.{len(names):02d}.pth"
        files.refuse(
            f"the queries of {len(names)} parts have {held} of {rows} rows: {absent} is missing, and maybe "
            "more; fetch them"
        )


def _merges(recipe: str | None) -> tuple[Merge, ...]:
    own = find_recipe(recipe).merges if recipe is not None else ()
    return own or find_recipe(DEFAULT_RECIPE).merges


def _parameters(reader: JoinedReader) -> dict[str, int]:
    """Whole numbers of `params.json`, where there is one."""
    if META_PARAMETERS not in reader.names:
        return {}
    part = reader.part(META_PARAMETERS)
    if part.size > MAX_PARAMETERS_NBYTES:
        raise CorruptArchiveError(f"{part.uri}: {part.size} bytes of parameters")
    try:
        found = json.loads(part.read(0, part.size))
    except (ValueError, RecursionError) as error:
        raise CorruptArchiveError(f"{part.uri}: not JSON: {error}") from error
    numbers = found.items() if isinstance(found, dict) else ()
    return {name: n for name, n in numbers if type(n) is int and 0 < n < MAX_NUMBER}
