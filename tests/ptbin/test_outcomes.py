"""`docs/outcomes.md` is true: each row is run, and each kind of file has its row."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import ptbin
from ptbin.errors import PtbinError
from tests.checkpoints import FACTORIES, Factory, MadeOnce

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "outcomes.md"
RUN_OF_EACH_ROW = 3


@dataclass(frozen=True)
class Row:
    """One line of a table; `reason` is None where the file is converted."""

    have: str
    reason: str | None
    names: tuple[str, ...]

    @property
    def factories(self) -> list[Factory]:
        patterns = [name for name in self.names if "/" not in name]
        return [f for n, f in FACTORIES.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)]

    def __str__(self) -> str:
        return self.have[:60]


def _rows() -> list[Row]:
    rows = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| ") or cells[0] == "you have":
            continue
        assert len(cells) == 4, line
        stated = re.match(r"`(\w+)`", cells[1])
        rows.append(Row(cells[0], stated[1] if stated else None, tuple(re.findall(r"`([^`]+)`", cells[3]))))
    return rows


ROWS = _rows()


def test_every_kind_of_file_has_its_row() -> None:
    told = {factory.name for row in ROWS for factory in row.factories}
    assert sorted(FACTORIES.keys() - told) == []


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_row_names_what_shows_it(row: Row) -> None:
    for name in row.names:
        if "/" in name:
            assert (ROOT / name).is_file()
        else:
            assert fnmatch.filter(FACTORIES, name), name
    assert row.names
    assert {factory.reason for factory in row.factories} <= {row.reason}


@pytest.mark.parametrize("row", [row for row in ROWS if row.factories], ids=str)
def test_a_row_is_true(row: Row, made_once: MadeOnce, tmp_path: Path) -> None:
    quick = [factory for factory in row.factories if not factory.slow]
    for factory in quick[:: max(1, len(quick) // RUN_OF_EACH_ROW)]:
        folder = tmp_path / factory.name
        folder.mkdir()
        made = made_once(factory)
        options = ptbin.ConvertOptions(**made.options)
        output = str(folder / "out.bin")
        if row.reason is None:
            manifest = ptbin.convert(str(made.path), output, options)
            sums = manifest["accounting"]
            assert sums["source_tensor_bytes"] == sums["taken_bytes"] + sum(sums["left_out"].values())
            continue
        with pytest.raises(PtbinError) as refused:
            ptbin.convert(str(made.path), output, options)
        assert refused.value.reason == row.reason
        assert not Path(output).exists()
