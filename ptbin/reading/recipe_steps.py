"""A recipe applied to the state dict that was selected: the same weights under other names, cut otherwise."""

from __future__ import annotations

import re
from typing import Any

from ptbin.errors import CorruptArchiveError, ModelMismatchError, UsageError
from ptbin.merging.planner import plan_recipe
from ptbin.merging.shipped import find_recipe
from ptbin.reading.containers.checkpoint import Checkpoint
from ptbin.reading.containers.megatron import megatron_facts
from ptbin.values.state_dict import StateDict
from ptbin.values.tensors import TensorRef


def apply_recipe(state_dict: StateDict, text: str, checkpoint: Checkpoint) -> None:
    """Let the entries be what the recipe makes of them; what is not a tensor is kept, or left out by a rule.

    Raises:
        ModelMismatchError: a rule does not fit, no rule names a tensor, elements would be used twice or not
            at all.
        IncompleteCheckpointError: a source is missing.
    """
    recipe = find_recipe(text)
    if not recipe.rules:
        return  # it only says how parts make a whole
    tensors = {name: value for name, value in state_dict.entries if isinstance(value, TensorRef)}
    try:
        facts = checkpoint.facts or megatron_facts(checkpoint.root)
        planned = plan_recipe(recipe, tensors, facts, checkpoint.uri)
    except (UsageError, CorruptArchiveError) as error:
        # The recipe is well formed and the file sound: they are not for each other.
        raise ModelMismatchError(f"{checkpoint.uri}: {error}") from error
    left = dict(planned.left_out)
    first: dict[str, list[tuple[str, Any]]] = {}
    sources: dict[str, str] = {}
    for name, (tensor, names) in planned.tensors.items():
        first.setdefault(names[0], []).append((name, tensor))
        if name in planned.renamed:
            sources[name] = names[0]
    left |= {
        name: rule.role
        for name, value in state_dict.entries
        for rule in recipe.rules
        if rule.to is None
        and not isinstance(value, TensorRef)
        and any(re.fullmatch(source, name) for source in rule.sources)
    }
    kept = set(planned.kept)
    entries: list[tuple[str, Any]] = []
    for name, value in state_dict.entries:
        entries.extend(first.get(name, []))
        if name in kept or (name not in tensors and name not in left):
            entries.append((name, value))
        if name in left:
            reason = f"left out by recipe {recipe.name}"
            state_dict.leave_out(name, left[name], reason, value)
    for name in dict.fromkeys(planned.padded):
        state_dict.leave_out(name, "padding", f"cut off by recipe {recipe.name}", tensors[name])
    state_dict.entries = entries
    state_dict.source_names = sources
    state_dict.made_of = {name: names for name, (_, names) in planned.tensors.items()}
    state_dict.metadata = None  # versions of modules that are called otherwise now
