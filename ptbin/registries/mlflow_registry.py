"""The MLflow Model Registry, through MLflow's own client: a server, or the database behind one.

A version's files are a logged model of one experiment, `ptbin`; that of a version to be is pending, and only
a version that is registered becomes visible under its model's name. Tags that begin with `ptbin.` say where a
version came from.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ptbin.errors import AccessDeniedError, NotFoundInStoreError, PtbinError, UsageError
from ptbin.registries.base import Folder, Place, Registration, Registry, RegistryError
from ptbin.registries.values import Metric, Model, Origin, RunLink, Version
from ptbin.stores import open_store, public_uri

__all__ = ["EXPERIMENT", "MlflowRegistry"]

EXPERIMENT = "ptbin"
TAG = "ptbin."
PLACEHOLDER = f"{TAG}placeholder"
"""On a version that only uses a number up, for the moment until it is deleted."""
PAGE = 100
ANSWER_SECONDS = 20
MAX_GAP = 100
"""So many numbers in a row are used up to keep a version's own."""
BATCH = 100
"""Parameters (and metrics) in one request: MLflow's limit of parameters."""

_TRANSIENT = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "INTERNAL_ERROR", "ABORTED"}
_MISSING = "RESOURCE_DOES_NOT_EXIST"
_UNNAMEABLE = re.compile(r"[/:.%\"']")
"""What the name of a logged model may not hold; that of a registered model may hold some of it."""


