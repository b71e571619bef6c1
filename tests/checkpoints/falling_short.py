"""Modules and tensors that are more than their data: kept as torch gives them, or refused, never half kept.

Children that are not plain modules (compiled, quantized, with pickling of their own), tensors that only
foreign code rebuilds, wrappers that carry scales. A class that stands for a vendor's is made here under the
vendor's name and pickles as the vendor's code does (torch_npu/utils/storage.py,
transformer_engine/pytorch/tensor/float8_tensor.py, bitsandbytes/nn/modules.py, geoopt/tensor.py).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.checkpoints.models import adopt, convnet, vanished_classes, weights
from tests.checkpoints.registry import Checkpoint, checkpoint

__all__ = ["Case", "case", "tensors_in"]

Case = tuple[Any, dict[str, torch.Tensor] | None]
"""What to save (or the file as bytes), and the tensors that torch has of it; None where it is refused."""


def tensors_in(state: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def case(
    reason: str | None = None, *, reads: str | None = None, name: str | None = None, **options: Any
) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register a function that makes what is saved and what is right."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        @checkpoint(name=name or make.__name__, reason=reason, torch_reads=reads)
        def build(path: Path) -> Checkpoint:
            torch.manual_seed(3)
            value, expected = make()
            if isinstance(value, bytes):
                path.write_bytes(value)
            else:
                torch.save(value, path)
            return Checkpoint(path, expected, reason=reason, options=options)

        return make

    return register


# ---- modules whose children are not plain modules


def _compiled(model: nn.Module) -> nn.Module:
    made: Any = torch.compile(model)
    assert isinstance(made, nn.Module)
    return made


@case(reads="pickle")
def compiled_twice_below() -> Case:
    inner = _compiled(nn.Sequential(nn.Linear(4, 4), _compiled(nn.Linear(4, 2))))
    model = nn.Sequential(nn.LayerNorm(4), inner)
    return model, weights(model)


@case()
def data_parallel_of_compiled() -> Case:
    model = nn.DataParallel(_compiled(convnet()))
    return model, weights(model)


@case(reads="pickle")
def compiled_data_parallel() -> Case:
    model = _compiled(nn.DataParallel(convnet()))
    return model, weights(model)


@case(reads="pickle")
def compiled_in_a_training_dict() -> Case:
    model = _compiled(convnet())
    return {"epoch": 3, "model": model, "ema": None}, weights(model)


@case(reads="weights_only")
def fsdp_wrapped_names() -> Case:
    state = {f"_fsdp_wrapped_module.{name}": value for name, value in weights(convnet()).items()}
    state["_fsdp_wrapped_module._checkpoint_wrapped_module.w"] = torch.randn(3)
    return {"model": state}, state


@case(reads="weights_only")
def parametrized_layers() -> Case:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    )
    return model.state_dict(), weights(model)


@case(reads="pickle")
def spectral_norm_by_hook() -> Case:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(2, 2))
    return {"model": model}, weights(model)


@case(reads="weights_only")
def pruned_layers() -> Case:
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(2, 2, 1))
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    return model.state_dict(), weights(model)


def _quantized(how: str) -> nn.Module:
    from torch.ao import quantization as ao

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "dynamic LSTM":
            dynamic: nn.Module = ao.quantize_dynamic(nn.Sequential(nn.LSTM(4, 4), nn.LayerNorm(4)), {nn.LSTM})
            return dynamic
        stub = ao.QuantStub()
        model = nn.Sequential(stub, nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
        if how == "aware":
            model.train().qconfig = ao.get_default_qat_qconfig("fbgemm")
            prepared = ao.prepare_qat(model)
        else:
            model.eval().qconfig = ao.get_default_qconfig("fbgemm")
            prepared = ao.prepare(model)
        prepared(torch.randn(2, 1, 2, 2))
        made: nn.Module = prepared if how == "aware" else ao.convert(prepared)
    return made


@case(reads="weights_only")
def quantization_aware_state_dict() -> Case:
    state = _quantized("aware").state_dict()
    return state, tensors_in(state)


@case(reads="weights_only")
def statically_quantized_state_dict() -> Case:
    """Its convolution's weight is a tensor, its linear's a tuple: the tensors alone are compared."""
    state = _quantized("static").state_dict()
    return {"model": state}, tensors_in(state)


@case("unsupported_tensor")
def statically_quantized_module() -> Case:
    return _quantized("static"), None


@case("unsupported_tensor")
def dynamically_quantized_lstm() -> Case:
    return {"model": _quantized("dynamic LSTM")}, None


def _own_pickling(module_name: str, make: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    with vanished_classes(module_name) as module:
        torch.save(make(module), file)
    return file.getvalue()


def _reconstruct(meta: Any) -> Any:
    raise NotImplementedError(meta)


class _Persistent(nn.Linear):
    def __reduce__(self) -> Any:
        return _reconstruct, ({"class_name": "Layer", "state": dict(self.__dict__)},)


class _TupleState(nn.Linear):
    def __getstate__(self) -> Any:  # as torch.ao's layers have it
        return (self.in_features, self.out_features, self.weight, self.bias)

    def __setstate__(self, state: Any) -> None:
        raise NotImplementedError(state)


@case("unsupported_tensor")
def child_rebuilt_by_a_function() -> Case:
    """StyleGAN's torch_utils.persistence: `_reconstruct_persistent_obj(meta)`."""
    return nn.Sequential(nn.LayerNorm(4), _Persistent(4, 4)), None


