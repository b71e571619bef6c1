"""Recipes: how the parts of a name make a whole, and how whole tensors become those of another naming. Data.

A recipe is a JSON object that a user may write (docs/parts.md) or one of the shipped rows (`shipped`):

    {"name": "...", "values": {"name": "expression"}, "merge": [{"names": "regex", "how": "rows"}],
     "tensors": [{"from": "regex", "to": "name {group}", "steps": [{"split": [0, ["heads", -1, 2]]}]}],
     "others": "keep"}

Every rule is a selection and an order of elements. Only the sums and means over ranks that `merge` asks for
are computed: small tensors, which the manifest names.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ptbin.errors import UsageError
from ptbin.merging.expressions import runaway

MAX_TEXT = 1 << 20
MAX_RULES = 10_000
MAX_VALUE = 1 << 48
MAX_EXPRESSION = 1000
PLACE = re.compile(r"\{(\w+)(?: ?([+-] ?\d{1,9}))?\}")
"""Where a group stands in a name: `{layer}`, or a number with something added, `{layer - 2}`."""

Expression = int | str
"""A whole number, or arithmetic (`+ - * /`) over the names of values."""

How = Literal["rows", "columns", "equal", "gated", "to dim", "sum", "mean"]
_HOWS = ("rows", "columns", "equal", "gated", "to dim", "sum", "mean")
_STEPS = {"split": 2, "take": 3, "cut": 2, "order": None, "flatten": 2, "unstack": 2}


@dataclass(frozen=True, slots=True)
class Merge:
    """How the parts of matching names make a whole.

    Attributes:
        how: `rows` and `columns` concatenate along the first and second dimension; `equal` takes one of equal
            copies; `gated` parts are two blocks of rows each, of which all first ones come first; `to dim`
            parts are rows where they are as wide as the value `dim`, columns where together they are; `sum`
            and `mean` are computed where the parts are not what they come to.
        heads: value that counts the pieces there are, where more ranks than that hold copies (`n_kv_heads`).
        when: value that decides whether the rule counts; it must be stated, and 0 passes the rule over.
        cut: value that counts the rows of the whole, where it is stated; rows behind them are padding.
    """

    names: str
    how: How
    heads: str = ""
    when: str = ""
    cut: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a tensor's view; `arguments` as the step's kind has them.

    `split` axis into sizes (one may be -1), `take` count indices of an axis from the first on, `cut` an axis
    to as many first indices as the named value says, where it is stated (the rest is padding), `order` axes
    anew, `flatten` the axes from first to last into one, `unstack` an axis: one tensor for each index, which
    names use as a group.
    """

    kind: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of matching names become one, or with `unstack` several.

    Attributes:
        sources: regular expressions; each tensor of the output takes one match of each, with equal groups.
        to: name with `{group}`; None leaves the tensor out under `role`.
        concat: axis along which the sources are put behind one another, after their steps.
        stack: group by which matches are put on a new first axis, from 0 on, before the steps.
    """

    sources: tuple[str, ...]
    to: str | None
    steps: tuple[Step, ...] = ()
    concat: int = 0
    stack: str = ""
    role: str = "dropped"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Attributes:
    values: names to expressions, over facts that the checkpoint states (`n_heads` of params.json).
    others: what becomes of tensors that no rule names.
    """

    name: str
    merges: tuple[Merge, ...] = ()
    rules: tuple[Rule, ...] = ()
    values: tuple[tuple[str, Expression], ...] = ()
    others: Literal["keep", "refuse"] = "refuse"


def evaluate(expression: Expression, values: Mapping[str, int]) -> int:
    """The number that an expression comes to.

    Raises:
        UsageError: no such value, a division with a rest, anything but arithmetic.
    """
    if type(expression) is int:
        found = expression
    else:
        text = str(expression)
        if len(text) > MAX_EXPRESSION:
            raise UsageError(f"recipe: {text[:40]!r}... has {len(text)} characters, at most {MAX_EXPRESSION}")
        try:
            found = _evaluate(ast.parse(text, mode="eval").body, text, values)
        except UsageError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UsageError(f"recipe: {text[:200]!r} is not arithmetic") from error
    if abs(found) > MAX_VALUE:
        raise UsageError(f"recipe: {str(expression)[:40]} is more than {MAX_VALUE}")
    return found


def _evaluate(node: ast.expr, text: str, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in values:
            known = ", ".join(sorted(values)[:20]) or "none"
            raise UsageError(
                f"recipe: {text!r} needs the value {node.id!r}, which the checkpoint does not state (it "
                f"states {known}); give it in the recipe's `values`"
            )
        return values[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, text, values), _evaluate(node.right, text, values)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult) and abs(left * right) < MAX_VALUE:
            return left * right
        if isinstance(node.op, ast.Div) and right and left % right == 0:
            return left // right
        if isinstance(node.op, (ast.Mult, ast.Div)):
            raise UsageError(
                f"recipe: {text!r} is {left} and {right}, which give no whole number below 2**48"
            )
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, text, values)
    raise UsageError(f"recipe: {text!r} is not arithmetic (+ - * / over whole numbers and names of values)")


