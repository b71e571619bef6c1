"""Metrics as values, and as OpenMetrics text. Pure.

Only gauges, so that the text is also valid in Prometheus's own format, which is what node_exporter's textfile
collector and the Pushgateway read. Names end in their unit.

Source: the OpenMetrics specification 1.0 (names, escapes, `# EOF`), Prometheus's text format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PREFIX = "ptbin_"


@dataclass(slots=True)
class Family:
    """One metric: its name without `ptbin_`, what it means, its samples."""

    name: str
    help: str
    samples: list[tuple[dict[str, str], float]] = field(default_factory=list)

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    def add(self, labels: Mapping[str, str], value: float, **more: str) -> None:
        self.samples.append(({**labels, **more}, float(value)))

    def lines(self) -> list[str]:
        if not self.samples:
            return []
        name = self.full_name
        lines = [f"# HELP {name} {_escaped(self.help)}", f"# TYPE {name} gauge"]
        for labels, value in self.samples:
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            lines.append(f"{name}{{{inside}}} {value:.17g}")
        return lines


def families(meanings: Mapping[str, str]) -> dict[str, Family]:
    """One without samples for each name and meaning."""
    return {name: Family(name, text) for name, text in meanings.items()}


def render(found: Iterable[Family]) -> str:
    """The text; families without samples are left out."""
    return "\n".join([*(line for family in found for line in family.lines()), "# EOF"]) + "\n"


def _escaped(text: str) -> str:
    """As both formats want label values; line breaks and quotes would end them."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
