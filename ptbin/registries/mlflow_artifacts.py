"""Artifacts behind an MLflow server (`mlflow-artifacts://HOST:PORT/PATH`) as an fsspec filesystem.

Such a server hands out and takes whole files only, so a file that is read lies in a temporary folder on this
machine, which goes with the filesystem: with the last place that was made of it. MLflow's own client does
the transfers, with its retries, multipart uploads and credentials (`MLFLOW_TRACKING_TOKEN` and the like).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from fsspec.spec import AbstractFileSystem

__all__ = ["MlflowArtifactFileSystem"]

SCHEMES = {"mlflow-artifacts": "http", "mlflow-artifacts+https": "https"}


class MlflowArtifactFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Paths are `HOST:PORT/PATH`.

    Args:
        tracking_uri: of the server, where it is not simply `http://HOST:PORT` (a path before it, say).
    """

    protocol = ("mlflow-artifacts", "mlflow-artifacts+https")
    cachable = False

    def __init__(
        self,
        tracking_uri: str | None = None,
        scheme: str = "http",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._tracking_uri = tracking_uri
        self._scheme = scheme
        self._scratch: Path | None = None
        self._lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        text = str(path)
        for scheme in sorted(SCHEMES, key=len, reverse=True):
            text = text.removeprefix(f"{scheme}://")
        return text.rstrip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        return {"scheme": SCHEMES.get(path.partition("://")[0], "http")}

    def unstrip_protocol(self, name: str) -> str:
        bare = self._strip_protocol(name)
        return f"mlflow-artifacts{'+https' if self._scheme == 'https' else ''}://{bare}"

    # -- reading ------------------------------------------------------------------------------------

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = [_entry(f"{path}/{item.path.rpartition('/')[2]}", item) for item in self._list(path)]
        if not found and (info := self._info_as_entry(path)) is not None:
            found = [info]
        return found if detail else [item["name"] for item in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if "/" not in path:
            return {"name": path, "size": None, "type": "directory"}
        info = self._info_as_entry(path)
        if info is None:
            raise FileNotFoundError(path)
        return info

    def _info_as_entry(self, path: str) -> dict[str, Any] | None:
        """As its folder lists it: the server has no other way to ask for one file."""
        parent, _, name = path.rpartition("/")
        if not parent:
            return None
        found = (_entry(path, item) for item in self._list(parent) if item.path.rpartition("/")[2] == name)
        return next(found, None)

    def _list(self, path: str) -> list[Any]:
        try:
            return list(self._repository(path).list_artifacts())
        except Exception as error:
            if _is_not_found(error):
                return []
            raise

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        with self._fetched(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = 0 if start is None else start if start >= 0 else max(0, size + start)
            last = size if end is None else end if end >= 0 else size + end
            file.seek(first)
            return file.read(max(0, min(last, size) - first))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            return self._fetched(path)
        if mode != "wb":
            raise NotImplementedError(mode)
        return _Upload(self, self._strip_protocol(path))

    def _fetched(self, path: str) -> IO[bytes]:
        path = self._strip_protocol(path)
        kept = self._kept(path)
        with self._lock:
            if not kept.exists():
                folder, _, name = path.rpartition("/")
                repository = self._repository(folder)
                part = kept.with_suffix(".part")
                try:
                    repository._download_file(name, str(part))  # noqa: SLF001 - the abstract method of its repositories
                except Exception as error:
                    part.unlink(missing_ok=True)
                    if _is_not_found(error):
                        raise FileNotFoundError(path) from error
                    raise
                part.replace(kept)
        return kept.open("rb")

    def _kept(self, path: str) -> Path:
        with self._lock:
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="ptbin-"))
                weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        return self._scratch / hashlib.sha256(path.encode()).hexdigest()[:40]

    # -- writing ------------------------------------------------------------------------------------

    def _put(self, local: Path, path: str) -> None:
        self._repository(path.rpartition("/")[0]).log_artifact(str(local))
        self._kept(path).unlink(missing_ok=True)

    def _rm(self, path: str) -> None:
        path = self._strip_protocol(path)
        folder, _, name = path.rpartition("/")
        self._kept(path).unlink(missing_ok=True)
        try:
            self._repository(folder).delete_artifacts(name)
        except Exception as error:
            if _is_not_found(error):
                raise FileNotFoundError(path) from error
            raise

    # -- MLflow's client ----------------------------------------------------------------------------

    def _repository(self, path: str) -> Any:
        from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

        host, _, inside = path.partition("/")
        tracking_uri = self._tracking_uri or f"{self._scheme}://{host}"
        return MlflowArtifactsRepository(f"mlflow-artifacts:/{inside}", tracking_uri=tracking_uri)


class _Upload(io.BufferedIOBase):
    """A file on its way: spooled here, sent whole when closed, never when discarded."""

    def __init__(self, filesystem: MlflowArtifactFileSystem, path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._folder = tempfile.TemporaryDirectory(prefix="ptbin-", dir=filesystem._scratch)  # noqa: SLF001
        # Under its own name: that is how the client names what it sends.
        self._local = Path(self._folder.name) / path.rpartition("/")[2]
        self._file = self._local.open("wb")
        self._done = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def discard(self) -> None:
        self._done = True
        self._file.close()
        self._folder.cleanup()

    @property
    def closed(self) -> bool:
        return self._done

    @closed.setter
    def closed(self, value: bool) -> None:
        if value and not self._done:
            self.discard()

    def close(self) -> None:
        if self._done:
            return
        self._done = True
        self._file.close()
        try:
            self._filesystem._put(self._local, self._path)  # noqa: SLF001
        finally:
            self._folder.cleanup()

    def __del__(self) -> None:
        # Never sent by the garbage collector.
        with contextlib.suppress(Exception):
            if not self._done:
                self.discard()


def _entry(path: str, item: Any) -> dict[str, Any]:
    """A file or folder as fsspec has it."""
    size = None if item.is_dir else int(item.file_size or 0)
    return {"name": path, "size": size, "type": "directory" if item.is_dir else "file"}


def _is_not_found(error: Exception) -> bool:
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) == 404:
        return True
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" or isinstance(
        error, FileNotFoundError
    )
