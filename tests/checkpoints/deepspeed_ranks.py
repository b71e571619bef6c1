"""DeepSpeed's model-parallel folders, made by DeepSpeed itself on two gloo ranks; about forty seconds.

    folder = train(tmp_path)

Below it: `tp0`, `tp1`, `tp3` (a tiny Llama under AutoTP at that ZeRO stage, each with `global_step1` and what
`ds_to_universal` makes of it, `global_step1_universal`; `whole.bin` of DeepSpeed's own `save_16bit_model`
where
it gathers), `pipeline` (a `PipelineModule` of two stages, `held_<rank>.pt`: each stage's own state dict) and
`experts` (a mixture of experts under ZeRO 1 or 2, `held_<rank>.pt`). This file is also the ranks' program.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["EXPERTS", "TAG", "start_ranks", "train", "universal"]

WORLD = 2
TAG = "global_step1"
EXPERTS = ".deepspeed_experts."
TIMEOUT_SECONDS = 300
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "DS_SKIP_CUDA_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


def train(folder: Path) -> Path:
    """Every kind below the folder."""
    for kind in ("tp0", "tp1", "tp3", "pipeline", "experts"):
        (folder / kind).mkdir(parents=True)
    start_ranks([str(folder), "tp0", "tp1", "tp3"])
    start_ranks([str(folder), "experts", "pipeline"])
    for kind in ("tp1", "tp3"):
        universal(folder / kind)
    return folder


def universal(folder: Path) -> None:
    """DeepSpeed's own `ds_to_universal` of a run's last tag."""
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal"),
            *("--input_folder", str(folder / TAG), "--output_folder", str(folder / f"{TAG}_universal")),
            *("--num_extract_workers", "1", "--num_merge_workers", "1", "--no_strict"),  # a frozen parameter
        ],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ds_to_universal failed: {done.stderr[-3000:]}")


def start_ranks(arguments: list[str]) -> None:
    """This file on two processes, and wait for them."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(WORLD),
                "LOCAL_SIZE": str(WORLD),
            },
        )
        for rank in range(WORLD)
    ]
    try:
        told = [rank.communicate(timeout=TIMEOUT_SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("DeepSpeed failed:\n" + "\n".join(text[-3000:] for text in told))


# -- the ranks' program --------------------------------------------------------------------------------


def _config(**more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


def _tensor_parallel(deepspeed: Any, folder: Path, stage: int) -> None:
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    )
    model.model.norm.weight.requires_grad = False
    config = _config(
        tensor_parallel={"autotp_size": WORLD}, zero_optimization={"stage": stage}, bf16={"enabled": True}
    )
    engine, *_ = deepspeed.initialize(model=model, config=config)
    tokens = torch.arange(6).reshape(1, 6).repeat(2, 1)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(str(folder), tag=TAG)
    if stage == 0:
        # Not `save_16bit_model`, which saves the first rank's slices.
        gathered = importlib.import_module("deepspeed.module_inject.layers").GatherReplacedLayerParams
        whole: dict[str, torch.Tensor] = {}
        for name, module in engine.module.named_modules():
            parameters = list(module.parameters(recurse=False))
            with gathered(parameters, module, enabled=hasattr(module, "gather_params")):
                whole |= {
                    f"{name}.{own}": p.detach().clone() for own, p in module.named_parameters(recurse=False)
                }
        if torch.distributed.get_rank() == 0:
            torch.save(whole, folder / "whole.pt")


def _pipeline(deepspeed: Any, folder: Path) -> None:
    pipe = importlib.import_module("deepspeed.pipe")
    torch.manual_seed(0)
    layers = [
        pipe.TiedLayerSpec("embed", torch.nn.Linear, 6, 6, bias=False),
        pipe.LayerSpec(torch.nn.Linear, 6, 6),
        lambda hidden: hidden + 1,
        pipe.LayerSpec(torch.nn.Linear, 6, 6),
        pipe.LayerSpec(torch.nn.BatchNorm1d, 6),
        pipe.TiedLayerSpec("embed", torch.nn.Linear, 6, 6, bias=False),
    ]
    net = pipe.PipelineModule(
        layers=layers, num_stages=WORLD, loss_fn=torch.nn.MSELoss(), partition_method="uniform"
    )
    engine, *_ = deepspeed.initialize(
        model=net,
        config=_config(gradient_accumulation_steps=2, zero_optimization={"stage": 1}, bf16={"enabled": True}),
    )
    engine.save_checkpoint(str(folder), tag=TAG)
    torch.save(dict(net.state_dict()), folder / f"held_{torch.distributed.get_rank()}.pt")


def _experts(deepspeed: Any, folder: Path) -> None:
    mixture = importlib.import_module("deepspeed.moe.layer").MoE
    utilities = importlib.import_module("deepspeed.moe.utils")
    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    model = torch.nn.ModuleDict(
        {
            "first": torch.nn.Linear(4, 4),
            "mixture": mixture(hidden_size=4, expert=torch.nn.Linear(4, 4), num_experts=WORLD, ep_size=WORLD),
        }
    )
    for name, parameter in model.named_parameters():
        if EXPERTS in name:
            parameter.data.fill_(float(rank + 1))
    groups = utilities.split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config=_config(zero_optimization={"stage": 2}, bf16={"enabled": True}),
    )
    engine.save_checkpoint(str(folder), tag=TAG)
    torch.save(dict(engine.module.state_dict()), folder / f"held_{rank}.pt")


def _run_rank(folder: Path, kinds: list[str]) -> None:
    # By name, and without its C++ collectives, as in `deepspeed_zero`. The ranks meet in a file: no port.
    deepspeed = importlib.import_module("deepspeed")
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    rank = int(os.environ["RANK"])
    meet = f"file://{folder}/meet_{kinds[0]}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORLD)
    deepspeed.init_distributed(dist_backend="gloo")
    for kind in kinds:
        if kind == "pipeline":
            _pipeline(deepspeed, folder / kind)
        elif kind == "experts":
            _experts(deepspeed, folder / kind)
        else:
            _tensor_parallel(deepspeed, folder / kind, int(kind[2:]))
        torch.distributed.barrier()


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # as in `deepspeed_zero`
