"""What an MLflow registry has: registered models, their versions, runs and files, as values of ptbin's.

Costs a request for a page of a hundred models, one for each model and hundred versions, and three for each
version's details. Nothing here writes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote

from ptbin.errors import NotFoundInStoreError
from ptbin.registries.base import Registry
from ptbin.registries.mlflow_client import Connection, paged
from ptbin.registries.values import Metric, Model, Origin, RunLink, Version
from ptbin.stores import Place

TAG = "ptbin."
PLACEHOLDER = f"{TAG}placeholder"
"""On a version whose number may only be used up, until it is known: it is deleted then, or this tag is."""
PAGE = 100
_READY = "READY"


class MlflowSource(Registry):
    """The half of `MlflowRegistry` that reads."""

    def __init__(self, uri: str, options: Mapping[str, Any] | None = None) -> None:
        self._connection = Connection(uri)
        self.uri = self._connection.uri
        self._options = dict(options or {})
        self._faults = self._connection.faults

    @property
    def _client(self) -> Any:
        return self._connection.client

    def check_readable(self) -> None:
        with self._faults("list models"):
            self._client.search_registered_models(max_results=1)

    def models(self, wanted: Callable[[str], bool]) -> list[Model]:
        found = sorted(self._registered(), key=lambda item: str(item.name))
        return [
            self._guarded(str(item.name), partial(self._model, item, only_ready=True))
            for item in found
            if wanted(str(item.name))
        ]

    def has_models(self, wanted: Callable[[str], bool]) -> bool:
        return any(wanted(str(item.name)) for item in self._registered())

    def _registered(self) -> list[Any]:
        with self._faults("list models"):
            return list(
                paged(lambda token: self._client.search_registered_models(max_results=PAGE, page_token=token))
            )

    def existing(self, names: Iterable[str]) -> dict[str, Model]:
        found = {}
        for name in names:
            if self.name_problem(name) is not None:
                continue
            with contextlib.suppress(NotFoundInStoreError):
                found[name] = self._guarded(name, partial(self._registered_model, name))
        return found

    def _registered_model(self, name: str) -> Model:
        with self._faults(f"read model {name}"):
            return self._model(self._client.get_registered_model(name), only_ready=False)

    def _model(self, item: Any, *, only_ready: bool) -> Model:
        name = str(item.name)
        aliases = {str(alias): str(version) for alias, version in dict(item.aliases or {}).items()}
        versions = [
            self._version(found, aliases)
            for found in self._versions(name)
            if not dict(found.tags or {}).get(PLACEHOLDER)
            # The files of the others may not be there yet, or never.
            and (not only_ready or str(found.status) == _READY)
        ]
        return Model(
            name,
            str(item.description or ""),
            without_own(item.tags),
            aliases,
            tuple(sorted(versions, key=lambda version: int(version.version))),
        )

    def _versions(self, name: str) -> list[Any]:
        """All of them, as MLflow has them."""
        if "'" in name and '"' in name:
            # A filter knows no way to quote such a name; its wildcard stands for any character.
            wanted = f"name LIKE '{name.replace(chr(39), '_')}'"
        else:
            mark = '"' if "'" in name else "'"
            wanted = f"name = {mark}{name}{mark}"
        with self._faults(f"list versions of {name}"):
            found = paged(
                lambda token: self._client.search_model_versions(wanted, max_results=PAGE, page_token=token)
            )
            return [version for version in found if str(version.name) == name]

    def _version(self, found: Any, aliases: Mapping[str, str]) -> Version:
        number = str(found.version)
        tags = {str(key): str(value) for key, value in dict(found.tags or {}).items()}
        origin = None
        if f"{TAG}fingerprint" in tags:
            origin = Origin(
                *(tags.get(f"{TAG}{key}", "") for key in ("registry", "model", "version", "fingerprint"))
            )
        created = int(found.creation_timestamp or 0)
        stage = str(found.current_stage or "")
        run_id, run_link = str(found.run_id or ""), str(found.run_link or "")
        return Version(
            model=str(found.name),
            version=number,
            revision=f"{run_id} {found.source or ''} {created}",
            source=str(found.source or ""),
            uri=self._connection.page(f"models/{quote(str(found.name))}/versions/{number}"),
            description=str(found.description or ""),
            tags=without_own(tags),
            aliases=tuple(sorted(alias for alias, version in aliases.items() if version == number)),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created / 1000)) if created else "",
            stage="" if stage == "None" else stage,
            origin=origin,
            run=RunLink(run_id, url=run_link) if run_id or run_link else None,
        )

    def detail(self, version: Version) -> Version:
        metrics: dict[str, Metric] = {}
        own: dict[str, Metric] = {}
        params: dict[str, str] = {}
        run = version.run
        if run is not None and run.run_id:
            try:
                with self._faults(f"read run {run.run_id}"):
                    found = self._client.get_run(run.run_id)
                    experiment = self._client.get_experiment(found.info.experiment_id)
                    # The message it came in has the step and time of each last value, which
                    # `data.metrics` leaves out, and spares the whole history of each.
                    for last in found.data.to_proto().metrics:
                        metrics[str(last.key)] = Metric(
                            str(last.key), float(last.value), int(last.step), int(last.timestamp)
                        )
                params |= {str(key): str(value) for key, value in found.data.params.items()}
                page = self._connection.page(f"experiments/{found.info.experiment_id}/runs/{run.run_id}")
                # The version's own link leads further back: to where it was trained.
                run = RunLink(
                    run.run_id, str(found.info.run_name or ""), str(experiment.name), run.url or page
                )
            except NotFoundInStoreError:
                pass  # deleted for good; its id is kept
        if version.source.startswith("models:/m-"):
            with contextlib.suppress(NotFoundInStoreError), self._faults(f"read {version.source}"):
                logged = self._client.get_logged_model(version.source.removeprefix("models:/"))
                params |= {str(key): str(value) for key, value in dict(logged.params or {}).items()}
                for metric in logged.metrics or ():
                    seen = own.get(metric.key)
                    if seen is None or (seen.step, seen.timestamp) <= (metric.step, metric.timestamp):
                        own[metric.key] = Metric(
                            metric.key,
                            float(metric.value),
                            int(metric.step),
                            int(metric.timestamp),
                            on_version=True,
                        )
        # What is of the version is of its run as well; the run's last value may be another one.
        both = [metric for metric in metrics.values() if replace(metric, on_version=True) not in own.values()]
        both += own.values()
        ordered = tuple(sorted(both, key=lambda metric: (metric.key, metric.on_version)))
        return replace(version, run=run, metrics=ordered, params=params)

    def folder(self, version: Version) -> Place:
        with self._faults(f"find the files of {version.path}"):
            uri = str(self._client.get_model_version_download_uri(version.model, version.version))
            if uri.startswith("runs:/"):
                from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository

                uri = str(RunsArtifactRepository.get_underlying_uri(uri, self._connection.tracking))
        return self._connection.place(uri, self._options)


def without_own(tags: Mapping[str, Any] | None) -> dict[str, str]:
    """Without those by which ptbin says where a version came from: they are true of one registry only."""
    return {str(key): str(value) for key, value in dict(tags or {}).items() if not str(key).startswith(TAG)}
