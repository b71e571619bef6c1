"""Everything that an MLflow registry knows, as JSON: for comparing one state with another.

state.py URL
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import mlflow


def own(logged: Any) -> dict[str, float]:
    """The last value of each metric that belongs to the version itself."""
    metrics = (logged.metrics or []) if logged else []
    ordered = sorted(metrics, key=lambda metric: (metric.step, metric.timestamp))
    return {metric.key: metric.value for metric in ordered}


def main() -> None:
    mlflow.set_tracking_uri(sys.argv[1])
    client = mlflow.MlflowClient()
    state: dict[str, Any] = {}
    for model in client.search_registered_models():
        versions = {}
        for version in client.search_model_versions(f"name='{model.name}'"):
            folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model.name}/{version.version}"))
            source = version.source or ""
            run = client.get_run(version.run_id or "")
            logged = (
                client.get_logged_model(source.removeprefix("models:/"))
                if source.startswith("models:/")
                else None
            )
            versions[version.version] = {
                "tags": dict(version.tags),
                "description": version.description,
                "run_link": version.run_link,
                "status": version.status,
                "run_status": run.info.status,
                "metrics": run.data.metrics,
                "params": run.data.params,
                "own_metrics": own(logged),
                "files": {
                    path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                    for path in sorted(folder.rglob("*"))
                    if path.is_file() and path.name != "registered_model_meta"
                },
            }
        state[model.name] = {
            "description": model.description,
            "tags": dict(model.tags),
            "aliases": {alias: str(version) for alias, version in model.aliases.items()},
            "versions": versions,
        }
    experiment = client.get_experiment_by_name("ptbin")
    logged_models = client.search_logged_models([experiment.experiment_id]) if experiment else []
    state["_logged"] = sorted(str(found.status) for found in logged_models)
    print(json.dumps(state))  # noqa: T201


main()
