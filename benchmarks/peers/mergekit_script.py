"""mergekit's lazy loader and its writer: `python mergekit_script.py SOURCE DEST_PREFIX`.

`LazyTensorLoader` itself expects a bare state dict; a training dict needs the loader of one file below it,
which is used here: the pickle alone is read, and each tensor's bytes when it is asked for.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from mergekit.io import TensorWriter
from mergekit.io.loader import LazyPickleLoader
from transfer import deliver, fetch


def main(source: str, dest: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "output"
        loader = LazyPickleLoader(str(fetch(source, Path(name))))
        with TensorWriter(str(output), safe_serialization=False) as writer:
            for key, deferred in loader.index["state_dict"].items():
                writer.save_tensor(key, deferred.execute(loader.zip_reader, map_location="cpu"))
        for file in output.iterdir():
            deliver(file, f"{dest.rstrip('/')}/{file.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