@case("unsupported_tensor")
def child_rebuilt_by_a_function_below_another() -> Case:
    return {"ema": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(_Persistent(4, 4))})}, None


@case("unsupported_tensor")
def child_with_a_tuple_for_a_state() -> Case:
    return {"model": nn.Sequential(nn.LayerNorm(4), nn.ModuleList([_TupleState(4, 4)]))}, None


# ---- tensors that only foreign code rebuilds


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, extra: Any) -> Any:
    raise NotImplementedError(extra)


class _Rebuilt(torch.Tensor):
    """`__reduce_ex__` gives torch's own arguments and one more, for a function of its own."""

    extra: Any = None
    function = staticmethod(_rebuild)

    def __reduce_ex__(self, protocol: Any) -> Any:
        arguments = self.as_subclass(torch.Tensor).__reduce_ex__(protocol)[1]
        return type(self).function, (*arguments[:6], type(self).extra)


def _vendors(module_name: str, function: str, extra: Any) -> bytes:
    def make(module: Any) -> Any:
        def rebuild(*arguments: Any) -> Any:
            raise NotImplementedError(arguments)

        rebuild.__name__ = function
        cls = type("_Theirs", (_Rebuilt,), {"extra": extra, "function": staticmethod(adopt(module, rebuild))})
        return {"w": torch.arange(12.0).view(3, 4).as_subclass(cls), "b": torch.arange(3.0)}

    return _own_pickling(module_name, make)


@case()
def tensor_of_an_npu() -> Case:
    file = _vendors("torch_npu.utils.storage", "_rebuild_npu_tensor", None)
    return file, {"w": torch.arange(12.0).view(3, 4), "b": torch.arange(3.0)}


@case()
def tensor_of_an_npu_in_another_format() -> Case:
    """The number of the device's format says how to lay it out there again; the file is laid out plainly."""
    file = _vendors("torch_npu.utils.storage", "_rebuild_npu_tensor", 29)
    return file, {"w": torch.arange(12.0).view(3, 4), "b": torch.arange(3.0)}


@case("unsupported_tensor")
def tensor_on_a_manifold() -> Case:
    """geoopt's ManifoldParameter; here the manifold holds a module, which is no state dict of a model."""
    return {"points": torch.randn(4, 4).as_subclass(_Manifold), "bn.running_mean": torch.randn(4)}, None


class _Manifold(_Rebuilt):
    extra = nn.BatchNorm1d(2)


@case("unsupported_tensor")
def tensor_on_a_manifold_alone() -> Case:
    return {"model": {"points": torch.randn(4, 4).as_subclass(_Manifold)}}, None


class _Reduced:
    """Pickles as a call of one of torch's functions, as tensors of devices without storages do."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@case()
def tensors_of_an_xla_device() -> Case:
    half, single = torch.randn(3, 4).bfloat16(), torch.randn(5)
    from_numpy = torch._utils._rebuild_device_tensor_from_numpy
    value = {
        "half": _Reduced(from_numpy, half.float().numpy(), torch.bfloat16, "cpu", False),
        "single": _Reduced(from_numpy, single.numpy(), torch.float32, "cpu", True),
    }
    return {"state_dict": value}, {"half": half, "single": single}


@case()
def tensors_copied_to_the_cpu() -> Case:
    """torch 2.10 and later, for XLA, MAIA, MTIA."""
    weight = torch.randn(3, 4).half()
    from_cpu = torch._utils._rebuild_device_tensor_from_cpu_tensor
    return {"w": _Reduced(from_cpu, weight, torch.float16, "cpu", False)}, {"w": weight}


# ---- wrappers and attributes that hold scales


class _Wrapper(torch.Tensor):
    """No data of its own; its attributes have it. Pickled by torch's `_rebuild_wrapper_subclass`."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self._data, self._scale = data, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(func)


