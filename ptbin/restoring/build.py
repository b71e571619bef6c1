"""`python -m ptbin.restoring.build ANSWER < REQUEST`: the user's model, loaded strictly and saved.

Runs in a separate process. The callable's module is imported from where the caller said (`user_code`); the
weights come from an archive that the parent process has read symbolically, with `weights_only=True`, mapped.
How they get into the model is `filling`, what does not fit `fitting`, the files `saving`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ptbin.restoring.answering import RefusalError, answer_request
from ptbin.restoring.filling import Filled, empty_tensors, fill, unwrapped
from ptbin.restoring.fitting import SHOWN, allowed, mismatch_report
from ptbin.restoring.saving import Example, UnwritableError, save
from ptbin.restoring.snapshot import Contents, mapped_views, own_tensors, ties_of
from ptbin.restoring.user_code import UserCode


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise RefusalError(f"torch 2.10 or later is needed, found {torch.__version__}")
    code = UserCode(request["folders"])
    code.install()
    weights = torch.load(request["weights"], map_location="cpu", weights_only=True, mmap=True)
    if request["model"] == "transformers":
        model, filled = _transformers(request["config"], weights)
    else:
        if request["here"] is not None and not code.is_found(request["model"].partition(":")[0]):
            code.add_folder(request["here"])
        model = _built(request, code)
        filled = fill(unwrapped(model, weights), weights)
    target = unwrapped(model, weights)
    missing = [name for name in filled.missing if not allowed(name, request["allow_missing"])]
    unexpected = [name for name in filled.unexpected if not allowed(name, request["allow_unexpected"])]
    if report := mismatch_report(
        _shapes(weights),
        _shapes(target.state_dict()) if not isinstance(target, torch.jit.ScriptModule) else {},
        missing=missing,
        unexpected=unexpected,
        errors=filled.errors,
        conflicts=filled.conflicts,
    ):
        if missing and request["model"] == "transformers":
            report.append("transformers would give the missing ones random values")
        return {"mismatch": report, "names": [list(weights), list(target.state_dict())]}
    if empty := empty_tensors(target):
        names = ", ".join(empty[:SHOWN])
        raise RefusalError(
            f"built on the meta device, and nothing fills {names}: the weights do not have them; "
            "let the callable build the model on the CPU"
        )
    # A program is run before it is saved, and may change what it maps: there the weights are hashed.
    runs = request["as"] in {"torchscript", "exported"}
    contents = Contents(None if runs else request["weights"])
    views = mapped_views(weights, request["weights"])
    others = {name: value for name, value in weights.items() if name not in views}
    given = contents.of_values(others) | views
    facts = contents.of_model(target)
    whole = contents.of_model(model) if model is not target else facts
    state = contents.of_values(own_tensors(target)) if runs else {}
    written = contents.of_values(model.state_dict()) if request["as"] == "state-dict" else {}
    example = _example(target, request, code)
    outputs = save(
        model if request["as"] in {"module", "state-dict"} else target,
        request["as"],
        request["out"],
        example,
        train=request["train"],
    )
    if runs and Contents().of_model(target) != facts:
        raise RefusalError(f"--as {request['as']}: running the model on the example changed its weights")
    if outputs is not None and example is not None:
        torch.save({"args": example.args, "kwargs": example.kwargs, "outputs": outputs}, request["expected"])
    return {
        "given": given,
        "state": state,
        "written": written,
        "ties": ties_of(target),
        "facts": whole if request["as"] == "module" else facts,
        "loaded": {name: facts[name] for name in given if name in facts and name not in filled.unexpected},
        "lost": [name for name in given if name not in facts and name not in filled.unexpected],
        "initial": [name for name in filled.missing if name not in missing],
        "unused": [name for name in filled.unexpected if name not in unexpected],
        "has_outputs": outputs is not None,
        "folders": code.folders,
        "modules": code.loaded(),
    }


def _shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {
        name: tuple(value.shape) if isinstance(value, torch.Tensor) else None
        for name, value in values.items()
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


def _transformers(folder: str | None, weights: Mapping[str, Any]) -> tuple[nn.Module, Filled]:
    """The architecture of config.json, with all that `from_pretrained` takes: renamed keys, fused experts."""
    if folder is None:
        raise RefusalError("--model transformers needs a config.json next to the weights")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    if not names or not hasattr(transformers, names[0]):
        raise RefusalError(f"config.json names no architecture that transformers has: {names}")
    kinds = {value.dtype for value in weights.values() if _is_float(value)}
    model, told = getattr(transformers, names[0]).from_pretrained(
        None,
        config=config,
        state_dict=dict(weights),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported with everything else
        dtype=kinds.pop() if len(kinds) == 1 else torch.float32,
    )
    _keep_types(model, weights)
    filled = Filled(
        missing=sorted(told["missing_keys"]),
        unexpected=sorted(told["unexpected_keys"]),
        errors=[
            f"size mismatch for {name}: copying a param with shape {given} from checkpoint, "
            f"the shape in current model is {own}"
            for name, given, own in sorted(told["mismatched_keys"])
        ]
        + [str(error) for error in told.get("error_msgs", ())],
    )
    return model.eval(), filled


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _keep_types(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """`from_pretrained` gives all parameters one type; weights of several keep theirs."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        given: Any = weights.get(name)
        if _is_float(given) and given.shape == tensor.shape and given.dtype != tensor.dtype:
            tensor.data = given


def _example(model: nn.Module, request: dict[str, Any], code: UserCode) -> Example | None:
    """Inputs to trace with, and to compare outputs by; None where none are named and none are needed."""
    if request["example"] is not None:
        inputs = _resolve(request["example"], code)()
    elif request["as"] == "exported":
        inputs = getattr(model, "example_input_array", None)
        inputs = getattr(model, "dummy_inputs", None) if inputs is None else inputs
        if inputs is None:
            raise RefusalError(
                "--as exported needs inputs: --example MODULE:CALLABLE that returns a tuple or a dict"
            )
    else:
        return None
    if isinstance(inputs, dict):
        return Example((), inputs)
    return Example(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def _answer_or_fault(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return _answer(request)
    except UnwritableError as error:
        return {"unwritable": str(error)}


if __name__ == "__main__":
    answer_request(_answer_or_fault)
