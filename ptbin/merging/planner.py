"""From a recipe and whole tensors to those of the output, proven: every element of every source is used once.

Pure. Each rule is applied twice, to the tensors as if each had a separate storage, which proves that all
of every source is used and nothing twice, and to where they really lie, which proves that every element of
the output is covered and gives the places.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ptbin.errors import (
    CheckpointError,
    CorruptArchiveError,
    IncompleteCheckpointError,
    OutputCollisionError,
    UsageError,
)
from ptbin.merging.coverage import prove_used
from ptbin.merging.recipes import PLACE, Recipe, Rule, Step, evaluate
from ptbin.merging.views import View, concatenated, leaf, stacked, view_of
from ptbin.values.tensors import Storage, TensorRef

MAX_UNSTACKED = 1 << 16
MAX_DIGITS = 9
"""Of a number in a tensor's name that a rule counts by."""


@dataclass(slots=True)
class Planned:
    """What a recipe makes of a state dict.

    Attributes:
        tensors: name to tensor and the names of the sources it is made of, in the order of the first of them.
        renamed: those that are a source as it is, under another name.
        left_out: (name, role) of sources that a rule leaves out.
        padded: names of sources of which a step cuts something off.
        kept: names that no rule concerns.
    """

    tensors: dict[str, tuple[TensorRef, tuple[str, ...]]] = field(default_factory=dict)
    renamed: set[str] = field(default_factory=set)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def plan_recipe(
    recipe: Recipe, tensors: Mapping[str, TensorRef], facts: Mapping[str, int], uri: str
) -> Planned:
    """Apply the rules.

    Raises:
        UsageError: a tensor that no rule names, a value that nothing states, steps that do not fit a shape.
        IncompleteCheckpointError: a source that a rule needs is missing.
        CorruptArchiveError: elements that would be used twice or not at all.
    """
    return _Plan(recipe, tensors, facts, uri).made()


