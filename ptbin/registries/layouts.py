"""Where versions lie in a directory registry: a path template, both to read paths and to make them. Pure.

mirror   {name}/{version}, files under the names of their sources
hf       {name}/{version}, each a folder that `from_pretrained` takes
triton   {name}/{version}, versions are numbers, weights are `model.bin`
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ptbin.errors import UsageError
from ptbin.values.names import is_plain_path

Style = Literal["mirror", "hf", "triton"]

ONLY_VERSION = "main"
"""What the one version of a model is called where the template has no place for versions."""
TEMPLATE = "{name}/{version}"
_FIELD = re.compile(r"\{(\w+)\}")
_PATTERNS = {"name": r"[^/]+?", "version": r"[^/]+?"}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a directory registry is laid out.

    Attributes:
        template: path of a version's folder below the registry, of `{name}` and `{version}`.
        style: how the files in it are called.
    """

    style: Style = "mirror"
    template: str = TEMPLATE
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = self.template.split("/")
        fields = _FIELD.findall(self.template)
        if (
            not is_plain_path(self.template)
            or "_ptbin" in parts
            or set(fields) - {"name", "version"}
            or len(set(fields)) != len(fields)
            or "{" in _FIELD.sub("", self.template)
            or "name" not in fields
        ):
            raise UsageError(
                f"layout: {self.template!r} is not a template; a relative path with {{name}} and, as a rule, "
                "{version} in it: {name}/{version}, models/{name}/v{version}"
            )
        text, at = "", 0
        for match in _FIELD.finditer(self.template):
            kind = match[1]
            pattern = r"[1-9]\d*" if kind == "version" and self.style == "triton" else _PATTERNS[kind]
            text += re.escape(self.template[at : match.start()]) + f"(?P<{kind}>{pattern})"
            at = match.end()
        text += re.escape(self.template[at:])
        object.__setattr__(self, "_pattern", re.compile(text + "(?=/)"))

    @property
    def has_versions(self) -> bool:
        return "{version}" in self.template

    def folder(self, name: str, version: str) -> str:
        """Path of a version's folder."""
        return _FIELD.sub(lambda match: name if match[1] == "name" else version, self.template)

    def model_folder(self, name: str) -> str | None:
        """The folder of all versions of a model and of no other model; None where the template has none."""
        above = []
        for part in self.template.split("/"):
            if "{version}" in part:
                break
            above.append(part)
        if not any("{name}" in part for part in above):
            return None
        return _FIELD.sub(name.replace("\\", r"\\"), "/".join(above))

    def home(self, name: str) -> str:
        """The folder of a model's own record: that above its versions, or that of its only one."""
        above = self.model_folder(name)
        return above if above is not None else self.folder(name, ONLY_VERSION)

    def split(self, path: str) -> tuple[str, str, str] | None:
        """Name, version (empty where the template has none) and the rest of the path of a file."""
        match = self._pattern.match(path)
        if match is None:
            return None
        found = match.groupdict()
        return found["name"], found.get("version") or "", path[match.end() + 1 :]


def parse_layout(text: str) -> Layout:
    """`mirror`, `hf`, `triton`, a template, or both: `hf:{name}`.

    Raises:
        UsageError: anything else.
    """
    style, colon, template = text.partition(":")
    if style in ("mirror", "hf", "triton"):
        return Layout(style, template) if colon else Layout(style)  # type: ignore[arg-type]
    if "{" not in text:
        raise UsageError(f"layout: {text!r} is neither mirror, hf or triton nor a path template")
    return Layout("mirror", text)
