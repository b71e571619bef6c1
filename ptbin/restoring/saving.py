"""A loaded model into a file: its state dict, the module, TorchScript or an exported program.

Tracing runs the model, and a run may change it (running statistics). So it is done on a copy, in evaluation
mode unless training mode is asked for, and the copy's tensors are set back before the program is saved. Runs
in the child process.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree  # torch.export itself takes inputs and outputs apart with it

from ptbin.restoring.answering import RefusalError, error_text
from ptbin.restoring.snapshot import own_tensors

SEED = 0


class UnwritableError(Exception):
    """The file cannot be written: the disk is full, most often."""


@dataclass(slots=True)
class Example:
    """Inputs, positional and by keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def save(model: nn.Module, form: str, out: str, example: Example | None, *, train: bool) -> list[Any] | None:
    """Write `out`; what the model answers to the example, where it gives the same answer each time.

    Raises:
        RefusalError: pickle, TorchScript or torch.export does not take this model.
        UnwritableError: the disk does not take the file.
    """
    if form in {"torchscript", "exported"}:
        model.train(train)
    outputs = _repeatable_outputs(model, example) if example is not None else None
    program: Any = _program(model, form, example) if form in {"torchscript", "exported"} else None
    try:
        if form == "state-dict":
            torch.save(model.state_dict(), out)
        elif form == "module":
            _save_module(model, out)
        elif form == "torchscript":
            torch.jit.save(program, out)
        else:
            torch.export.save(program, out)
    except OSError as error:
        raise UnwritableError(str(error)) from error
    except RuntimeError as error:
        # caffe2/serialize/inline_container.cc writes archives, and has no error class for the disk.
        # What it raises first ("file write failed") may be hidden behind what its end then raises.
        if "inline_container.cc" not in str(error):
            raise
        raise UnwritableError(str(error.__context__ or error).splitlines()[0]) from error
    return outputs


def _program(model: nn.Module, form: str, example: Example | None) -> Any:
    """The model as TorchScript or an exported program, with the model's own tensors."""
    work = _copy_of(model)
    try:
        program = _traced(work, form, example)
    except Exception as error:
        raise RefusalError(f"--as {form}: torch cannot take the model apart: {error_text(error)}") from error
    _set_back(work, model)
    if form == "exported":
        _set_back_program(program, model)
    return program


def _save_module(model: nn.Module, out: str) -> None:
    try:
        torch.save(model, out)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise RefusalError(
            f"the module cannot be pickled ({error}): a lambda or a local class has no name to be found by; "
            "--as state-dict saves its weights"
        ) from error
    except RuntimeError as error:
        if "parametrized" not in str(error):
            raise
        raise RefusalError(
            "torch does not pickle modules with parametrizations; --as state-dict saves their weights"
        ) from error


def _copy_of(model: nn.Module) -> nn.Module:
    """A copy with its own buffers; it shares the parameters, which would double the memory."""
    try:
        return copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except RuntimeError:  # "Only Tensors created explicitly by the user support the deepcopy protocol"
        return model


def _traced(model: nn.Module, form: str, example: Example | None) -> Any:
    torch.manual_seed(SEED)
    if form == "exported":
        assert example is not None
        return torch.export.export(model, example.args, example.kwargs)
    if example is None:
        return torch.jit.script(model)
    # The outputs are compared in a fresh process; torch's own check would run the model three times more.
    return torch.jit.trace(  # type: ignore[no-untyped-call]
        model, example.args or None, example_kwarg_inputs=example.kwargs or None, check_trace=False
    )


def _set_back(work: nn.Module, model: nn.Module) -> None:
    """What running the copy has changed gets its value back; the program refers to these very tensors."""
    if work is model:
        return
    with torch.no_grad():
        for own, original in zip(work.buffers(), model.buffers(), strict=True):
            if own.data_ptr() != original.data_ptr():
                own.copy_(original)


def _set_back_program(program: Any, model: nn.Module) -> None:
    state = own_tensors(model)
    with torch.no_grad():
        for name, tensor in program.state_dict.items():
            if name in state and tensor.data_ptr() != state[name].data_ptr():
                tensor.copy_(state[name])


def _repeatable_outputs(model: nn.Module, example: Example) -> list[Any] | None:
    first = run_example(_copy_of(model), example, SEED)
    again = run_example(_copy_of(model), example, SEED + 1)
    return first if same_outputs(first, again) else None


def run_example(model: Any, example: Example, seed: int = SEED) -> list[Any]:
    """The outputs as a flat list. Inputs are copied, because a model may change them."""
    args, kwargs = copy.deepcopy((example.args, example.kwargs))
    torch.manual_seed(seed)
    with torch.no_grad():
        leaves: list[Any] = pytree.tree_leaves(model(*args, **kwargs))
    return [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def same_outputs(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether they agree as far as floating point may: `torch.testing.assert_close`'s tolerances."""
    found = [leaf for leaf in found if leaf is not None]
    wanted = [leaf for leaf in wanted if leaf is not None]
    if len(found) != len(wanted):
        return False
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            try:
                torch.testing.assert_close(one, other, equal_nan=True)
            except AssertionError:
                return False
        elif isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
            return False
    return True