def parse_recipe(text: str) -> Recipe:
    """A recipe from JSON.

    Raises:
        UsageError: what is wrong in it, and where.
    """
    if len(text) > MAX_TEXT:
        raise UsageError(f"recipe: {len(text)} characters, the limit is {MAX_TEXT}")
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"recipe: not JSON: {error}") from error
    row = _Row(found, "recipe")
    merges = tuple(_merge(_Row(item, f"merge {i}")) for i, item in enumerate(row.items("merge")))
    rules = tuple(_rule(_Row(item, f"tensors {i}")) for i, item in enumerate(row.items("tensors")))
    values = row.take("values", {})
    if not isinstance(values, dict) or not all(type(value) in (int, str) for value in values.values()):
        raise UsageError("recipe: `values` is not a mapping of names to numbers and expressions")
    recipe = Recipe(
        str(row.take("name", "recipe"))[:200],
        merges,
        rules,
        tuple(values.items()),
        row.choice("others", ("refuse", "keep")),
    )
    row.finish()
    if not merges and not rules:
        raise UsageError("recipe: neither `merge` nor `tensors` has a rule")
    return recipe


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} stands twice in one object")
        found[key] = value
    return found


class _Row:
    """A JSON object whose keys are taken one by one; what is left is a mistake."""

    def __init__(self, found: Any, what: str) -> None:
        if not isinstance(found, dict):
            raise UsageError(f"{what}: expected an object, found {type(found).__name__}")
        self.what = what if what == "recipe" else f"recipe: {what}"
        self._left = dict(found)

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def items(self, key: str) -> list[Any]:
        found = self.take(key, [])
        if not isinstance(found, list) or len(found) > MAX_RULES:
            raise UsageError(f"{self.what}: {key!r} is not a list of up to {MAX_RULES} rules")
        return found

    def choice(self, key: str, allowed: tuple[str, ...]) -> Any:
        found = self.take(key, allowed[0])
        if found not in allowed:
            raise UsageError(f"{self.what}: {key} {found!r} is not one of {', '.join(allowed)}")
        return found

    def pattern(self, text: Any) -> str:
        try:
            re.compile(text)
        except (re.error, TypeError, RecursionError) as error:
            raise UsageError(
                f"{self.what}: {str(text)[:200]!r} is not a regular expression: {error}"
            ) from error
        if why := runaway(text):
            raise UsageError(f"{self.what}: matching {text[:200]!r} may never end: {why}")
        return str(text)

    def finish(self) -> None:
        if self._left:
            raise UsageError(f"{self.what}: unknown key {next(iter(self._left))!r}")


def _merge(row: _Row) -> Merge:
    merge = Merge(
        row.pattern(row.take("names")),
        row.choice("how", _HOWS),
        *(str(row.take(key, "")) for key in ("heads", "when", "cut")),
    )
    row.finish()
    return merge


def _rule(row: _Row) -> Rule:
    sources = row.take("from")
    sources = [sources] if isinstance(sources, str) else sources
    if not isinstance(sources, list) or not sources:
        raise UsageError(f"{row.what}: `from` is neither a regular expression nor a list of them")
    to = row.take("to")
    if to == "" or not (to is None or isinstance(to, str)):
        raise UsageError(f"{row.what}: `to` is not a name")
    if to is not None and {"{", "}"} & set(PLACE.sub("", to)):
        raise UsageError(
            f"{row.what}: `to` {to[:80]!r} has braces that are neither {{group}} nor {{group - 2}}"
        )
    concat, stack = row.take("concat", 0), row.take("stack", "")
    if type(concat) is not int or not 0 <= concat < 64 or not isinstance(stack, str):
        raise UsageError(f"{row.what}: `concat` is not an axis, or `stack` is not the name of a group")
    patterns = tuple(row.pattern(source) for source in sources)
    if stack and not all(_has_group(pattern, stack) for pattern in patterns):
        raise UsageError(f"{row.what}: `stack` {stack[:80]!r} is not a group of each `from`")
    rule = Rule(patterns, to, tuple(_step(item, row.what) for item in row.items("steps")), concat, stack)
    row.finish()
    return rule


def _has_group(pattern: str, group: str) -> bool:
    found = re.compile(pattern)
    return group in found.groupindex or (group.isdecimal() and 0 < int(group[:9]) <= found.groups)


def _step(item: Any, what: str) -> Step:
    if not isinstance(item, dict) or len(item) != 1:
        raise UsageError(f"{what}: a step is an object with one key, of {', '.join(_STEPS)}")
    ((kind, arguments),) = item.items()
    count = _STEPS.get(kind, 0)
    if kind not in _STEPS or not isinstance(arguments, list) or count not in (None, len(arguments)):
        raise UsageError(f"{what}: {kind!r} with {str(arguments)[:100]} is not a step")
    axes = arguments if kind in ("order", "flatten") else arguments[:1]
    if not all(type(axis) is int and 0 <= axis < 64 for axis in axes):
        raise UsageError(f"{what}: {kind!r} names no axis in {str(arguments)[:100]}")
    if kind == "split" and not isinstance(arguments[1], list):
        raise UsageError(f"{what}: 'split' takes an axis and a list of sizes")
    if kind == "cut" and not isinstance(arguments[1], str):
        raise UsageError(f"{what}: 'cut' takes an axis and the name of a value")
    return Step(kind, tuple(tuple(value) if isinstance(value, list) else value for value in arguments))