class MlflowRegistry(Registry):
    """`mlflow+http://HOST:PORT`, `mlflow+https://...`, `mlflow+sqlite:///PATH.db` and other databases."""

    def __init__(self, uri: str, options: Mapping[str, Any] | None = None) -> None:
        self.uri = public_uri(uri).rstrip("/")
        self._options = dict(options or {})
        self._tracking = uri.removeprefix("mlflow+").rstrip("/")
        self._parts = urlsplit(self._tracking)
        self._made: Any = None
        self._experiment: Any = None

    @property
    def _client(self) -> Any:
        if self._made is None:
            self._reach()
            _quieten()
            try:
                from mlflow import MlflowClient
            except ImportError as error:
                raise UsageError(
                    f"{self.uri}: MLflow's client is not installed: pip install 'ptbin[mlflow]'"
                ) from error
            with self._faults("open"):
                self._made = MlflowClient(tracking_uri=self._tracking, registry_uri=self._tracking)
        return self._made

    def _reach(self) -> None:
        """MLflow's client would ask a missing server for minutes, and make a missing database."""
        if self._parts.scheme in ("http", "https"):
            try:
                urllib.request.urlopen(f"{self._tracking}/health", timeout=ANSWER_SECONDS).close()  # noqa: S310 - http
            except urllib.error.HTTPError:
                return  # it is there; what it thinks of us is seen later
            except (OSError, ValueError) as error:
                raise RegistryError(f"{self.uri}: no MLflow server answers: {error}") from error
        elif self._parts.scheme == "sqlite":
            path = self._tracking.removeprefix("sqlite:///")
            if not Path(path).is_file():
                raise UsageError(f"{self.uri}: no such database file")

    @contextmanager
    def _faults(self, doing: str) -> Iterator[None]:
        try:
            yield
        except PtbinError:
            raise
        except Exception as error:
            code = str(getattr(error, "error_code", ""))
            text = " ".join(str(error).split())[:300]
            message = f"{self.uri}: cannot {doing}: {public_uri(text)}"
            if code == _MISSING:
                raise NotFoundInStoreError(message) from error
            if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
                raise AccessDeniedError(message) from error
            raise RegistryError(message, transient=code in _TRANSIENT) from error

    # -- what is there ------------------------------------------------------------------------------

    def check_readable(self) -> None:
        with self._faults("list models"):
            self._client.search_registered_models(max_results=1)

    def models(self, wanted: Callable[[str], bool]) -> list[Model]:
        with self._faults("list models"):
            found = [
                item
                for item in _paged(
                    lambda token: self._client.search_registered_models(max_results=PAGE, page_token=token)
                )
                if wanted(item.name)
            ]
        return [self._model(item) for item in sorted(found, key=lambda item: str(item.name))]

    def existing(self, names: Iterable[str]) -> dict[str, Model]:
        found = {}
        for name in names:
            if self.name_problem(name) is not None:
                continue
            with contextlib.suppress(NotFoundInStoreError), self._faults(f"look for model {name}"):
                found[name] = self._model(self._client.get_registered_model(name))
        return found

    def _model(self, item: Any) -> Model:
        name = str(item.name)
        aliases = {str(alias): str(version) for alias, version in dict(item.aliases or {}).items()}
        versions = [
            self._version(found, aliases)
            for found in self._versions(name)
            if not dict(found.tags or {}).get(PLACEHOLDER)
        ]
        return Model(
            name,
            str(item.description or ""),
            _own_removed(item.tags),
            aliases,
            tuple(sorted(versions, key=lambda version: int(version.version))),
        )

    def _versions(self, name: str) -> list[Any]:
        mark = '"' if "'" in name else "'"
        with self._faults(f"list versions of {name}"):
            return list(
                _paged(
                    lambda token: self._client.search_model_versions(
                        f"name={mark}{name}{mark}", max_results=PAGE, page_token=token
                    )
                )
            )

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
        return Version(
            model=str(found.name),
            version=number,
            revision=f"{found.run_id or ''} {found.source or ''} {created}",
            source=str(found.source or ""),
            uri=self._page(f"models/{quote(str(found.name))}/versions/{number}"),
            description=str(found.description or ""),
            tags=_own_removed(tags),
            aliases=tuple(sorted(alias for alias, version in aliases.items() if version == number)),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created / 1000)) if created else "",
            stage="" if stage == "None" else stage,
            origin=origin,
            run=RunLink(str(found.run_id)) if found.run_id else None,
        )

    def _page(self, path: str) -> str:
        return (
            f"{public_uri(self._tracking)}/#/{path}"
            if self._parts.scheme in ("http", "https")
            else f"{self.uri}#{path}"
        )

    def detail(self, version: Version) -> Version:
        metrics: dict[str, Metric] = {}
        own: dict[str, Metric] = {}
        params: dict[str, str] = {}
        run = version.run
        if run is not None:
            try:
                with self._faults(f"read run {run.run_id}"):
                    found = self._client.get_run(run.run_id)
                    experiment = self._client.get_experiment(found.info.experiment_id)
                    for key in found.data.metrics:
                        last = max(
                            self._client.get_metric_history(run.run_id, key),
                            key=lambda metric: (metric.step, metric.timestamp),
                        )
                        metrics[key] = Metric(key, float(last.value), int(last.step), int(last.timestamp))
                params |= {str(key): str(value) for key, value in found.data.params.items()}
                page = self._page(f"experiments/{found.info.experiment_id}/runs/{run.run_id}")
                run = RunLink(run.run_id, str(found.info.run_name or ""), str(experiment.name), page)
            except NotFoundInStoreError:
                pass  # deleted for good; its id is still told
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

    def folder(self, version: Version) -> Folder:
        with self._faults(f"find the files of {version.path}"):
            uri = str(self._client.get_model_version_download_uri(version.model, version.version))
            if uri.startswith("runs:/"):
                from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository

                uri = str(RunsArtifactRepository.get_underlying_uri(uri, self._tracking))
        return self._storage(uri)

    def _storage(self, uri: str) -> Folder:
        """An artifact URI of MLflow's as a storage URI."""
        parts = urlsplit(uri)
        if parts.scheme == "file":
            return Folder(uri.removeprefix("file://"))
        if parts.scheme != "mlflow-artifacts":
            return Folder(uri)
        if self._parts.scheme not in ("http", "https"):
            raise UsageError(
                f"{self.uri}: its artifacts are only to be had from its server: mlflow+http://HOST:PORT"
            )
        secure = "+https" if self._parts.scheme == "https" else ""
        host = parts.netloc or self._parts.netloc.rpartition("@")[2]
        options: dict[str, Any] = {"scratch": ""}
        if self._parts.path:
            options["tracking_uri"] = self._tracking
        return Folder(f"mlflow-artifacts{secure}://{host}{parts.path}", options)

    # -- destination --------------------------------------------------------------------------------

    def check_writable(self) -> None:
        with self._faults("list experiments"):
            self._client.search_experiments(max_results=1)

    def home(self) -> str:
        return self._storage(str(self._its_experiment().artifact_location)).uri

    def _its_experiment(self) -> Any:
        if self._experiment is None:
            with self._faults(f"make the experiment {EXPERIMENT}"):
                found = self._client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    made = self._client.create_experiment(
                        EXPERIMENT, artifact_location=self._artifact_location()
                    )
                    found = self._client.get_experiment(made)
                if found.lifecycle_stage != "active":
                    raise self._refuse(f"its experiment {EXPERIMENT} was deleted: restore it, or rename it")
                self._experiment = found
        return self._experiment

    def _artifact_location(self) -> str | None:
        """A server knows where artifacts go; a bare database does not, and its client would take ./mlruns."""
        if self._parts.scheme in ("http", "https"):
            return None
        first = self._client.get_experiment("0")
        parent, _, name = str(first.artifact_location).rstrip("/").rpartition("/")
        if name == "0" and (parent.startswith("/") or "://" in parent):
            return f"{parent}/{EXPERIMENT}"
        database = Path(self._tracking.removeprefix("sqlite:///")).absolute()
        return str(database.parent / "mlartifacts" / EXPERIMENT)

    def name_problem(self, name: str) -> str | None:
        if ":" in name:
            return f"MLflow's names hold no ':', and {name!r} does"
        return super().name_problem(name)

    def name_versions(self, existing: Model | None, versions: Sequence[Version]) -> list[str]:
        """Their own numbers where those are still free; what is between is used up by `_use_up`.

        A number depends on the source alone and not on which versions turn out to be bad on the way.
        """
        last = max((int(version.version) for version in existing.versions), default=0) if existing else 0
        names = []
        for version in versions:
            own = int(version.version) if version.version.isdecimal() else 0
            last = own if last < own <= last + MAX_GAP else last + 1
            names.append(str(last))
        return names

    def not_kept(self, version: Version) -> list[str]:
        return [f"stage {version.stage}: a tag says it"] if version.stage else []

    def never_kept(self) -> list[str]:
        return [
            "times of creation and names of users (a tag has the time)",
            "histories of metrics (last values are kept) and links to datasets",
            "runs: each version has a new one, and links to the page of the old one",
        ]

    def place(self, model: Model, version: Version, dest_version: str, fingerprint: str) -> Place:
        del model
        experiment = self._its_experiment().experiment_id
        with self._faults(f"make a logged model for {version.path}"):
            found = self._client.search_logged_models(
                [experiment], filter_string=f"tags.`{TAG}fingerprint` = '{fingerprint}'", max_results=1
            )
            logged = found[0] if found else None
            if logged is None:
                tags = {f"{TAG}fingerprint": fingerprint, f"{TAG}source": version.uri}
                name = f"{version.model} {dest_version}"
                run = self._client.create_run(experiment, run_name=name, tags=tags)
                logged = self._client.create_logged_model(
                    experiment,
                    name=_UNNAMEABLE.sub("-", version.model),
                    source_run_id=run.info.run_id,
                    tags=tags,
                    params=dict(version.params),
                )
        return Place(self._storage(str(logged.artifact_location)), str(logged.model_id))

    def abandon(self, place: Place) -> None:
        with contextlib.suppress(PtbinError):
            store, path = open_store(place.folder.uri, {**self._options, **place.folder.options})
            for item in list(store.iter_objects(path)):
                store.delete(f"{path}/{item.path}")
        with contextlib.suppress(PtbinError), self._faults("give up a logged model"):
            logged = self._client.get_logged_model(place.token)
            self._client.delete_logged_model(place.token)
            if logged.source_run_id:
                self._client.set_terminated(logged.source_run_id, "FAILED")
                self._client.delete_run(logged.source_run_id)

    def register(self, model: Model, ready: Sequence[Registration]) -> list[str]:
        self._ensure_model(model)
        known: dict[str, str] = {}
        last = 0
        for found in self._versions(model.name):
            if dict(found.tags or {}).get(PLACEHOLDER):
                with self._faults("delete a placeholder"):
                    self._client.delete_model_version(model.name, found.version)
            elif (origin := self._version(found, {}).origin) is not None:
                known[origin.fingerprint] = str(found.version)
            last = max(last, int(found.version))
        names = []
        for new in ready:
            name = known.get(new.fingerprint)
            if name is None:
                self._use_up(model.name, new, last, int(new.dest_version))
                name = self._register_one(model.name, new)
                last = int(name)
            for alias in new.aliases:
                with self._faults(f"set alias {alias}"):
                    self._client.set_registered_model_alias(model.name, alias, name)
            names.append(name)
        return names

    def _use_up(self, name: str, new: Registration, last: int, wanted: int) -> None:
        """Register and delete versions until the next one gets the wanted number: MLflow gives none twice."""
        self._make_global()
        while last + 1 < wanted:
            with self._faults(f"use up a number of {name}"):
                made = self._client.create_model_version(
                    name, source=f"models:/{new.token}", tags={PLACEHOLDER: "true"}, model_id=new.token
                )
                self._client.delete_model_version(name, made.version)
            last = int(made.version)

    def _ensure_model(self, model: Model) -> None:
        with self._faults(f"register model {model.name}"):
            try:
                self._client.get_registered_model(model.name)
            except Exception as error:
                if getattr(error, "error_code", "") != _MISSING:
                    raise
                self._client.create_registered_model(
                    model.name, tags=dict(model.tags), description=model.description or None
                )

    def _register_one(self, name: str, new: Registration) -> str:
        version = new.version
        with self._faults(f"register {version.path}"):
            logged = self._client.get_logged_model(new.token)
            run_id = str(logged.source_run_id)
            self._log(run_id, new)
            if str(getattr(logged.status, "value", logged.status)) != "READY":
                self._client.finalize_logged_model(new.token, "READY")
            self._client.set_terminated(run_id, "FINISHED")
            self._make_global()
            tags = {**version.tags, **self._tags(new)}
            made = self._client.create_model_version(
                name,
                source=f"models:/{new.token}",
                run_id=run_id,
                tags=tags,
                description=version.description or None,
                run_link=version.run.url if version.run is not None and version.run.url else None,
                model_id=new.token,
            )
        return str(made.version)

    def _make_global(self) -> None:
        """A database's own client looks logged models up in the tracking store of the process."""
        if self._parts.scheme not in ("http", "https"):
            import mlflow

            mlflow.set_tracking_uri(self._tracking)

    def _tags(self, new: Registration) -> dict[str, str]:
        version = new.version
        tags = {
            "source": version.uri,
            "registry": new.source_uri,
            "model": version.model,
            "version": version.version,
            "fingerprint": new.fingerprint,
            "run": new.run_id,
            "manifests": ", ".join(new.manifests),
        }
        if version.created:
            tags["created"] = version.created
        if version.stage:
            tags["stage"] = version.stage
        if version.run is not None:
            tags["source_run"] = version.run.run_id
            tags["source_experiment"] = version.run.experiment
        return {f"{TAG}{key}": value for key, value in tags.items() if value}

    def _log(self, run_id: str, new: Registration) -> None:
        """Metrics and parameters; a version's own metrics belong to the logged model too."""
        from mlflow.entities import Metric as LoggedMetric
        from mlflow.entities import Param

        version = new.version
        metrics = [
            LoggedMetric(
                metric.key,
                metric.value,
                metric.timestamp,
                metric.step,
                **({"model_id": new.token, "run_id": run_id} if metric.on_version else {}),
            )
            for metric in version.metrics
        ]
        params = [Param(key, value) for key, value in version.params.items()]
        for first in range(0, max(len(metrics), len(params)), BATCH):
            last = first + BATCH
            self._client.log_batch(run_id, metrics=metrics[first:last], params=params[first:last])

    def update(
        self, model: Model, aliases: Mapping[str, str], versions: Iterable[tuple[str, Version]]
    ) -> None:
        with self._faults(f"update model {model.name}"):
            if model.description:
                self._client.update_registered_model(model.name, model.description)
            for key, value in model.tags.items():
                self._client.set_registered_model_tag(model.name, key, value)
            for number, version in versions:
                if version.description:
                    self._client.update_model_version(model.name, number, version.description)
                for key, value in version.tags.items():
                    self._client.set_model_version_tag(model.name, number, key, value)
            for alias, number in aliases.items():
                self._client.set_registered_model_alias(model.name, alias, number)


def _quieten() -> None:
    """MLflow's client would tell its makers of every call, and standard output of every run."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow.store.model_registry", "mlflow.tracking", "mlflow.store.db", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _own_removed(tags: Mapping[str, Any] | None) -> dict[str, str]:
    return {str(key): str(value) for key, value in dict(tags or {}).items() if not str(key).startswith(TAG)}


def _paged(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return
