"""The plain script: `python torch_script.py SOURCE DEST [mmap]` downloads, loads, saves, uploads."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transfer import deliver, fetch, place


def main(source: str, dest: str, how: str = "") -> None:
    with tempfile.TemporaryDirectory() as name:
        path, output = fetch(source, Path(name)), place(dest, Path(name))
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=how == "mmap")
        torch.save(content["state_dict"], output)
        deliver(output, dest)


if __name__ == "__main__":
    main(*sys.argv[1:])
