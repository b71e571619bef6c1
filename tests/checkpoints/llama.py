"""A small Llama under Meta's names, whole and cut into the parts that Meta's ranks save."""

from __future__ import annotations

import json
from pathlib import Path

import torch

__all__ = ["HEAD", "HEADS", "KEY_HEADS", "LAYERS", "VOCABULARY", "WIDTH", "meta_llama", "write_meta_parts"]

WIDTH, HEADS, KEY_HEADS, HIDDEN, VOCABULARY, LAYERS = 64, 8, 4, 96, 48, 2
HEAD = WIDTH // HEADS


def meta_llama() -> dict[str, torch.Tensor]:
    """The whole."""
    generator = torch.Generator().manual_seed(4)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    found = {"tok_embeddings.weight": numbers(VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        above = f"layers.{layer}."
        found |= {
            above + "attention.wq.weight": numbers(WIDTH, WIDTH),
            above + "attention.wk.weight": numbers(KEY_HEADS * HEAD, WIDTH),
            above + "attention.wv.weight": numbers(KEY_HEADS * HEAD, WIDTH),
            above + "attention.wo.weight": numbers(WIDTH, WIDTH),
            above + "feed_forward.w1.weight": numbers(HIDDEN, WIDTH),
            above + "feed_forward.w2.weight": numbers(WIDTH, HIDDEN),
            above + "feed_forward.w3.weight": numbers(HIDDEN, WIDTH),
            above + "attention_norm.weight": numbers(WIDTH),
            above + "ffn_norm.weight": numbers(WIDTH),
        }
    return found | {
        "norm.weight": numbers(WIDTH),
        "output.weight": numbers(VOCABULARY, WIDTH),
        "rope.freqs": torch.arange(HEAD // 2).bfloat16(),
    }


def _part(name: str, tensor: torch.Tensor, rank: int, count: int, embedding: int) -> torch.Tensor:
    last = name.removesuffix(".weight").rpartition(".")[2]
    if last in ("wk", "wv") and count > KEY_HEADS:
        return tensor.chunk(KEY_HEADS)[rank * KEY_HEADS // count].clone()
    if last in ("wq", "wk", "wv", "w1", "w3", "output"):
        return tensor.chunk(count)[rank].clone()
    if last in ("wo", "w2"):
        return tensor.chunk(count, 1)[rank].clone()
    return tensor.chunk(count, embedding)[rank].clone() if last == "tok_embeddings" else tensor


def write_meta_parts(folder: Path, count: int, *, embedding: int = 0) -> dict[str, torch.Tensor]:
    """`consolidated.NN.pth` and `params.json`; the whole. Embeddings are cut along the axis `embedding`."""
    folder.mkdir(parents=True)
    whole = meta_llama()
    for rank in range(count):
        parts = {name: _part(name, tensor, rank, count, embedding) for name, tensor in whole.items()}
        torch.save(parts, folder / f"consolidated.{rank:02d}.pth")
    parameters = {
        "dim": WIDTH,
        "n_heads": HEADS,
        "n_kv_heads": KEY_HEADS,
        "n_layers": LAYERS,
        "norm_eps": 1e-5,
    }
    (folder / "params.json").write_text(json.dumps(parameters))
    return whole