_WRAPPERS = {
    "torchao_weight": ("torchao.dtypes.affine_quantized_tensor", "AffineQuantizedTensor"),
    "quanto_weight": ("optimum.quanto.tensor.weights", "WeightQBytesTensor"),
    "float8_weight": ("torchao.float8.float8_training_tensor", "Float8TrainingTensor"),
}


def _register_wrapper(name: str) -> None:
    module_name, class_name = _WRAPPERS[name]

    @case("unsupported_tensor", name=name)
    def make() -> Case:
        def build(module: Any) -> Any:
            cls = adopt(module, type(class_name, (_Wrapper,), {}))
            weight = cls(torch.randint(-9, 9, (4, 4), dtype=torch.int8), torch.rand(4))
            return {"model": {"layer.weight": weight, "layer.bias": torch.randn(4)}}

        return _own_pickling(module_name, build), None


for _name in _WRAPPERS:
    _register_wrapper(_name)


@case("unsupported_tensor")
def transformer_engine_weight() -> Case:
    """Float8Tensor pickles as a call of one of its class methods, which protocol 2 writes by `getattr`."""

    def build(module: Any) -> Any:
        class Float8Tensor:
            @classmethod
            def _make_in_reduce_ex(cls, *arguments: Any) -> Any:
                raise NotImplementedError(arguments)

            def __reduce_ex__(self, protocol: Any) -> Any:
                data = torch.randint(0, 255, (4, 4), dtype=torch.uint8)
                return Float8Tensor._make_in_reduce_ex, (data, "E4M3", torch.rand(1), torch.bfloat16)

        return {"fc.weight": adopt(module, Float8Tensor)(), "fc.bias": torch.randn(4)}

    return _own_pickling("transformer_engine.pytorch.tensor", build), None


@case("unsupported_tensor")
def eight_bit_parameter_with_its_scale() -> Case:
    """bitsandbytes' Int8Params before its first call: CB and SCB lie on the parameter."""
    weight: Any = nn.Parameter(torch.randint(-9, 9, (4, 4), dtype=torch.int8), requires_grad=False)
    weight.CB, weight.SCB = weight.data, torch.rand(4)
    return {"state_dict": {"fc.weight": weight, "fc.bias": torch.randn(4)}}, None


@case("unsupported_tensor")
def module_of_eight_bit_parameters() -> Case:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    weight: Any = model[1].weight
    weight.SCB = torch.rand(4)
    return model, None


class Params4bit(nn.Parameter):
    def __getstate__(self) -> Any:  # as bitsandbytes/nn/modules.py
        return {"data": self.data, "requires_grad": False, "quant_state": {"absmax": torch.rand(3)}}

    def __setstate__(self, state: Any) -> None:
        raise NotImplementedError(state)


@case("unsupported_tensor")
def four_bit_parameter() -> Case:
    packed = Params4bit(torch.randint(0, 255, (8, 1), dtype=torch.uint8), requires_grad=False)
    return {"fc.weight": packed, "fc.bias": torch.randn(4)}, None


@case(reads="weights_only")
def four_bit_state_dict() -> Case:
    """What bitsandbytes' `state_dict()` gives is plain: the scales have names of their own."""
    state = {
        "fc.weight": torch.randint(0, 255, (8, 1), dtype=torch.uint8),
        "fc.weight.absmax": torch.rand(3),
        "fc.weight.quant_map": torch.rand(16),
        "fc.weight.nested_absmax": torch.rand(1),
        "fc.weight.quant_state.bitsandbytes__nf4": torch.randint(0, 255, (60,), dtype=torch.uint8),
    }
    return {"model": state}, state


@case(reads="weights_only")
def eight_bit_state_dict() -> Case:
    state = {
        "fc.weight": torch.randint(-9, 9, (4, 4), dtype=torch.int8),
        "fc.SCB": torch.rand(4),
        "fc.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return {"model": state}, state


@case(reads="weights_only")
def gptq_state_dict() -> Case:
    """Whole numbers alone are a model, too."""
    state = {
        "q_proj.qweight": torch.randint(-9, 9, (4, 4), dtype=torch.int32),
        "q_proj.qzeros": torch.randint(-9, 9, (1, 4), dtype=torch.int32),
        "q_proj.g_idx": torch.arange(4, dtype=torch.int32),
    }
    return {"state_dict": state, "epoch": 1}, state
