"""`make demo`: the main job from end to end, on checkpoints trained a moment before.

    python docs/demo/demo.py FOLDER

Makes checkpoints, converts them with the command line through the Prefect flow on its embedded server,
and shows what came out. Exits 0 only if everything was converted and proven but the hostile file, and
that one was refused and never ran. FOLDER is emptied first if an earlier demo made it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from make_checkpoints import HOSTILE, make_checkpoints

_MARK = ".made-by-ptbin-demo"

_READABLE_BY_TORCH = {
    "cnn/last.ckpt": "cnn/last.bin",
    "transformer/last.pt": "transformer/last.bin",
    "archive/2019.pth": "archive/2019.bin",
}
"""Sources that `torch.load(weights_only=True)` can read, to compare with: the whole module is none."""


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _ptbin(*arguments: str) -> int:
    command = Path(sysconfig.get_path("scripts")) / "ptbin"
    print(f"$ ptbin {' '.join(arguments)}", flush=True)
    return subprocess.run([str(command), *arguments], check=False).returncode


def _fresh(folder: Path) -> None:
    if folder.exists():
        if any(folder.iterdir()) and not (folder / _MARK).exists():
            sys.exit(f"{folder} is not empty, and no earlier demo made it: name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file that this process has just made, as torch itself reads them."""
    content = torch.load(path, weights_only=True)
    return next((content[key] for key in ("state_dict", "model") if key in content), content)


def _same(source: Path, output: Path) -> bool:
    expected, found = _state_dict(source), torch.load(output, weights_only=True)
    return list(expected) == list(found) and all(
        torch.equal(expected[name], found[name]) for name in expected
    )


def main(folder: Path) -> int:
    _fresh(folder)
    source, dest, trap = folder / "checkpoints", folder / "weights", folder / "THE-HOSTILE-FILE-RAN"

    _say("training small models, saving them the ways people do")
    for path in make_checkpoints(source, trap):
        print(f"{path.stat().st_size:>12,}  {path.relative_to(source)}")

    _say("converting the folder: one Prefect flow, on its embedded server")
    status = _ptbin("convert", str(source), str(dest))
    runs = sorted((dest / "_ptbin" / "runs").glob("*/run.json")) if dest.exists() else []
    if not runs:
        print(f"demo failed: ptbin exited {status} and left no run record", file=sys.stderr)
        return 1
    record: dict[str, Any] = json.loads(runs[-1].read_text())

    _say("what lies in the destination")
    for path in sorted(path for path in dest.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>12,}  {path.relative_to(dest)}")
    manifest = dest / "transformer" / "last.bin.manifest.json"
    print(f"\nreport:      {runs[-1].with_name('report.html')}\na manifest:  {manifest}")

    _say("an output, read by torch")
    output = torch.load(dest / "transformer" / "last.bin", weights_only=True, mmap=True)
    print(f'torch.load("{dest}/transformer/last.bin", weights_only=True, mmap=True)')
    for name, tensor in list(output.items())[:4]:
        print(f"    {name:<40} {tensor.dtype}  {tuple(tensor.shape)}")
    tied = output["embed.weight"].data_ptr() == output["head.weight"].data_ptr()
    together = "still one" if tied else "torn apart"
    print(f"    ... {len(output)} tensors; embed.weight and head.weight are {together}")

    _say("the weights again: does what is stored still match its manifests?")
    verified = _ptbin("verify", str(dest))

    same = all(_same(source / path, dest / out) for path, out in _READABLE_BY_TORCH.items())
    expectations = {
        f"exit status 1, for the file that was refused (it is {status})": status == 1,
        f"four converted ({record['converted']})": record["converted"] == 4,
        "the hostile file refused, and nothing else": [
            (Path(problem["source"]).name, problem["reason"]) for problem in record["problems"]
        ]
        == [(Path(HOSTILE).name, "unsafe_pickle")],
        "the hostile file never ran": not trap.exists(),
        "the weights equal what torch reads from the sources": same,
        "tied weights still tied": tied,
        f"ptbin verify finds nothing wrong (exit {verified})": verified == 0,
    }
    _say("summary")
    for text, kept in expectations.items():
        print(f"{'ok  ' if kept else 'FAIL'}  {text}")
    return 0 if all(expectations.values()) else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
