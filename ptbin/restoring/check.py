"""`python -m ptbin.restoring.check ANSWER < REQUEST`: load a restored file afresh and say what is in it.

A fresh process: what the building one still had in memory does not help. Where there are example inputs, the
restored program has to answer them as the model did.
"""

from __future__ import annotations

from typing import Any

import torch

from ptbin.restoring.answering import answer_request
from ptbin.restoring.saving import Example, run_example, same_outputs
from ptbin.restoring.snapshot import Contents
from ptbin.restoring.user_code import UserCode


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    path, form = request["file"], request["as"]
    runnable: Any = None
    if form == "state-dict":
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        facts = Contents(path).of_values(values)
    else:
        UserCode(request["folders"], request["modules"]).install()
        if form == "module":
            # A file that `build` has just written into a private place, of classes that the caller named.
            runnable = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
            facts = Contents(path).of_model(runnable)
        elif form == "torchscript":
            runnable = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
            facts = Contents().of_values(runnable.state_dict())
        else:
            program = torch.export.load(path)
            facts = Contents().of_values(program.state_dict)
            runnable = program.module()
    answer: dict[str, Any] = {"facts": facts}
    if request["expected"] is not None and runnable is not None:
        # Written by `build` as well: inputs may be of the caller's classes.
        known = torch.load(request["expected"], map_location="cpu", weights_only=False)
        found = run_example(runnable, Example(known["args"], known["kwargs"]))
        answer["same_outputs"] = same_outputs(found, known["outputs"])
    return answer


if __name__ == "__main__":
    answer_request(_answer)
