"""All that is used of Prefect and is not in its documentation, with the reason; seen to work with 3.8.8.

pyproject.toml pins that version. Where a later one changes any of this, this is the module to mend; what is
imported from `prefect` elsewhere is documented. The embedded server's application
(`prefect.server.api.server:create_app`) is an exception as well; its script imports nothing of ptbin
(`flows.prefect.embedded_server`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = [
    "EPHEMERAL_SERVER",
    "drain_client_queues",
    "drop_client_queues",
    "expect_no_server",
    "flow_run_context",
    "is_broken",
    "refresh_settings",
    "settings_with",
    "without_result_storage",
    "without_tags",
]

EPHEMERAL_SERVER = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""Environment of a server that ends with its run: only the services that a run needs, and no scheduler.

There is no documented way to start one on a socket that is bound already (`SubprocessASGIServer` sets these).
"""


def drain_client_queues(seconds: float) -> None:
    """Have Prefect's event and log threads send what they hold; they start anew when needed.

    Prefect's own temporary server is stopped while task runs are still under way to it as events, which loses
    most of them. There is no documented call that waits for them.
    """
    for worker in _client_workers():
        with contextlib.suppress(Exception):
            worker.drain_all(timeout=seconds, at_exit=False)


def drop_client_queues() -> None:
    """Forget what is queued for a server that is gone.

    It would hold up the end of the process: 7 s for each of hundreds of events, a minute for logs. A service
    is done when its task is cancelled (`_QueueServiceBase._run`).
    """
    for worker in _client_workers():
        for service in list(worker._instances.values()):  # noqa: SLF001 - the only way
            if service._task is not None:  # noqa: SLF001
                service._loop.call_soon_threadsafe(service._task.cancel)  # noqa: SLF001


def expect_no_server() -> None:
    """Have whatever this thread still asks of the server fail at once, Prefect's own last requests above all.

    `temporary_settings`, which is documented, ends with a `with` block; these requests come after the flow's
    code, so the context is never left.
    """
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, PREFECT_LOGGING_TO_API_ENABLED

    now = get_settings_context()
    settings = now.settings.copy_with_update(
        {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_LOGGING_TO_API_ENABLED: False}
    )
    SettingsContext(profile=now.profile, settings=settings).__enter__()
    drop_client_queues()


@contextlib.contextmanager
def settings_with(group: str, **values: Any) -> Iterator[None]:
    """Settings of one group (`client`, `flows`), for this thread, while the context lasts.

    `temporary_settings`, which is documented, reads and checks all settings anew: 30 ms, five times a run.
    """
    from prefect.context import SettingsContext, get_settings_context

    now = get_settings_context()
    changed = getattr(now.settings, group).model_copy(update=values)
    with SettingsContext(profile=now.profile, settings=now.settings.model_copy(update={group: changed})):
        yield


def refresh_settings() -> None:
    """Read the environment anew: the server's address is known only once it listens.

    Not `temporary_settings`: Prefect's own threads start outside of any context of ours.
    """
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


def flow_run_context() -> Any:
    """The context of the flow run that this thread works for; None outside of one.

    `prefect.runtime` has the id, but neither the run's own tags as the client holds them nor its flow.
    """
    from prefect.context import FlowRunContext

    return FlowRunContext.get()


@contextlib.contextmanager
def without_tags() -> Iterator[None]:
    """Keep the tags of `prefect.tags(...)`, which can only add some, to the flow run that was made in it.

    Task runs would have them as well, and a task run with tags asks the server for concurrency limits.
    """
    from prefect.context import TagsContext

    with TagsContext(current_tags=set()):
        yield


@contextlib.contextmanager
def without_result_storage() -> Iterator[None]:
    """Keep the local place for results, which are not stored, from being sent to other processes.

    It is a block, and a process that receives one imports every collection of blocks that is installed
    (prefect-aws, prefect-gcp: three seconds of a core) to find its class (`Block.get_block_class_from_key`).
    """
    from prefect.filesystems import LocalFileSystem

    run = flow_run_context()
    if run is None or not isinstance(run.result_store.result_storage, LocalFileSystem):
        yield
        return
    kept = run.result_store
    run.result_store = kept.model_copy(update={"result_storage": None})
    try:
        yield
    finally:
        run.result_store = kept


def is_broken(runner: Any) -> bool:
    """Whether a pool of processes takes no more work, because one of them is gone.

    Prefect hands batches to the pool in another thread, so `submit` raises nothing: only the pool's own mark
    shows it (`concurrent.futures.process`).
    """
    return bool(getattr(getattr(runner, "_executor", None), "_broken", False))


def _client_workers() -> tuple[Any, ...]:
    """Prefect's event and log threads, by class."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    return EventsWorker, APILogWorker
