"""`python -m ptbin.restoring.build REQUEST ANSWER`: the user's model, loaded strictly and saved.

Runs in a process of its own. The callable's module is imported from where the caller said (`user_code`);
the weights come from an archive that ptbin wrote, with `weights_only=True`. Tensors are put into the model as
they are (`assign=True`), so that their types and bits stay those of the weights.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptbin.restoring.digests import digests_of, said_by
from ptbin.restoring.user_code import UserCode

SHOWN = 20


class RefusalError(Exception):
    """Something the caller can mend; its text is the answer."""


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise RefusalError(f"torch 2.10 or later is needed, found {torch.__version__}")
    code = UserCode(request["folders"])
    code.install()
    if request["model"] == "transformers":
        model = _transformers(request["config"])
    else:
        if request["here"] is not None and not code.is_found(request["model"].partition(":")[0]):
            code.add_folder(request["here"])
        model = _built(request, code)
    weights = torch.load(request["weights"], map_location="cpu", weights_only=True, mmap=True)
    weights = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    report = _compare(model, weights, request["allow_missing"], request["allow_unexpected"])
    if report:
        return {"mismatch": report}
    own = model.state_dict()
    taken = {name: tensor for name, tensor in weights.items() if name in own}
    tied = _ties(model)
    with torch.no_grad():
        model.load_state_dict(taken, strict=False, assign=True)
        _retie(model, tied, set(taken))
    if request["as"] == "state-dict":
        torch.save(model.state_dict(), request["out"])
    elif request["as"] == "module":
        torch.save(model, request["out"])
    elif request["as"] == "torchscript":
        _save_script(model, request, code)
    else:
        _save_exported(model, request, code)
    return {
        "names": sorted(taken),
        "digests": digests_of(taken),
        "folders": code.folders,
        "modules": code.loaded(),
    }


def _resolve(spec: str, code: UserCode) -> Callable[..., Any]:
    module_name, _, attribute = spec.partition(":")
    try:
        found: Any = code.load(module_name)
    except ModuleNotFoundError as error:
        raise RefusalError(
            f"cannot import {module_name!r} ({error}); --model-path DIR says where it lies"
        ) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise RefusalError(f"{module_name!r} has no {attribute!r}") from error
    if not callable(found):
        raise RefusalError(f"{spec} is a {type(found).__name__} and cannot be called")
    return found  # type: ignore[no-any-return]


def _built(request: dict[str, Any], code: UserCode) -> nn.Module:
    call = _resolve(request["model"], code)
    arguments = request["args"]
    model = call(*arguments) if isinstance(arguments, list) else call(**(arguments or {}))
    if not isinstance(model, nn.Module):
        raise RefusalError(f"{request['model']} gave a {type(model).__name__}, not an nn.Module")
    return model


def _transformers(folder: str | None) -> nn.Module:
    if folder is None:
        raise RefusalError("--model transformers needs a config.json beside the weights")
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    if not names or not hasattr(transformers, names[0]):
        raise RefusalError(f"config.json names no architecture that transformers has: {names}")
    model: nn.Module = getattr(transformers, names[0])(config)
    return model.eval()


def _shared(model: nn.Module) -> dict[int, list[str]]:
    """Names in the state dict by the tensor they are; more than one where tensors are tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            names.setdefault(id(tensor), []).append(name)
    return names


def _ties(model: nn.Module) -> list[list[str]]:
    return [names for names in _shared(model).values() if len(names) > 1]


def _retie(model: nn.Module, ties: list[list[str]], taken: set[str]) -> None:
    """`assign=True` gave each name its own tensor: let tied names share the one that was loaded."""
    for names in ties:
        source = next((name for name in names if name in taken), None)
        if source is None:
            continue
        owner, _, leaf = source.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            other = getattr(model.get_submodule(owner), leaf)
            if name not in taken or torch.equal(other, tensor):
                setattr(model.get_submodule(owner), leaf, tensor)


def _allowed(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _compare(
    model: nn.Module, weights: dict[str, torch.Tensor], allow_missing: list[str], allow_unexpected: list[str]
) -> list[str]:
    """What stands in the way of loading strictly, as lines of a report; none where nothing does."""
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    present = {name for names in _shared(model).values() if weights.keys() & set(names) for name in names}
    missing = [n for n in own if n not in weights and n not in present and not _allowed(n, allow_missing)]
    unexpected = [name for name in weights if name not in own and not _allowed(name, allow_unexpected)]
    shapes = [n for n, tensor in weights.items() if n in own and own[n].shape != tensor.shape]
    spare = [name for name in weights if name not in own]
    lines: list[str] = []
    for title, names in (("missing in the weights", missing), ("unexpected by the model", unexpected)):
        if names:
            lines.append(f"{len(names)} {title}:")
            others = weights if names is missing else own
            pool = spare if names is missing else [n for n in own if n not in weights]
            tensors = own if names is missing else weights
            for name in names[:SHOWN]:
                hint = _nearest(name, tensors[name], pool or list(others), others)
                lines.append(f"  {name} {tuple(tensors[name].shape)}{hint}")
            if len(names) > SHOWN:
                lines.append(f"  ... and {len(names) - SHOWN} more")
    if shapes:
        lines.append(f"{len(shapes)} of another shape:")
        lines.extend(
            f"  {n}: weights {tuple(weights[n].shape)}, model {tuple(own[n].shape)}" for n in shapes[:SHOWN]
        )
        if len(shapes) > SHOWN:
            lines.append(f"  ... and {len(shapes) - SHOWN} more")
    return lines


def _nearest(name: str, tensor: torch.Tensor, pool: list[str], others: dict[str, torch.Tensor]) -> str:
    """The most similar name on the other side, one of the same shape where there is any."""
    same = [other for other in pool if others[other].shape == tensor.shape]
    close = difflib.get_close_matches(name, same, 1, 0.4) or difflib.get_close_matches(name, pool, 1, 0.6)
    return f"  (nearest: {close[0]})" if close else ""


def _example(
    model: nn.Module, request: dict[str, Any], code: UserCode, wanted: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs to trace with."""
    if request["example"] is not None:
        inputs = _resolve(request["example"], code)()
    else:
        inputs = getattr(model, "example_input_array", None)
        inputs = getattr(model, "dummy_inputs", None) if inputs is None else inputs
    if inputs is None:
        raise RefusalError(
            f"--as {wanted} needs inputs: --example MODULE:CALLABLE that returns a tuple or a dict"
        )
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _save_script(model: nn.Module, request: dict[str, Any], code: UserCode) -> None:
    if request["example"] is not None:
        args, kwargs = _example(model, request, code, "torchscript")
        traced = torch.jit.trace(model, args or None, example_kwarg_inputs=kwargs or None)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, request["out"])
        return
    torch.jit.save(torch.jit.script(model), request["out"])


def _save_exported(model: nn.Module, request: dict[str, Any], code: UserCode) -> None:
    args, kwargs = _example(model, request, code, "exported")
    torch.export.save(torch.export.export(model, args, kwargs), request["out"])


def main(arguments: list[str]) -> None:
    asked, answered = map(Path, arguments)
    try:
        answer = _answer(json.loads(asked.read_text(encoding="utf-8")))
    except RefusalError as refusal:
        answer = {"error": str(refusal)}
    except Exception:  # noqa: BLE001 - whatever the user's code raises is told to its user
        answer = {"error": said_by(sys.exc_info()[1])}
    answered.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
