"""How an MLflow registry is reached: MLflow's own client, a server or a database behind it, its errors.

Knows nothing of models. A server is asked whether it is there, and a database whether it is MLflow's, before
MLflow's client sees either: that would ask the one for minutes, and make tables in the other.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ptbin.errors import AccessDeniedError, NotFoundInStoreError, PtbinError, UsageError
from ptbin.installed import require
from ptbin.registries.base import RegistryError
from ptbin.stores import Place, place_of, public_uri

ANSWER_SECONDS = 20
MISSING = "RESOURCE_DOES_NOT_EXIST"

_TRANSIENT_CODES = {
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "DEADLINE_EXCEEDED",
    # What MLflow's client makes of a refused connection, a timeout and an answer 5xx alike
    # (mlflow/utils/rest_utils.py, http_request).
    "INTERNAL_ERROR",
    "ABORTED",
}
_TRANSIENT_CLASSES = {
    # requests.exceptions, from transfers that do not go through `http_request`
    "ChunkedEncodingError",
    "ConnectionError",
    "Timeout",
}
_OWN_TABLES = {"alembic_version", "registered_models"}


class Connection:
    """One tracking and registry server, or database.

    Attributes:
        uri: as ptbin has it, fit to be printed.
        tracking: as MLflow has it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = public_uri(uri).rstrip("/")
        self.tracking = uri.removeprefix("mlflow+").rstrip("/")
        self._parts = urlsplit(self.tracking)
        self._made: Any = None

    @property
    def has_server(self) -> bool:
        return self._parts.scheme in ("http", "https")

    @property
    def client(self) -> Any:
        if self._made is None:
            self._reach()
            _quieten()
            require("mlflow", self.uri)
            from mlflow import MlflowClient

            with self.faults("open"):
                self._made = MlflowClient(tracking_uri=self.tracking, registry_uri=self.tracking)
        return self._made

    def _reach(self) -> None:
        if self.has_server:
            try:
                urllib.request.urlopen(f"{self.tracking}/health", timeout=ANSWER_SECONDS).close()  # noqa: S310 - http
            except urllib.error.HTTPError:
                return  # it is there; what it thinks of us is seen later
            except (OSError, ValueError) as error:
                raise RegistryError(
                    f"{self.uri}: no MLflow server answers: {error}", transient=isinstance(error, OSError)
                ) from error
        elif self._parts.scheme == "sqlite":
            self._look_into(self.database)

    @property
    def database(self) -> Path:
        """Of `sqlite:///PATH`, which may have parameters behind it."""
        return Path(self.tracking.removeprefix("sqlite:///").partition("?")[0])

    def _look_into(self, path: Path) -> None:
        """MLflow's client makes the tables that it misses, and upgrades those of an older MLflow."""
        if not path.is_file():
            raise UsageError(f"{self.uri}: no such database file")
        try:
            with closing(
                sqlite3.connect(
                    f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=ANSWER_SECONDS
                )
            ) as database:
                rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        except sqlite3.Error as error:
            raise UsageError(f"{self.uri}: the database cannot be read: {error}") from error
        tables = {str(name) for (name,) in rows}
        if not tables >= _OWN_TABLES:
            raise UsageError(f"{self.uri}: not a database of MLflow: it has no model registry")
        if missing := _expected_tables() - tables:
            raise UsageError(
                f"{self.uri}: a database of another MLflow, without {', '.join(sorted(missing))[:200]}: "
                "MLflow's client would change it; go through its server (mlflow+http://...), or run "
                "`mlflow db upgrade`"
            )

    @contextmanager
    def faults(self, doing: str) -> Iterator[None]:
        """Whatever is raised within leaves as one of `ptbin.errors`."""
        try:
            yield
        except PtbinError:
            raise
        except Exception as error:
            code = str(getattr(error, "error_code", ""))
            text = " ".join(str(error).split())[:300]
            message = f"{self.uri}: cannot {doing}: {public_uri(text)}"
            if code == MISSING:
                raise NotFoundInStoreError(message) from error
            if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
                raise AccessDeniedError(message) from error
            names = {cls.__name__ for cls in type(error).__mro__}
            transient = code in _TRANSIENT_CODES or bool(names & _TRANSIENT_CLASSES)
            transient = transient or isinstance(error, TimeoutError)
            raise RegistryError(message, transient=transient) from error

    def page(self, path: str) -> str:
        """For people, of what lies at `path` in the server's pages."""
        return f"{public_uri(self.tracking)}/#/{path}" if self.has_server else f"{self.uri}#{path}"

    def place(self, uri: str, options: Mapping[str, Any] | None = None) -> Place:
        """Where an artifact URI of MLflow's leads; `options` are the user's storage options."""
        parts = urlsplit(uri)
        if parts.scheme in ("", "file"):
            return place_of(_local_path(uri))
        if parts.scheme != "mlflow-artifacts":
            return place_of(uri, options)
        if not self.has_server:
            raise UsageError(
                f"{self.uri}: its artifacts are only to be had from its server: mlflow+http://HOST:PORT"
            )
        secure = "+https" if self._parts.scheme == "https" else ""
        host = parts.netloc or self._parts.netloc.rpartition("@")[2]
        own = {"tracking_uri": self.tracking} if self._parts.path else {}
        return place_of(f"mlflow-artifacts{secure}://{host}{parts.path}", {**(options or {}), **own})

    def make_global(self) -> None:
        """A database's own client looks logged models up in the tracking store of the process."""
        if not self.has_server:
            import mlflow

            mlflow.set_tracking_uri(self.tracking)


def _local_path(uri: str) -> str:
    """Where MLflow's client writes the artifacts of `file:///a%20b`, `file:/a%20b` and of a bare path."""
    from mlflow.utils import file_utils

    find: Any = file_utils.local_file_uri_to_path
    return str(find(uri))


def paged(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """The items of all pages; `ask` takes the token of one."""
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def _expected_tables() -> set[str]:
    try:
        # They are all known once this is imported.
        from mlflow.store.db.utils import Base  # type: ignore[attr-defined]
    except ImportError:
        return set()  # its client will say what it needs
    tables: Mapping[str, Any] = Base.metadata.tables
    return set(tables)


def _quieten() -> None:
    """Else MLflow's client reports every call to its makers, and prints every run on standard output.

    It would also retry each request to a server that is gone for four minutes: tasks have their own retries.
    The seconds that it waits for one answer stay: a server takes them to store a large file that it was sent.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    for name in ("mlflow.store.model_registry", "mlflow.tracking", "mlflow.store.db", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
