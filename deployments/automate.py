"""Create, or renew, an automation of this folder on the server that PREFECT_API_URL names.

    python deployments/automate.py crashed-runs
    python deployments/automate.py notify-slack --block slack-webhook/ptbin-alerts

`--block KIND/NAME` is what a notification goes through; its id takes the place of BLOCK in the file. An
automation of the same name is replaced. Exit status: 0 it is there; 2 there is no such file, block or
server.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

FOLDER = Path(__file__).with_name("automations")
PLACE = "BLOCK"


class CallError(Exception):
    """Nothing was created."""


def block_id(reference: str) -> str:
    """The id of the block `KIND/NAME`."""
    kind, _, name = reference.partition("/")
    with get_client(sync_client=True) as client:
        try:
            return str(client.read_block_document_by_name(name, kind).id)
        except ObjectNotFound as error:
            raise CallError(
                f"the server has no block {reference}; `prefect block ls` lists those it has"
            ) from error


def filled(document: dict[str, Any], reference: str | None) -> dict[str, Any]:
    """The document with the block's id where it wants one."""
    for action in document["actions"]:
        if action.get("block_document_id") == PLACE:
            if reference is None:
                raise CallError("it goes through a block: --block KIND/NAME")
            action["block_document_id"] = block_id(reference)
    return document


def create(name: str, reference: str | None) -> str:
    """The automation's id."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise CallError(
            f"no {path}; there are {', '.join(sorted(file.stem for file in FOLDER.glob('*.yaml')))}"
        )
    wanted = Automation.model_validate(filled(yaml.safe_load(path.read_text()), reference))
    try:
        there = Automation.read(name=wanted.name)
    except ValueError:
        return str(wanted.create().id)
    wanted.id = there.id
    wanted.update()
    return str(there.id)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("name", help="of a file in automations/, without .yaml")
    parser.add_argument("--block", metavar="KIND/NAME", help="the block that it goes through")
    arguments = parser.parse_args()
    try:
        print(create(arguments.name, arguments.block))
    except CallError as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        return 2
    except httpx.HTTPError as error:
        print(f"the Prefect server that PREFECT_API_URL names does not answer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
