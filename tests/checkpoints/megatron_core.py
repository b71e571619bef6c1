"""Makes `made/megatron_core.tar.xz`: small checkpoints by megatron-core itself, on a CPU.

    python -m venv /tmp/megatron && /tmp/megatron/bin/pip install torch megatron-core==0.16.1
    PYTHONSAFEPATH=1 /tmp/megatron/bin/python tests/checkpoints/megatron_core.py

Not part of the suite, which has the archive. A model on one rank is saved as `torch_dist`. Ranks on a grid
load that by `dist_checkpointing` and save what they hold both as Megatron's trainer does for format `torch`
(megatron/training/checkpointing.py) and as `torch_dist`: the cutting is Megatron's. `<case>.pt` is what the
one rank had. Where megatron-core asks for a GPU it gets the CPU.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["CASES", "VOCABULARY"]

ITERATION = 7
WIDTH, HEADS, GROUPS, HIDDEN, VOCABULARY = 8, 4, 2, 8, 10

CASES: dict[str, dict[str, Any]] = {
    "virtual": {"layers": 6, "grid": (2, 2, 2, 1), "tied": False, "first": 4},
    "tied": {"layers": 3, "grid": (1, 2, None, 1), "tied": True, "first": 1},
    "experts": {"layers": 2, "grid": (2, 1, None, 2), "tied": False, "experts": 4},
}
"""`grid`: (tensor, pipeline, virtual, expert); `first`: layers of the first stage, of which the last has the
rest.
"""


def _pretend() -> None:
    """Let the CPU stand in for the GPU that megatron-core takes for granted."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda *_: None
    cuda.Stream = lambda *_, **__: None
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self


def _models(case: dict[str, Any], grid: tuple[int, int, int | None, int]) -> list[Any]:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor, pipeline, virtual, expert = grid
    parallel_state.initialize_model_parallel(
        tensor, pipeline, virtual, expert_model_parallel_size=expert, expert_tensor_parallel_size=tensor
    )
    uneven: dict[str, Any] = {}
    if pipeline > 1 and "first" in case:
        uneven["num_layers_in_first_pipeline_stage"] = case["first"]
    moe: dict[str, Any] = {}
    if "experts" in case:
        moe = {"num_moe_experts": case["experts"], "moe_router_topk": 2, "moe_ffn_hidden_size": HIDDEN}
    config = TransformerConfig(
        num_layers=case["layers"],
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        ffn_hidden_size=HIDDEN,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=tensor,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **uneven,
        **moe,
    )
    stages = range(virtual) if virtual is not None else [None]
    return [
        GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage),
            vocab_size=-(-VOCABULARY // (4 * tensor)) * 4 * tensor,
            max_sequence_length=8,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
            share_embeddings_and_output_weights=case["tied"],
            position_embedding_type="rope",
            vp_stage=stage,
        )
        for stage in stages
    ]


def _named(models: list[Any], save: str) -> dict[str, Any]:
    keys = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]
    return {key: getattr(model, save)() for key, model in zip(keys, models, strict=True)}


def _arguments(case: dict[str, Any], grid: tuple[int, int, int | None, int]) -> argparse.Namespace:
    sizes = ("tensor", "pipeline", "virtual_pipeline", "expert")
    return argparse.Namespace(
        num_layers=case["layers"],
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        group_query_attention=True,
        kv_channels=None,
        swiglu=True,
        num_experts=case.get("experts"),
        vocab_size=VOCABULARY,
        untie_embeddings_and_output_weights=not case["tied"],
        expert_tensor_parallel_size=grid[0],
        **{f"{name}_model_parallel_size": size for name, size in zip(sizes, grid, strict=True)},
    )


def _rank(rank: int, world: int, name: str, folder: Path, meeting: str, *, alone: bool) -> None:
    warnings.simplefilter("ignore")
    _pretend()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    from megatron.core import dist_checkpointing, parallel_state

    case = CASES[name]
    grid = (1, 1, None, 1) if alone else case["grid"]
    models, beside = _models(case, grid), {"args": _arguments(case, grid), "iteration": ITERATION}
    one, many = folder / f"{name}_one", folder / f"{name}_dist"
    if alone:
        generator = torch.Generator().manual_seed(1)
        for parameter in models[0].parameters():
            parameter.data.normal_(generator=generator)
        one.mkdir()
        dist_checkpointing.save({**_named(models, "sharded_state_dict"), **beside}, str(one))
        state = models[0].state_dict_for_save_checkpoint()
        torch.save({k: v for k, v in state.items() if isinstance(v, torch.Tensor)}, folder / f"{name}.pt")
    else:
        loaded = dist_checkpointing.load(_named(models, "sharded_state_dict"), str(one))
        for key, model in zip(sorted(key for key in loaded if key.startswith("model")), models, strict=True):
            model.load_state_dict(loaded[key], strict=False)
        place = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        if grid[1] > 1:
            place += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        if grid[3] > 1:
            place += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
        path = folder / name / place / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        saved = _named(models, "state_dict_for_save_checkpoint")
        torch.save({**beside, "checkpoint_version": 3.0, **saved}, path)
        many.mkdir(exist_ok=True)
        dist.barrier()
        dist_checkpointing.save({**_named(models, "sharded_state_dict"), **beside}, str(many))
    dist.barrier()
    os._exit(0)  # gloo's threads would wait for one another


def _run(name: str, folder: Path, *, alone: bool) -> None:
    tensor, pipeline, _, expert = CASES[name]["grid"]
    world = 1 if alone else tensor * pipeline * expert
    meeting = str(folder / f"{name}_{world}.meeting")
    context = torch.multiprocessing.get_context("spawn")
    target = functools.partial(_rank, alone=alone)
    ranks = [
        context.Process(target=target, args=(rank, world, name, folder, meeting)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name}: a rank failed")


def main() -> None:
    """Write the archive."""
    dest = Path(__file__).parent / "made" / "megatron_core.tar.xz"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in CASES:
            _run(name, folder, alone=True)
            _run(name, folder, alone=False)
        with tarfile.open(dest, "w:xz", preset=9) as archive:
            for path in sorted(folder.rglob("*")):
                if (
                    path.is_file()
                    and path.suffix != ".meeting"
                    and "_one" not in path.parts[len(folder.parts)]
                ):
                    info = tarfile.TarInfo(str(path.relative_to(folder)))
                    info.size = path.stat().st_size
                    archive.addfile(info, io.BytesIO(path.read_bytes()))


if __name__ == "__main__":
    main()
