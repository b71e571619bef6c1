"""`python -m ptbin.restoring.check REQUEST ANSWER`: load a restored file afresh and say what is in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ptbin.restoring.digests import digests_of, said_by
from ptbin.restoring.user_code import UserCode

__all__ = ["main"]


def _loaded(request: dict[str, Any]) -> Any:
    path = request["file"]
    if request["as"] == "state-dict":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    UserCode(request["folders"], request["modules"]).install()
    if request["as"] == "module":
        # A file that `build` has just written into a private folder, of classes that the caller named.
        return torch.load(path, map_location="cpu", weights_only=False).state_dict()
    if request["as"] == "torchscript":
        return torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    return torch.export.load(path).state_dict


def main(arguments: list[str]) -> None:
    asked, answered = map(Path, arguments)
    try:
        answer: dict[str, Any] = {
            "digests": digests_of(_loaded(json.loads(asked.read_text(encoding="utf-8"))))
        }
    except Exception:  # noqa: BLE001 - told to the caller, who does not publish the file
        answer = {"error": said_by(sys.exc_info()[1])}
    answered.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
