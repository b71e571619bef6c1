"""The code blocks of a page of the documentation, as one script."""

from __future__ import annotations

import re
import sys

__all__ = ["BLOCK", "script_of"]

BLOCK = re.compile(r"^(?:<!-- exits (\d+) -->\n)?```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script_of(text: str, python: str = f"{sys.executable} -P") -> str:
    """Each block in a shell of its own, in order; it must exit with 0, or with N below `<!-- exits N -->`."""
    lines = []
    for number, (status, language, code) in enumerate(BLOCK.findall(text), 1):
        command = f"set -e\n{code}" if language == "sh" else f"{python} - <<'PYTHON'\n{code}PYTHON"
        lines.append(f"(\n{command}\n)\nstatus=$?")
        lines.append(
            f'[ $status = {status or 0} ] || {{ echo "block {number} exited with $status"; exit 1; }}'
        )
    return "\n".join(lines)
