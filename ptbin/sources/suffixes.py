"""Which files may be checkpoints, by the suffixes of their names. Pure."""

from __future__ import annotations

# Names under which people keep checkpoints, and archives of them: always looked into.
CHECKPOINT_SUFFIXES = frozenset(
    ".pt .pth .ckpt .bin .th .tar .pkl .pickle .model .ptc .pts "
    ".jit .torchscript .zip .7z .gz .xz .weights .pt2 .safetensors .nemo .mar .tgz".split()
)
# Names that cannot be one: never looked into.
OTHER_SUFFIXES = frozenset(
    """.json .jsonl .txt .md .rst .yaml .yml .toml .ini .cfg .conf .log .csv .tsv .html .htm .xml .pdf
    .png .jpg .jpeg
    .gif .svg .bmp .webp .mp4 .wav .py .ipynb .sh .c .h .cpp .cu .js .css .lock .sha256 .md5 .sig .asc .crc
    .tfevents .db .sqlite .parquet .arrow .npy .npz .h5 .hdf5 .onnx .tflite .gguf .pb .out .err""".split()
)


def suffix_of(name: str) -> str:
    """The last suffix, in small letters, with its dot; empty for names without one and for hidden files."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""
