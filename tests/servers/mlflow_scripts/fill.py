"""Fill an MLflow server as its users do: real runs, `mlflow.pytorch.log_model`, aliases, tags, descriptions.

    fill.py URL MARKER

MARKER is the file that the hostile version would make if it were ever unpickled. Prints what each alias's
model answers, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import mlflow
import torch
from nets import Classifier, answer, seeded
from torch import nn

URL, MARKER = sys.argv[1:3]


class Local(nn.Module):
    """Defined in the script itself, as in a notebook: cloudpickle writes the class out whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        said: torch.Tensor = self.net(x)
        return said


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {MARKER}",))


def log(name: str, net: nn.Module, **metrics: float) -> str:
    with mlflow.start_run(run_name=f"{name} run"):
        mlflow.log_params({"lr": 0.01, "layers": 2})
        for step, value in enumerate((0.5, 0.7, metrics.get("accuracy", 0.9))):
            mlflow.log_metric("loss", value, step=step)
        info = mlflow.pytorch.log_model(
            net,
            name="model",
            serialization_format="pickle",
            pip_requirements=["torch"],
            registered_model_name=name,
        )
        if metrics:
            mlflow.log_metrics(metrics, model_id=info.model_id)
        return str(info.registered_model_version)


def log_folder(name: str, folder: Path) -> str:
    """Artifacts of a run, registered by their place: how it was done before logged models."""
    client = mlflow.MlflowClient()
    with mlflow.start_run(run_name=f"{name} folder") as run:
        mlflow.log_metric("loss", 0.25, step=9)
        mlflow.log_artifacts(str(folder), "model")
    source = f"{run.info.artifact_uri}/model"
    return str(client.create_model_version(name, source, run_id=run.info.run_id).version)


def main() -> None:
    mlflow.set_tracking_uri(URL)
    mlflow.set_experiment("training")
    client = mlflow.MlflowClient()
    said: dict[str, dict[str, list[float]]] = {"classifier": {}, "local": {}, "folders": {}}

    nets = [seeded(seed) for seed in range(5)]
    log("classifier", nets[0], accuracy=0.81)
    log("classifier", nets[1], accuracy=0.85)
    trapped = seeded(99)
    setattr(trapped, "trap", Trap())  # noqa: B010 - no attribute of a module, says mypy
    hostile = log("classifier", trapped)
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pytorch.save_model(
            seeded(98), f"{folder}/m", serialization_format="pickle", pip_requirements=["torch"]
        )
        file = Path(folder, "m/data/model.pth")
        file.write_bytes(file.read_bytes()[:-200])
        truncated = log_folder("classifier", Path(folder, "m"))
    log("classifier", nets[2], accuracy=0.92)
    client.delete_model_version("classifier", "1")
    client.update_registered_model("classifier", "Sorts things into three.")
    client.set_registered_model_tag("classifier", "team", "vision")
    client.update_model_version("classifier", "2", "The one in production.")
    client.set_model_version_tag("classifier", "2", "reviewed", 'yes: by "two" people')
    for alias, version in (("champion", "2"), ("challenger", "5"), ("broken", truncated), ("trap", hostile)):
        client.set_registered_model_alias("classifier", alias, version)
    said["classifier"] = {"champion": answer(nets[1]), "challenger": answer(nets[2])}

    local = Local().eval()
    local.net.load_state_dict(nets[3].state_dict())
    client.set_registered_model_alias("local", "champion", log("local", local))
    said["local"] = {"champion": answer(nets[3])}

    client.create_registered_model("folders")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(nets[4].state_dict(), f"{folder}/weights.pt")
        Path(folder, "config.json").write_text('{"layers": 2}')
        Path(folder, "LICENSE").write_text("Apache License, Version 2.0")
        client.set_registered_model_alias("folders", "plain", log_folder("folders", Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        lightning = {"state_dict": nets[0].state_dict(), "pytorch-lightning_version": "2.6.0", "epoch": 4}
        lightning["optimizer_states"] = [torch.optim.Adam(nets[0].parameters()).state_dict()]
        Path(folder, "checkpoints").mkdir()
        torch.save(lightning, f"{folder}/checkpoints/last.ckpt")
        client.set_registered_model_alias("folders", "lightning", log_folder("folders", Path(folder)))
    said["folders"] = {"plain": answer(nets[4]), "lightning": answer(nets[0])}
    print(json.dumps(said))  # noqa: T201


main()
