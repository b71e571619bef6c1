"""The MLflow Model Registry, through MLflow's own client: a server, or the database behind one.

A version's files are a logged model of one experiment, `ptbin`; that of a version to be is pending, and only
a version that is registered becomes visible under its model's name. Tags that begin with `ptbin.` say where a
version came from.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ptbin.errors import PtbinError
from ptbin.registries.base import Attempts, Name, Registration, VersionSite
from ptbin.registries.mlflow_client import MISSING, paged
from ptbin.registries.mlflow_source import PAGE, PLACEHOLDER, TAG, MlflowSource, without_own
from ptbin.registries.values import Model, Version

__all__ = ["EXPERIMENT", "MlflowRegistry"]

EXPERIMENT = "ptbin"
MAX_GAP = 100
"""Up to this many numbers in a row are used up to keep a version's own."""
BATCH = 100
"""Parameters (and metrics) in one request: MLflow's limit of parameters."""

_UNNAMEABLE = re.compile(r"[/:.%\"']")
"""What the name of a logged model may not hold; that of a registered model may hold some of it."""


class MlflowRegistry(MlflowSource):
    """`mlflow+http://HOST:PORT`, `mlflow+https://...`, `mlflow+sqlite:///PATH.db` and other databases."""

    _its_experiment: Any = None

    # -- destination --------------------------------------------------------------------------------

    def check_writable(self) -> None:
        with self._faults("list experiments"):
            self._client.search_experiments(max_results=1)

    def home(self) -> str:
        return self._connection.place(str(self._experiment().artifact_location), self._options).uri

    def _experiment(self) -> Any:
        if self._its_experiment is None:
            with self._faults(f"make the experiment {EXPERIMENT}"):
                found = self._client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    made = self._client.create_experiment(
                        EXPERIMENT, artifact_location=self._artifact_location()
                    )
                    found = self._client.get_experiment(made)
                if found.lifecycle_stage != "active":
                    raise self._refuse(f"its experiment {EXPERIMENT} was deleted: restore it, or rename it")
                self._its_experiment = found
        return self._its_experiment

    def _artifact_location(self) -> str | None:
        """A server knows where artifacts go; a bare database does not, and its client would take ./mlruns."""
        if self._connection.has_server:
            return None
        first = self._client.get_experiment("0")
        parent, _, name = str(first.artifact_location).rstrip("/").rpartition("/")
        if name == "0" and (parent.startswith("/") or "://" in parent):
            return f"{parent}/{EXPERIMENT}"
        return str(self._connection.database.absolute().parent / "mlartifacts" / EXPERIMENT)

    def name_problem(self, name: str) -> str | None:
        if ":" in name:
            return f"MLflow's names hold no ':', and {name!r} does"
        return super().name_problem(name)

    def name_versions(self, existing: Model | None, versions: Sequence[Version]) -> list[Name]:
        """Their own numbers where MLflow can still give those, the next ones behind for all others.

        What was refused by an earlier run comes behind, so that it moves no newer version off its number.
        """
        last = max((int(version.version) for version in existing.versions), default=0) if existing else 0
        numbers: dict[int, int] = {}
        for index, version in enumerate(versions):
            own = _number(version)
            if last < own <= last + MAX_GAP:
                numbers[index] = last = own
        for index in range(len(versions)):
            if index not in numbers:
                numbers[index] = last = last + 1
        return [Name(str(numbers[index])) for index in range(len(versions))]

    def alias_problem(self, alias: str, names: Collection[str]) -> str | None:
        del names  # an alias may be a number: `models:/NAME@3` is not `models:/NAME/3`
        from mlflow.exceptions import MlflowException
        from mlflow.utils import validation

        server: Any = validation
        try:
            server._validate_model_alias_name(alias)  # noqa: SLF001 - what its server asks as well
            server._validate_model_alias_name_reserved(alias)  # noqa: SLF001
        except MlflowException as error:
            return " ".join(str(error).split())
        return None

    def not_kept(self, version: Version) -> list[str]:
        return [f"stage {version.stage}: a tag says it"] if version.stage else []

    def never_kept(self) -> list[str]:
        return [
            "times of creation and names of users (a tag has the time)",
            "histories of metrics (last values are kept) and links to datasets",
            "runs: each version has a new one, and links to the page of the old one",
        ]

    def place(self, model: Model, version: Version, dest_version: str, fingerprint: str) -> VersionSite:
        del model
        experiment = self._experiment().experiment_id
        with self._faults(f"make a logged model for {version.path}"):
            mine = f"tags.`{TAG}fingerprint` = '{fingerprint}'"
            found = self._client.search_logged_models([experiment], filter_string=mine, max_results=1)
            logged = found[0] if found else None
            if logged is None:
                tags = {f"{TAG}fingerprint": fingerprint, f"{TAG}source": version.uri}
                # A run that was killed just here has left its run without the logged model.
                begun = self._client.search_runs(
                    [experiment], filter_string=f"{mine} and attributes.status = 'RUNNING'", max_results=1
                )
                run = (
                    begun[0]
                    if begun
                    else self._client.create_run(
                        experiment, run_name=f"{version.model} {dest_version}", tags=tags
                    )
                )
                logged = self._client.create_logged_model(
                    experiment,
                    name=_UNNAMEABLE.sub("-", version.model),
                    source_run_id=run.info.run_id,
                    tags=tags,
                    params=dict(version.params),
                )
        return self._site(logged)

    def _site(self, logged: Any) -> VersionSite:
        place = self._connection.place(str(logged.artifact_location), self._options)
        return VersionSite(place, str(logged.model_id))

    def abandon(self, place: VersionSite) -> None:
        with contextlib.suppress(PtbinError):
            for item in list(place.folder.iter_objects()):
                (place.folder / item.path).delete()
        with contextlib.suppress(PtbinError), self._faults("give up a logged model"):
            logged = self._client.get_logged_model(place.token)
            self._client.delete_logged_model(place.token)
            if logged.source_run_id:
                self._end_run(str(logged.source_run_id))

    def _end_run(self, run_id: str) -> None:
        self._client.set_terminated(run_id, "FAILED")
        self._client.delete_run(run_id)

    def tidy(self, fingerprints: Collection[str]) -> None:
        with self._faults("look for what was left half done"):
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            if experiment is None or experiment.lifecycle_stage != "active":
                return
            ids = [experiment.experiment_id]
            pending = [
                logged
                for logged in _left(
                    lambda token: self._client.search_logged_models(ids, max_results=PAGE, page_token=token),
                    lambda logged: logged.tags,
                    fingerprints,
                )
                if not _is_ready(logged)
            ]
        for logged in pending:
            self.abandon(self._site(logged))
        with self._faults("end runs that were left half done"):
            for run in _left(
                lambda token: self._client.search_runs(
                    ids,
                    filter_string="attributes.status = 'RUNNING'",
                    max_results=PAGE,
                    page_token=token,
                ),
                lambda run: run.data.tags,
                fingerprints,
            ):
                self._end_run(str(run.info.run_id))

    def register(
        self, model: Model, ready: Sequence[Registration], brought: Mapping[str, str] | None = None
    ) -> list[str]:
        del brought
        self._ensure_model(model)
        known: dict[str, str] = {}
        last = 0
        own = {new.fingerprint: new.dest_version for new in ready if _keeps_number(new)}
        for found in self._versions(model.name):
            number = str(found.version)
            origin = self._version(found, {}).origin
            last = max(last, int(number))
            if dict(found.tags or {}).get(PLACEHOLDER):
                with self._faults("clear a placeholder away"):
                    if origin is None or own.get(origin.fingerprint) != number:
                        self._client.delete_model_version(model.name, number)
                        continue
                    self._client.delete_model_version_tag(model.name, number, PLACEHOLDER)
            if origin is not None:
                known[origin.fingerprint] = number
        names = []
        attempts = Attempts()
        for new in ready:
            name = known.get(new.fingerprint)
            if name is None:
                name = self._register_one(model.name, new, last)
                last = int(name)
            for alias in new.aliases:
                with attempts.one(), self._faults(f"set alias {alias} of {model.name}"):
                    self._client.set_registered_model_alias(model.name, alias, name)
            names.append(name)
        attempts.raise_any()
        return names

    def _ensure_model(self, model: Model) -> None:
        with self._faults(f"register model {model.name}"):
            try:
                self._client.get_registered_model(model.name)
            except Exception as error:
                if getattr(error, "error_code", "") != MISSING:
                    raise
                self._client.create_registered_model(
                    model.name, tags=without_own(model.tags), description=model.description or None
                )

    def _register_one(self, name: str, new: Registration, last: int) -> str:
        """Make versions and delete them again until one has the number that is wanted.

        MLflow gives no number twice, and does not say which ones it gave: each may turn out to be the last.
        A version without a number to keep takes the next one.
        """
        version = new.version
        wanted = int(new.dest_version) if _keeps_number(new) else 0
        with self._faults(f"register {version.path}"):
            logged = self._client.get_logged_model(new.token)
            run_id = str(logged.source_run_id)
            self._log(run_id, new)
            if not _is_ready(logged):
                self._client.finalize_logged_model(new.token, "READY")
            self._client.set_terminated(run_id, "FINISHED")
            self._connection.make_global()
            tags = {**without_own(version.tags), **self._tags(new)}
            while True:
                may_be_early = last + 1 < wanted
                made = self._client.create_model_version(
                    name,
                    source=f"models:/{new.token}",
                    run_id=run_id,
                    tags=tags | ({PLACEHOLDER: "true"} if may_be_early else {}),
                    description=version.description or None,
                    run_link=version.run.url if version.run is not None and version.run.url else None,
                    model_id=new.token,
                )
                last = int(made.version)
                if may_be_early and last < wanted:
                    self._client.delete_model_version(name, made.version)
                    continue
                if may_be_early:
                    self._client.delete_model_version_tag(name, made.version, PLACEHOLDER)
                return str(last)

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
        attempts = Attempts()

        def attempt(what: str, call: Callable[..., Any], *words: str) -> None:
            with attempts.one(), self._faults(f"set {what} of {model.name}"):
                call(model.name, *words)

        client = self._client
        if model.description:
            attempt("the description", client.update_registered_model, model.description)
        for key, value in without_own(model.tags).items():
            attempt(f"tag {key}", client.set_registered_model_tag, key, value)
        for number, version in versions:
            if version.description:
                attempt(
                    f"version {number}'s description",
                    client.update_model_version,
                    number,
                    version.description,
                )
            for key, value in without_own(version.tags).items():
                attempt(f"version {number}'s tag {key}", client.set_model_version_tag, number, key, value)
        for alias, number in aliases.items():
            attempt(f"alias {alias}", client.set_registered_model_alias, alias, number)
        attempts.raise_any()


def _number(version: Version) -> int:
    """The one that the source calls it by; 0: none that MLflow could give."""
    text = version.version
    # Its own are 32 bits wide, and Python refuses to read thousands of digits.
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def _keeps_number(new: Registration) -> bool:
    return _number(new.version) == int(new.dest_version)


def _is_ready(logged: Any) -> bool:
    return str(getattr(logged.status, "value", logged.status)) == "READY"


def _left(
    ask: Callable[[str | None], Any], tags: Callable[[Any], Any], fingerprints: Collection[str]
) -> list[Any]:
    """Those of all pages that a migration began and that none of these fingerprints takes up."""
    return [
        item
        for item in paged(ask)
        if (mine := dict(tags(item) or {}).get(f"{TAG}fingerprint")) and mine not in fingerprints
    ]
