"""How amounts and messages are written for people."""

from __future__ import annotations

from collections.abc import Mapping


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


def format_seconds(seconds: float) -> str:
    """A duration in two units at most: `12.3 s`, `4 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def counted(count: int, what: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def left_out_words(left_out: Mapping[str, int]) -> str:
    """What was left out, by role, largest first: `optimizer 1.90 GiB, averaged copy 922 MiB`."""
    largest = sorted(left_out.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{role.replace('_', ' ')} {format_nbytes(nbytes)}" for role, nbytes in largest)
