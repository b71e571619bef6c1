"""Tags, branches and versions of a repository on a Hugging Face Hub: which name is what. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from ptbin.registries.base import Name
from ptbin.registries.values import natural_order

MAIN = "main"
"""The branch that holds the newest version."""
_REFERENCE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.))*(?<!\.)(?<!\.lock)")
"""What is a tag of git everywhere (git-check-ref-format(1)) and a revision in the Hub's URLs."""
_VERSION_LIKE = re.compile(r"[vV]?[0-9]+(?:[._-].*)?")


def is_reference(text: str) -> bool:
    """Whether the Hub and git both take the text as the name of a tag."""
    return _REFERENCE.fullmatch(text) is not None


def version_of_commit(tags: Sequence[str], known: Collection[str] | None) -> str | None:
    """Which of the tags of one commit is the version's; the others are aliases.

    Args:
        known: what the record of a migration calls its versions; None: there is no record. With one, a tag
            that looks like no version's may stand alone: an alias, while its version's tag is being moved.
    """
    ordered = sorted(tags, key=natural_order)
    numbered = [tag for tag in ordered if _VERSION_LIKE.fullmatch(tag)]
    if known is None:
        # By its looks first: `best` wanders from commit to commit, `v2` does not.
        return (numbered or ordered)[0]
    return next((tag for tag in ordered if tag in known), numbered[0] if numbered else None)


def name_at_hub(version: str, aliases: Mapping[str, str]) -> Name:
    """The tag of a version, or why it cannot have one; `aliases`: alias to version, of the repository."""
    if version == MAIN:
        return Name(problem=f"{MAIN} is a branch there, not a tag: give the version a tag at the source")
    if not is_reference(version):
        return Name(problem=f"version {version!r} cannot be a tag")
    if version in aliases:
        return Name(problem=f"{version} is there already, as an alias of version {aliases[version]}")
    return Name(version)
