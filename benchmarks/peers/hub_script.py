"""huggingface_hub's writer: `python hub_script.py SOURCE DEST_PREFIX` downloads, loads, saves, uploads.

`save_torch_state_dict` writes safetensors; files go below the prefix under the names that it gives them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transfer import deliver, fetch


def main(source: str, dest: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path, output = fetch(source, Path(name)), Path(name) / "output"
        output.mkdir()
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        save_torch_state_dict(content["state_dict"], output)
        for file in output.iterdir():
            deliver(file, f"{dest.rstrip('/')}/{file.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
