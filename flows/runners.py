"""Where a run's batches are worked on: threads of the flow's process, processes, a Dask or a Ray cluster.

Each is Prefect's own task runner for that engine; what is added is the same in all: how wide the fan-out may
be, and that an engine which lost its processes is opened anew. Only batches go out; listing, asking what is
up to date and writing the record stay in the flow's process. What travels is small: paths, options, outcomes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from flows.batches import BATCH_COUNT, BATCHES_PER_WORKER
from flows.fanout import quote
from flows.options import RunnerName
from flows.parsing import MAX_WORKERS, refuse_runner_secrets
from flows.prefect.undocumented import is_broken, without_result_storage
from ptbin.cores import default_workers, share_cores
from ptbin.errors import UsageError
from ptbin.installed import require
from tasks.live import stop_all

__all__ = ["Runner", "open_runner"]

CONNECT_SECONDS = 20
START_TRIES = 3
REMOTE_BATCH_COUNT = 250
ORPHAN_SECONDS = 10.0


class Runner:
    """Submits task runs; `width` is how many batches are worked on at once."""

    def __init__(self, name: RunnerName, width: int, make: Callable[[], TaskRunner[Any]] | None) -> None:
        self.name = name
        self.width = width
        self._make = make
        self._open: TaskRunner[Any] | None = None

    @property
    def is_remote(self) -> bool:
        """Whether batches are worked on in other processes."""
        return self._make is not None

    @property
    def begins_elsewhere(self) -> bool:
        """Whether its processes start in another working folder, which they may leave."""
        return self.name == "ray"

    @property
    def batch_count(self) -> int:
        """The most checkpoints in a batch: a task run costs 5 ms in a thread, else 100."""
        return REMOTE_BATCH_COUNT if self.is_remote else BATCH_COUNT

    @property
    def batches_per_worker(self) -> int:
        """Into how many batches a short list is cut: between two of them a remote worker waits 0.2 s."""
        return 2 if self.is_remote else BATCHES_PER_WORKER

    def submit(self, task: Task[..., Any], **parameters: Any) -> PrefectFuture[Any]:
        """One task run on its way; a pool that lost a process is opened anew."""
        if self._make is None:
            return self.submit_here(task, **parameters)
        # The other runners do not all take `quote` off again; a batch is small enough to be walked through.
        if is_broken(self._open):
            self.close()
        return cast("PrefectFuture[Any]", self._runner().submit(task, parameters))

    def submit_here(self, task: Task[..., Any], **parameters: Any) -> PrefectFuture[Any]:
        """One task run on its way in a thread of the flow's process, whatever the runner."""
        plain = {name: quote(value) for name, value in parameters.items()}
        return cast("PrefectFuture[Any]", task.submit(**plain))

    def open(self) -> None:
        """Open the engine now, so that what is wrong with it is known before any work.

        It gets more than one try: Ray, for one, gives itself 30 s, which a busy machine may not have.

        Raises:
            UsageError: it does not start.
        """
        for tries_left in reversed(range(START_TRIES)):
            try:
                self._runner()
                return
            except Exception as error:
                with contextlib.suppress(Exception):
                    self.close()
                if not tries_left:
                    raise UsageError(f"{self.name} does not start: {error}") from error

    def _runner(self) -> TaskRunner[Any]:
        if self._open is None:
            assert self._make is not None
            self._open = self._make()
            self._open.__enter__()
        return self._open

    def close(self) -> None:
        """Leave the engine; a cluster that was there before stays."""
        runner, self._open = self._open, None
        if runner is not None:
            runner.__exit__(None, None, None)