class _Plan:
    def __init__(
        self, recipe: Recipe, tensors: Mapping[str, TensorRef], facts: Mapping[str, int], uri: str
    ) -> None:
        self.recipe = recipe
        self.tensors = tensors
        self.uri = uri
        self.values = dict(facts)
        for name, expression in recipe.values:
            # The recipe's values stand in for what the checkpoint does not state.
            self.values[name] = evaluate(expression, self.values)
        self.known: dict[object, Storage] = {}
        self.used: dict[str, list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = {}
        self.leaves: dict[str, View] = {}
        self.padded: list[str] = []

    def made(self) -> Planned:
        found = Planned()
        made: list[tuple[int, str, TensorRef, tuple[str, ...]]] = []
        order = {name: index for index, name in enumerate(self.tensors)}
        claimed: set[str] = set()
        for number, rule in enumerate(self.recipe.rules):
            try:
                for groups, sources in self._matches(rule):
                    names = tuple(name for stack in sources for name in stack)
                    claimed.update(names)
                    if rule.to is None:
                        found.left_out.extend((name, rule.role) for name in names)
                        continue
                    for name, tensor in self._outputs(rule, groups, sources):
                        made.append((order[names[0]], name, tensor, names))
                        if len(names) == 1 and not rule.steps and not rule.stack:
                            found.renamed.add(name)
            except (UsageError, CheckpointError) as error:
                raise type(error)(f"{error} (tensors {number}, from {rule.sources[0][:80]!r})") from error
        for name, views in self.used.items():
            prove_used(self._what(name), self.tensors[name].numel, views)
        if not claimed:
            raise UsageError(f"recipe {self.recipe.name!r} names none of {len(self.tensors)} tensors")
        rest = [name for name in self.tensors if name not in claimed]
        if rest and self.recipe.others == "refuse":
            raise UsageError(
                f"recipe {self.recipe.name!r} has no rule for {len(rest)} tensors: "
                f'{", ".join(rest[:5])}; add rules, or "others": "keep"'
            )
        found.kept = rest
        found.padded = self.padded
        taken = set(rest)
        for _, name, tensor, names in sorted(made, key=lambda row: row[0]):
            if name in taken:
                raise OutputCollisionError(f"recipe {self.recipe.name!r} makes {name!r} twice")
            taken.add(name)
            found.tensors[name] = (tensor, names)
        return found

    def _what(self, name: str) -> str:
        return f"recipe {self.recipe.name!r}, {name[:200]!r}"

    def _matches(self, rule: Rule) -> Iterator[tuple[dict[str, str], list[tuple[str, ...]]]]:
        """For each set of equal groups: the names that each source takes, stacked ones in order."""
        found: dict[tuple[tuple[str, str], ...], list[dict[int, str]]] = {}
        for number, source in enumerate(rule.sources):
            pattern = re.compile(source)
            for name in self.tensors:
                match = pattern.fullmatch(name)
                if match is None:
                    continue
                groups = {key: value or "" for key, value in match.groupdict().items()}
                groups |= {str(i): value or "" for i, value in enumerate(match.groups(), start=1)}
                index = groups.pop(rule.stack, "0") if rule.stack else "0"
                if rule.stack:  # the number of a named group names the same
                    groups.pop(str(pattern.groupindex.get(rule.stack, 0)), None)
                stacks = found.setdefault(tuple(sorted(groups.items())), [{} for _ in rule.sources])
                if not index.isdecimal() or len(index) > MAX_DIGITS:
                    raise UsageError(f"recipe: {rule.stack!r} of {source!r} is {index!r}, not a number")
                if stacks[number].setdefault(int(index), name) != name:
                    raise UsageError(f"{self.uri}: {stacks[number][int(index)]!r} and {name!r} match alike")
        for key, stacks in found.items():
            sources = [self._complete(rule, number, stack, stacks) for number, stack in enumerate(stacks)]
            yield dict(key), sources

    def _complete(
        self, rule: Rule, number: int, stack: dict[int, str], stacks: list[dict[int, str]]
    ) -> tuple[str, ...]:
        count = max(max(other, default=-1) for other in stacks) + 1
        missing = [index for index in range(min(count, len(stack) + 1)) if index not in stack]
        if missing:
            example = next(name for other in stacks for name in other.values())
            raise IncompleteCheckpointError(
                f"{self.uri}: next to {example!r} recipe {self.recipe.name!r} needs what matches "
                f"{rule.sources[number]!r}" + (f" with {rule.stack} {missing[0]}" if rule.stack else "")
            )
        return tuple(stack[index] for index in range(count))

    def _outputs(
        self, rule: Rule, groups: dict[str, str], sources: Sequence[tuple[str, ...]]
    ) -> Iterator[tuple[str, TensorRef]]:
        for _, view in self._views(rule, sources, self._leaf, self._note_padding):
            self._use(view)
        for own, view in self._views(rule, sources, lambda name: view_of(self.tensors[name], name)):
            assert rule.to is not None
            name = self._name(rule.to, {**groups, **own})
            yield name, view.tensor(self._what(name), name, self.known)

    def _use(self, view: View) -> None:
        for box in view.boxes:
            self.used.setdefault(box.part.home, []).append((box.offset, box.shape, box.stride))

    def _note_padding(self, rest: View) -> None:
        self._use(rest)
        self.padded.extend(dict.fromkeys(box.part.home for box in rest.boxes))

    def _leaf(self, name: str) -> View:
        found = self.leaves.get(name)
        if found is None:
            found = self.leaves[name] = leaf(self.tensors[name], name)
            self.used.setdefault(name, [])
        return found

    def _views(
        self,
        rule: Rule,
        sources: Sequence[tuple[str, ...]],
        view_of_name: Callable[[str], View],
        note_padding: Callable[[View], None] = lambda _: None,
    ) -> list[tuple[dict[str, str], View]]:
        """The tensor, or the tensors of unstacked axes: each with the groups that count it."""
        parts = []
        for names in sources:
            views = [view_of_name(name) for name in names]
            self._alike(names, views, None)
            parts.append(stacked(views, 0) if rule.stack else views[0])
        results = [self._stepped(rule, view, note_padding) for view in parts]
        groups = [own for own, _ in results[0]]
        if any([own for own, _ in views] != groups for views in results):
            raise UsageError(f"recipe {self.recipe.name!r} unstacks sources of unlike length")
        joined = []
        for own, *pieces in zip(groups, *([view for _, view in views] for views in results), strict=True):
            if len(pieces) > 1:
                pieces = [piece.in_final_shape() for piece in pieces]
                self._alike([names[0] for names in sources], pieces, rule.concat)
            joined.append((own, concatenated(pieces, rule.concat) if len(pieces) > 1 else pieces[0]))
        return joined

    def _alike(self, names: Sequence[str], views: Sequence[View], axis: int | None) -> None:
        def form(view: View) -> tuple[object, ...]:
            return (view.dtype, *(n for at, n in enumerate(view.shape) if at != axis), len(view.shape))

        for name, view in zip(names, views, strict=True):
            if form(view) != form(views[0]) or (axis is not None and axis >= len(view.shape)):
                raise CorruptArchiveError(
                    f"recipe {self.recipe.name!r} puts {names[0]!r} of {views[0].dtype.name} "
                    f"{list(views[0].shape)} and {name!r} of {view.dtype.name} {list(view.shape)} together"
                )

    def _stepped(
        self, rule: Rule, view: View, note_padding: Callable[[View], None]
    ) -> list[tuple[dict[str, str], View]]:
        views: list[tuple[dict[str, str], View]] = [({}, view)]
        for step in rule.steps:
            if step.kind == "unstack":
                views = self._unstacked(step, views)
            else:
                views = [(own, self._step(step, each, note_padding)) for own, each in views]
        return views

    def _unstacked(
        self, step: Step, views: Sequence[tuple[dict[str, str], View]]
    ) -> list[tuple[dict[str, str], View]]:
        axis, group = step.arguments[0], str(step.arguments[1])
        if group == "" or any(group in own for own, _ in views):
            raise UsageError(f"recipe {self.recipe.name!r}: an axis must be unstacked into a new named group")
        found = []
        for own, view in views:
            self._axis(step, view, axis)
            if len(views) * (view.final_shape or view.shape)[axis] > MAX_UNSTACKED:
                raise UsageError(f"recipe {self.recipe.name!r}: more than {MAX_UNSTACKED} tensors of one")
            whole = view.in_final_shape()
            found += [
                ({**own, group: str(index)}, whole.at(axis, index)) for index in range(whole.shape[axis])
            ]
        return found

    def _axis(self, step: Step, view: View, *axes: int) -> None:
        shape = view.final_shape or view.shape
        if any(axis >= len(shape) for axis in axes):
            raise UsageError(
                f"recipe {self.recipe.name!r}: {step.kind} {list(step.arguments)} of a shape {list(shape)}"
            )

    def _step(self, step: Step, view: View, note_padding: Callable[[View], None]) -> View:
        view = view if step.kind == "flatten" else view.in_final_shape()
        if step.kind == "order":
            if sorted(step.arguments) != list(range(len(view.shape))):
                raise UsageError(
                    f"recipe {self.recipe.name!r}: order {list(step.arguments)} of {len(view.shape)} axes"
                )
            return view.ordered(step.arguments)
        if step.kind == "flatten":
            first, last = step.arguments
            self._axis(step, view, first, last)
            if first > last:
                raise UsageError(f"recipe {self.recipe.name!r}: flatten from {first} to {last}")
            shape = view.final_shape or view.shape
            merged = math.prod(shape[first : last + 1])
            return replace(view, final_shape=(*shape[:first], merged, *shape[last + 1 :]))
        axis = step.arguments[0]
        self._axis(step, view, axis)
        if step.kind == "cut":
            extent = view.shape[axis]
            count = self.values.get(str(step.arguments[1]), extent)
            if 0 < count < extent:
                note_padding(view.taken(axis, count, extent - count))
                view = view.taken(axis, 0, count)
            return view
        if step.kind == "take":
            first, count = (evaluate(value, self.values) for value in step.arguments[1:])
            if first < 0 or count < 0 or first + count > view.shape[axis]:
                raise UsageError(
                    f"recipe {self.recipe.name!r}: {count} from {first} on of an axis of {view.shape[axis]}"
                )
            return view.taken(axis, first, count)
        return view.split(axis, self._sizes(step.arguments[1], view.shape[axis]))

    def _sizes(self, wanted: Sequence[int | str], extent: int) -> tuple[int, ...]:
        sizes = [evaluate(size, self.values) for size in wanted]
        rest = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and rest and extent % rest == 0:
            sizes[sizes.index(-1)] = extent // rest
        if any(size < 1 for size in sizes) or math.prod(sizes) != extent:
            raise UsageError(
                f"recipe {self.recipe.name!r}: {extent} is not {' x '.join(map(str, wanted))} ({sizes})"
            )
        return tuple(sizes)

    def _name(self, template: str, groups: dict[str, str]) -> str:
        def replace(match: re.Match[str]) -> str:
            if match[1] not in groups:
                raise UsageError(f"recipe {self.recipe.name!r}: {template!r} names no group {match[1]!r}")
            if match[2] is None:
                return groups[match[1]]
            if not groups[match[1]].isdecimal() or len(groups[match[1]]) > MAX_DIGITS:
                raise UsageError(
                    f"recipe {self.recipe.name!r}: {template!r}: {groups[match[1]]!r} is not a number"
                )
            number = int(groups[match[1]]) + int(match[2].replace(" ", ""))
            if number < 0:
                raise UsageError(f"recipe {self.recipe.name!r}: {template!r} comes to {number}")
            return str(number)

        return PLACE.sub(replace, template)
