"""Use an MLflow server as somebody does who knows MLflow and nothing else.

    use.py URL

Finds every version that has an alias, loads its weights strictly into the model class, and prints what each
answers, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlflow
import torch
from nets import Classifier, answer


def load(folder: str) -> Classifier:
    (file,) = Path(folder).rglob("*.bin")
    weights = torch.load(file, weights_only=True)
    net = Classifier()
    net.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()}, strict=True)
    return net.eval()


def main() -> None:
    mlflow.set_tracking_uri(sys.argv[1])
    said: dict[str, dict[str, list[float]]] = {}
    for model in mlflow.MlflowClient().search_registered_models():
        for alias in model.aliases:
            folder = mlflow.artifacts.download_artifacts(f"models:/{model.name}@{alias}")
            said.setdefault(model.name, {})[alias] = answer(load(folder))
    print(json.dumps(said))  # noqa: T201


main()
