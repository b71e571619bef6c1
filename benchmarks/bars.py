"""A plot of horizontal bars as SVG, by hand: two figures a row, rows in groups.

It has its own ground, light or dark as the reader's system prefers, and so is readable on any page. Knows
nothing of what it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Bar", "BarGroup", "draw"]

WIDTH, LABELS, GAP = 1060, 330, 20
ROW, HEADING = 24, 40
PANEL = (WIDTH - LABELS - 3 * GAP) // 2
TEXT = 84
"""Room for the figure right of the longest bar."""

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
  .heading { font-weight: 600 }
  .ground { fill: #ffffff }
  .ours { fill: #0969da }
  .other { fill: #a8b1bb }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .ground { fill: #0d1117 }
    .ours { fill: #4493f8 }
    .other { fill: #59636e }
  }
"""


@dataclass(frozen=True)
class Bar:
    """One row; a figure that is None is left blank. `ours` sets it apart by its colour."""

    label: str
    figures: tuple[float | None, float | None]
    ours: bool = False


@dataclass(frozen=True)
class BarGroup:
    title: str
    bars: Sequence[Bar]


def draw(groups: Sequence[BarGroup], titles: tuple[str, str], formats: tuple[str, str]) -> str:
    """The whole file. Each of the two panels has one linear scale from 0, for all its groups."""
    rows = [bar for group in groups for bar in group.bars]
    most = [max((bar.figures[panel] or 0.0 for bar in rows), default=0.0) or 1.0 for panel in (0, 1)]
    starts = [LABELS + GAP, LABELS + 2 * GAP + PANEL]
    drawn: list[str] = []
    y = 32
    for start, title in zip(starts, titles, strict=True):
        drawn.append(f'<text class="heading" x="{start}" y="{y}">{escape(title)}</text>')
    for group in groups:
        y += HEADING
        drawn.append(f'<text class="heading" x="{GAP}" y="{y}">{escape(group.title)}</text>')
        for bar in group.bars:
            y += ROW
            drawn.append(f'<text x="{LABELS}" y="{y}" text-anchor="end">{escape(bar.label)}</text>')
            for panel, figure in enumerate(bar.figures):
                if figure is None:
                    continue
                length = max(1.0, figure / most[panel] * (PANEL - TEXT))
                x, kind = starts[panel], "ours" if bar.ours else "other"
                drawn += [
                    f'<rect class="{kind}" x="{x}" y="{y - 12}" width="{length:.1f}" height="16" rx="2"/>',
                    f'<text x="{x + length + 6:.1f}" y="{y}">{escape(formats[panel].format(figure))}</text>',
                ]
    height = y + 24
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">'
    ground = f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, *drawn, "</svg>", ""])
