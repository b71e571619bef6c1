"""Convert a folder of checkpoints without Prefect, and act on what could not be converted."""

from __future__ import annotations

import sys

import ptbin


def main(source: str, dest: str) -> int:
    result = ptbin.convert_directory(source, dest, ptbin.ConvertOptions(strip_prefix="auto"))
    print(result.message)
    for problem in result.problems:
        # `reason` is stable and meant for programs; `detail` is for people.
        print(f"{problem['source']}: {problem['reason']}: {problem['detail']}", file=sys.stderr)
    for manifest in result.manifests:
        print("new:", manifest)
    print("report:", result.report)
    return 0 if result.succeeded else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
