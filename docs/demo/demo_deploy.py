"""`make demo-deploy`: a nightly conversion as an operator sets it up, on loopback, with pictures of the UI.

    python docs/demo/demo_deploy.py FOLDER [--screenshots DIR]

Server up (on PostgreSQL where it is installed), work pools and deployments, a worker, a schedule that fires,
the flow run Completed, its artifacts there, a second run that finds nothing to do, and a third one, after a
checkpoint was cut short, that ends Failed and says why. Exits 0 only if all of that came to pass. Takes about
two minutes. FOLDER is emptied first if an earlier demo made it.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Started with `python docs/demo/demo_deploy.py`: the servers are the tests' own.
sys.path.insert(0, str(ROOT))

from make_checkpoints import HOSTILE, make_checkpoints  # noqa: E402 - after the path above

from tests.servers.prefect_stack import (  # noqa: E402
    PrefectStack,
    postgres_programs,
    prefect_stack,
    wait_for,
)

MARK = ".made-by-ptbin-demo"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def fresh(folder: Path) -> None:
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARK).exists():
            sys.exit(f"{folder} is not empty, and no earlier demo made it: name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def show(stack: PrefectStack, *words: str) -> None:
    """A command of Prefect's with its output."""
    print(f"$ prefect {' '.join(words)}")
    print(stack.prefect(*words).rstrip(), flush=True)


def scheduled_run(stack: PrefectStack) -> dict[str, Any]:
    """Give the nightly deployment a schedule that fires now; the first run that it starts, ended."""
    deployment = stack.ask("/deployments/name/convert/convert-nightly", method="GET")
    schedule = {"schedule": {"interval": 5}, "active": True, "max_scheduled_runs": 1}
    (made,) = stack.ask(f"/deployments/{deployment['id']}/schedules", [schedule])
    try:
        found = wait_for(
            lambda: [run for run in stack.runs() if run["auto_scheduled"] and run["state"]["type"] in ENDED],
            120,
            "a scheduled run",
        )
    finally:
        stack.ask(f"/deployments/{deployment['id']}/schedules/{made['id']}", method="DELETE")
    run: dict[str, Any] = found[0]
    return run


ENDED = {"COMPLETED", "FAILED", "CRASHED"}


def id_of(stack: PrefectStack, kind: str, run_id: str, **facts: str) -> str:
    """Of an artifact or a task run of that flow run, of which these facts begin like that."""
    key = {"artifacts": "flow_run_id", "task_runs": "flow_run_id"}[kind]
    rows = stack.ask(f"/{kind}/filter", {kind: {key: {"any_": [run_id]}}})
    found: str = next(
        row["id"] for row in rows if all(str(row[name]).startswith(text) for name, text in facts.items())
    )
    return found


def take_screenshots(stack: PrefectStack, run_id: str, report: Path, folder: Path) -> None:
    """The pages that an operator looks at; nothing where there is no browser."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        print("no chromium or no playwright here: no pictures")
        return
    folder.mkdir(parents=True, exist_ok=True)
    deployment = stack.ask("/deployments/name/convert/convert-nightly", method="GET")["id"]
    essence = id_of(stack, "artifacts", run_id, key="ptbin-convert-report")
    failed = id_of(stack, "task_runs", run_id, state_name="1 of ")
    desktop: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"}
    phone = {"viewport": {"width": 390, "height": 1400}, "color_scheme": "light"}
    pages = {
        "deployments": (f"{stack.ui_url}/deployments", desktop),
        "form": (f"{stack.ui_url}/deployments/deployment/{deployment}/run", desktop),
        "flow-run": (f"{stack.ui_url}/runs/flow-run/{run_id}", desktop),
        "task-run": (f"{stack.ui_url}/runs/task-run/{failed}", desktop),
        "artifact": (f"{stack.ui_url}/artifacts/artifact/{essence}", desktop),
        "report": (report.as_uri(), desktop),
        "report-dark": (report.as_uri(), desktop | {"color_scheme": "dark"}),
        "report-phone": (report.as_uri(), phone),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, (url, look) in pages.items():
            window = browser.new_context(**look)
            # The UI would call home for its analytics otherwise.
            window.route(
                lambda url: not url.startswith((stack.ui_url, "file:", "data:", "blob:")),
                lambda route: route.abort(),
            )
            page = window.new_page()
            page.goto(url)
            with contextlib.suppress(Exception):
                page.wait_for_load_state("networkidle", timeout=8000)
            time.sleep(1.5)
            page.screenshot(path=str(folder / f"{name}.png"))
            print(f"{folder / name}.png")
            window.close()
        browser.close()


def main() -> int:
    """Play it through."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--screenshots", type=Path, help="where the pictures go; FOLDER/screenshots unless said"
    )
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    fresh(folder)
    say("checkpoints, trained a moment before; one of them is hostile")
    make_checkpoints(folder / "source", folder / "never")
    (folder / "source" / HOSTILE).unlink()  # a nightly run of one's own store; `make demo` refuses it
    database = "PostgreSQL" if postgres_programs() is not None else "SQLite (no PostgreSQL here)"
    say(f"a Prefect server on {database}, work pools, deployments")
    with prefect_stack(folder / "prefect", postgres=postgres_programs() is not None, data=folder) as stack:
        print(f"the UI is at {stack.ui_url} while this runs")
        show(stack, "deployment", "ls")
        say("a worker, and a schedule that fires")
        worker = stack.start_worker()
        run = scheduled_run(stack)
        print(f"flow run {run['name']}: {run['state']['type']}: {run['state']['message']}")
        artifacts = stack.artifacts(run["id"])
        print(f"artifacts: {', '.join(f'{key} ({kind})' for key, kind in artifacts.items())}")
        show(stack, "flow-run", "logs", run["id"])
        say("the same once more: nothing is left to do")
        again = stack.wait_for_end(stack.run("convert/convert-nightly"))
        print(f"{again['type']}: {again['message']}")
        say("a night on which a checkpoint was cut short")
        (sound,) = (folder / "source").glob("cnn/last.ckpt")
        (folder / "source" / "cnn" / "cut.ckpt").write_bytes(sound.read_bytes()[:-1000])
        third = stack.run("convert/convert-nightly")
        failed = stack.wait_for_end(third)
        print(f"{failed['type']}: {failed['message']}")
        say("pictures of the UI, and of the report")
        report = max((folder / "dest" / "_ptbin" / "runs").glob("*/report.html"))
        take_screenshots(stack, third, report, arguments.screenshots or folder / "screenshots")
        stack.kill(worker)
    good = run["state"]["type"] == "COMPLETED" and again["type"] == "COMPLETED"
    good = (
        good and failed["type"] == "FAILED" and "\nnew: cnn/cut.ckpt: corrupt_archive: " in failed["message"]
    )
    good = good and "converted 0, up to date" in again["message"] and "ptbin-convert" in artifacts
    say("all of it came to pass" if good else "NOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
