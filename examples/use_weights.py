"""Look into weights without torch: names and shapes from the index, values as they are asked for."""

from __future__ import annotations

import sys

import numpy as np

import ptbin


def main(path: str) -> None:
    with ptbin.load(path) as weights:
        for name in weights:
            # Memory-mapped: only what is computed with is read.
            values = np.asarray(weights[name], dtype=np.float64)
            print(f"{name}: {'x'.join(map(str, weights.shape(name)))}, mean {values.mean():.3g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