@contextlib.contextmanager
def open_runner(name: RunnerName, address: str | None, workers: int | None) -> Iterator[Runner]:
    """The runner of that name; `address` is that of a running Dask scheduler or Ray head.

    Args:
        workers: batches at once; None: one a core, or as many as a cluster has threads (Dask) or CPUs (Ray).

    Raises:
        UsageError: the engine is not installed, nothing answers at the address, or there is a password in it.
    """
    refuse_runner_secrets(address)
    if name != "threads":
        # Pools and clusters start Python by `-c`, whose working folder would be a place to import from before
        # they hand over the search path.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    if address is not None and name in {"threads", "processes"}:
        raise UsageError(f"a runner address means nothing to {name}; it is for dask and ray")
    if name == "threads":
        yield Runner(name, workers or default_workers(), None)
        return
    with tempfile.TemporaryDirectory(prefix="ptbin-") as empty, without_result_storage():
        if name == "processes":
            width = workers or default_workers()
            runner = Runner(name, width, lambda: _processes(width))
        elif name == "dask":
            runner = _dask(address, workers)
        else:
            runner = _ray(address, workers, empty)
        try:
            runner.open()
            yield runner
        finally:
            runner.close()


# -- processes ---------------------------------------------------------------------------------------


def _processes(width: int) -> TaskRunner[Any]:
    begin = functools.partial(_begin_process, os.getpid(), width)
    return ProcessPoolTaskRunner(max_workers=width, initializer=begin)


def _begin_process(parent: int, processes: int) -> None:
    """In each process of a pool: leave signals to the flow's process, and end when that is gone.

    They share the cores.

    Args:
        parent: its process id. Asked for here it would be another one's already if the flow's process was
            killed while this one began.
    """
    # Ctrl-C reaches every process of the terminal's group. One that dies of it while its pool is being shut
    # down leaves the pool waiting for ever; the flow's process tells this one to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    share_cores(processes)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        stop_all()
        time.sleep(ORPHAN_SECONDS)  # for writers to abort
        os._exit(1)

    threading.Thread(target=watch, name="ptbin-parent-watch", daemon=True).start()


# -- clusters ----------------------------------------------------------------------------------------


def _import(module: str) -> Any:
    require(module, "the runner")
    return importlib.import_module(module)


def _dask(address: str | None, workers: int | None) -> Runner:
    prefect_dask = _import("prefect_dask")
    distributed = _import("distributed")
    width = workers or default_workers()
    if address is None:
        cluster = {"n_workers": width, "threads_per_worker": 1, "dashboard_address": None}
        return Runner("dask", width, lambda: prefect_dask.DaskTaskRunner(cluster_kwargs=cluster))
    try:
        with distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False) as client:
            threads = sum(client.nthreads().values())
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(f"no Dask scheduler answers at {address}: {error}") from error
    width = workers or min(max(threads, 1), MAX_WORKERS)
    return Runner("dask", width, lambda: prefect_dask.DaskTaskRunner(address=address))


def _ray(address: str | None, workers: int | None, empty: str) -> Runner:
    # Ray asks a host on the internet for its usage statistics otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A Ray started here gives its workers niceness 15 otherwise: next to busy processes they hardly move.
    os.environ.setdefault("RAY_worker_niceness", "0")
    prefect_ray = _import("prefect_ray")
    ray = _import("ray")
    width = workers or default_workers()
    quiet = {"logging_level": "error", "log_to_driver": False, "configure_logging": False}
    # Ray's workers import from their parent's working folder, unless they are given another one.
    elsewhere = {"runtime_env": {"working_dir": empty}}
    if address is None:
        options = quiet | elsewhere | {"num_cpus": width, "include_dashboard": False}
        return Runner("ray", width, lambda: prefect_ray.RayTaskRunner(init_kwargs=options))
    try:
        ray.init(address, **quiet)
        width = workers or min(max(int(ray.cluster_resources().get("CPU", 0)), 1), MAX_WORKERS)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster answers at {address}: {error}") from error
    finally:
        ray.shutdown()
    options = quiet | elsewhere
    return Runner("ray", width, lambda: prefect_ray.RayTaskRunner(address=address, init_kwargs=options))
