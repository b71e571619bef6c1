"""How amounts and messages are written for people."""

from __future__ import annotations

__all__ = ["format_nbytes", "short_detail"]


def format_nbytes(nbytes: float) -> str:
    """Bytes in binary units with three significant digits: `17 B`, `1.50 MiB`, `12.3 GiB`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        nbytes /= 1024
        if nbytes < 999.5 or unit == "PiB":
            break
    digits = 2 if nbytes < 9.995 else 1 if nbytes < 99.95 else 0
    return f"{nbytes:.{digits}f} {unit}"


def short_detail(path: str, detail: str) -> str:
    """Engine messages begin with the URI, which the line has named already."""
    head, colon, rest = detail.partition(": ")
    return rest if colon and head.endswith(path) else detail
