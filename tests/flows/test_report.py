"""The report of a run: what stands in it, and how it behaves in a browser (headless Chromium)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ptbin.runs.report import render_report

HOSTILE = '<script>window.pwned=1</script>"><img src=x onerror=window.pwned=2>.pt'


def row(path: str, outcome: str = "converted", **facts: Any) -> dict[str, Any]:
    return {"path": path, "source": f"/in/{path}", "size": 1000, "outcome": outcome, **facts}


def record(*rows: dict[str, Any], **facts: Any) -> dict[str, Any]:
    outcomes = [item["outcome"] for item in rows]
    problems = [{"source": r["source"], "reason": r["reason"], "detail": ""} for r in rows if "reason" in r]
    return {
        "kind": "convert", "run_id": "20261124T000000Z-abc", "source": "/in", "dest": "/out",
        "message": "converted some", "interrupted": False, "seconds": 2.0,
        **{key: outcomes.count(key) for key in ("converted", "up_to_date", "rejected", "failed")},
        "source_bytes": 4 << 20, "read_bytes": 2 << 20, "written_bytes": 1 << 20,
        "options": {"format": "torch", "drop": []}, "problems": problems, "checkpoints": list(rows), **facts,
    }  # fmt: skip


def some() -> dict[str, Any]:
    return record(
        row("a/big.ckpt", size=3000, weights_bytes=1000, left_out={"optimizer": 1900, "other": 0},
            written_bytes=1100, seconds=0.5, tensors=3),
        row("b/small.pt", size=500, weights_bytes=450, left_out={}, seconds=0.1),
        row("evil.pt", verdict="unsafe", globals=["os.system"], weights_bytes=10),
        row(HOSTILE, "rejected", reason="unsafe_pickle", detail=f"/in/{HOSTILE}: names {HOSTILE}"),
        row("cut.pt", "rejected", reason="corrupt_archive", detail="/in/cut.pt: is it truncated?"),
        row("same.pt", "up_to_date"),
        not_listed={"up_to_date": 12},
    )  # fmt: skip


def test_the_page_needs_nothing_but_itself_and_is_the_same_every_time() -> None:
    page = render_report(some())
    assert page == render_report(some())
    asked: list[str | None] = []

    links: list[str | None] = []

    class Attributes(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            asked.extend(value for name, value in attrs if name in {"src", "srcset", "action", "data"})
            links.extend(value for name, value in attrs if name == "href")

    Attributes().feed(page)
    assert asked == []
    assert set(links) == {"run.json", "SHA256SUMS"}
    assert "url(" not in page
    assert "@import" not in page


def test_names_out_of_files_are_only_text() -> None:
    page = render_report(some())
    assert HOSTILE not in page
    assert "<script>window" not in page
    assert "<img" not in page


def test_what_is_not_known_is_left_out() -> None:
    page = render_report(record(row("old.pt"), row("other.pt", "failed", reason="storage_error")))
    assert "old.pt" in page
    assert "Unsafe pickles" not in page
    empty = render_report(record(seconds=0.0, source_bytes=0))
    assert "Where the bytes went" not in empty


def test_shares_of_the_bytes_add_up() -> None:
    page = render_report(record(row("x.pt", size=1000, weights_bytes=250, left_out={"optimizer": 500})))
    assert [re.sub(r"\s+", " ", text) for text in re.findall(r"</i>(.*?)</li>", page)] == [
        "weights 25 %, 250 B", "optimizer (left out) 50 %, 500 B", "other 25 %, 250 B",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "all done"),
        ({"problems": [{}]}, "finished with problems"),
        ({"interrupted": True}, "interrupted"),
    ],
)
def test_the_first_words_are_how_it_went(facts: dict[str, Any], words: str) -> None:
    assert f">{words}</span>" in render_report(record(**facts))


# -- in a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """The report in a window of its own; remembers what it asked for and complained of."""

    def __init__(self, chromium: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.heard: list[str] = []
        self.page.on("console", lambda message: self.heard.append(message.text))
        self.page.on("pageerror", lambda error: self.heard.append(str(error)))
        self.page.on(
            "request", lambda asked: self.heard.append(asked.url) if asked.url != path.as_uri() else None
        )
        self.page.goto(path.as_uri())

    def shown(self) -> list[str]:
        found: list[str] = self.page.eval_on_selector_all(
            "tbody tr:not([hidden]) td.path", "cells => cells.map(cell => cell.textContent)"
        )
        return found

    def wait_for_rows(self, count: int) -> None:
        """The filter waits for a pause in the typing."""
        from playwright.sync_api import expect

        expect(self.page.locator("tbody tr:not([hidden])")).to_have_count(count)

    def eval(self, code: str) -> Any:
        return self.page.evaluate(code)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(render_report(some()))
    return path


def test_filters_chips_and_columns_work(chromium: Any, file: Path) -> None:
    page = Page(chromium, file)
    assert len(page.shown()) == 6
    assert page.shown()[0] == HOSTILE or page.shown()[0] == "cut.pt"  # problems first
    page.page.fill("#filter", "TRUNCATED")
    page.wait_for_rows(1)
    assert page.shown() == ["cut.pt"]
    page.page.fill("#filter", "")
    page.page.click(".chip[data-outcome=converted]")
    assert sorted(page.shown()) == ["a/big.ckpt", "b/small.pt", "evil.pt"]
    page.page.click("th:has-text('before') button")
    assert page.shown() == ["b/small.pt", "evil.pt", "a/big.ckpt"]
    page.page.click("th:has-text('before') button")
    assert page.shown() == ["a/big.ckpt", "evil.pt", "b/small.pt"]
    assert page.eval("window.pwned") is None
    assert page.heard == []


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_nothing_is_wider_than_the_window(chromium: Any, file: Path, width: int) -> None:
    page = Page(chromium, file, width)
    assert page.eval("document.documentElement.scrollWidth") <= width


def _luminance(color: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]  # WCAG 2.2
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_dark_and_light_are_both_readable(chromium: Any, file: Path) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        page = Page(chromium, file, scheme=scheme)
        ground = page.eval("getComputedStyle(document.body).backgroundColor")
        panel = page.eval("getComputedStyle(document.querySelector('.scroll')).backgroundColor")
        grounds.add(ground)
        on_panel = ("td.rejected", "td.converted", ".why small")
        for selector, behind in (("body", ground), (".note", ground), *((name, panel) for name in on_panel)):
            color = page.eval(f"getComputedStyle(document.querySelector('{selector}')).color")
            high, low = sorted((_luminance(color), _luminance(behind)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, selector)
    assert len(grounds) == 2
    page.page.click("#theme")
    assert page.eval("getComputedStyle(document.body).backgroundColor") != ground


def test_five_thousand_rows_are_filtered_at_once(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(render_report(record(*(row(f"run/{number:05}.pt") for number in range(5000)))))
    page = Page(chromium, path)
    page.page.fill("#filter", "04999")
    page.wait_for_rows(1)
    assert page.shown() == ["run/04999.pt"]


def test_without_scripts_it_is_a_plain_table(chromium: Any, file: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("tbody tr").count() == 6
    assert not page.locator(".tools").is_visible()
    context.close()


def test_what_was_left_out_is_listed_by_role() -> None:
    rows = [
        row("a.ckpt", size=4000, weights_bytes=1000, left_out={"optimizer": 2048, "averaged_copy": 900}),
        row("b.ckpt", size=4000, weights_bytes=1000, left_out={"optimizer": 1024}),
    ]
    assert "Left out: optimizer 3.00 KiB, averaged copy 900 B." in render_report(record(*rows))
    assert "Left out:" not in render_report(record(row("c.ckpt", size=10, weights_bytes=10)))


def night() -> dict[str, Any]:
    """A record as a run writes it, with runs before it."""
    facts = {
        "began": "2026-11-24T02:00:00Z", "ended": "2026-11-24T02:04:05Z", "host": "worker-1",
        "version": "0.2.0",
        "source_uri": "s3://training/runs", "dest_uri": "s3://models/weights", "dest": "s3://models/weights",
        "prefect_url": "http://prefect.example/runs/flow-run/7", "previous_run": "20261123T020000Z-b",
        "history": [
            {"run_id": "20261122T020000Z-a", "began": "2026-11-22T02:00:00Z", "converted": 40, "seconds": 9},
            {"run_id": "20261123T020000Z-b", "began": "2026-11-23T02:00:00Z", "up_to_date": 40, "failed": 3},
        ],
        "resolved_problems": [
            {"source": "s3://training/runs/x.pt", "reason": "storage_error", "since": "2026-11-20T02"},
        ],
    }  # fmt: skip
    return record(
        row("run 1/big#1.ckpt", size=3000, weights_bytes=1000, left_out={"optimizer": 1900}, tensors=3,
            manifest="s3://models/weights/run 1/big#1.bin.manifest.json", verdict="unknown",
            outputs=[{"path": "big#1.bin", "size": 1100, "sha256": "ab" * 32}]),
        row("z-new.pt", "rejected", reason="corrupt_archive", detail="cut", novelty="new",
            since="2026-11-24T02:00:00Z"),
        row("a-old.pt", "rejected", reason="unsafe_pickle", detail="os", novelty="old",
            since="2026-11-01T02:00:00Z", globals=["os.system"], verdict="unsafe"),
        **facts,
    )  # fmt: skip


def test_problems_come_first_and_new_ones_are_marked() -> None:
    page = render_report(night())
    assert page.index("2 problems, 1 of them new") < page.index('class="tiles"')
    assert page.index("z-new.pt") < page.index("a-old.pt")
    assert '<b class="new">new</b> <code>z-new.pt</code>' in page
    assert "since 2026-11-01" in page


def test_a_name_cannot_read_backwards() -> None:
    page = render_report(record(row("\u202egnp.pt", "rejected", reason="unsafe_pickle", detail="a\x1b[31m")))
    assert r"\u202egnp.pt" in page
    assert not {"\u202e", "\x1b"} & set(page)


def test_it_says_where_when_and_by_what_and_what_came_before() -> None:
    page = render_report(night())
    text = re.sub(r"<[^>]+>", "", page)
    assert "from s3://training/runs to s3://models/weights" in text
    assert "2026-11-24 02:00:00 UTC to 2026-11-24 02:04:05 UTC on worker-1, ptbin 0.2.0" in text
    assert 'href="http://prefect.example/runs/flow-run/7"' in page
    assert 'href="../20261123T020000Z-b/report.html"' in page
    assert "up to date 40 → 0" in text
    assert "resolved: s3://training/runs/x.pt (storage_error, since 2026-11-20)" in text
    assert render_report({**night(), "prefect_url": "javascript:alert(1)"}).count("javascript:") == 0


def test_rows_open_to_outputs_verdict_globals_and_accounting(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_report(night()))
    page = Page(chromium, path, 390)
    for summary in page.page.query_selector_all("tbody summary"):
        summary.click()
    details = page.page.eval_on_selector_all("tbody details", "all => all.map(one => one.innerText)")
    assert any("verdict" in text and "os.system" in text for text in details)
    assert any("taken" in text and "left out: optimizer" in text and "tensors" in text for text in details)
    links = page.page.eval_on_selector_all("tbody a", "all => all.map(one => one.getAttribute('href'))")
    assert links == ["../../../run%201/big%231.bin", "../../../run%201/big%231.bin.manifest.json"]
    assert page.eval("document.documentElement.scrollWidth") <= 390
    bars = page.page.eval_on_selector_all("#history a", "all => all.map(one => one.getAttribute('href'))")
    assert bars == ["../20261122T020000Z-a/report.html", "../20261123T020000Z-b/report.html"]
    assert page.page.locator("#history rect.this").count() == 1
    assert page.heard == []


@pytest.mark.thorough
def test_very_many_rows_do_not_open_but_for_those_that_failed() -> None:
    many = [row(f"{number}.pt", weights_bytes=1) for number in range(2001)]
    failed = row("cut.pt", "failed", reason="storage_error", since="2026-11-01T02:00:00Z")
    page = render_report(record(*many, failed))
    assert page.count("<details>") == 1
