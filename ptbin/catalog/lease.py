"""One run at a time on one destination, on stores that can do no more than write, list and delete.

Each run keeps one small file below `DEST/_ptbin/leases/` and renews it. A run that begins writes its own,
then lists: of two that begin at once at least one sees the other, and a run that sees another withdraws. So
no store has to compare and swap, which few can.

A lease is dead once it has not been renewed for `STALE_AFTER_SECONDS` of the observer's own clock
(clocks of two machines are never compared), or at once where its process ran on this machine and is gone.
Dead ones are removed by the run that finds them; a run that wakes up and finds its lease gone must stop.

The workers of a run on other machines read the lease as well: it says when they are to stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ptbin.catalog.finding import OWN_FOLDER
from ptbin.errors import DestinationBusyError, NotFoundInStoreError, StorageError
from ptbin.stores import Place, Where, place_of

LEASES_FOLDER = f"{OWN_FOLDER}/leases"
RENEWAL_SECONDS = 10.0
STALE_AFTER_SECONDS = 45.0
"""Seconds without a renewal after which a lease counts for nothing."""
POLL_SECONDS = 1.0
WATCH_SECONDS = 2.0
ATTEMPTS = 20
MAX_NBYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Holder:
    """What a lease says: who holds it, how often it was renewed, whether its workers are to stop."""

    run_id: str
    host: str
    boot: str
    pid: int
    born: str
    renewals: int = 0
    stop: bool = False

    @classmethod
    def here(cls, run_id: str) -> Holder:
        """This process."""
        pid = os.getpid()
        return cls(run_id, socket.gethostname(), _boot(), pid, _born(pid) or "")

    def to_bytes(self) -> bytes:
        return json.dumps({name: getattr(self, name) for name in self.__slots__}).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, run_id: str) -> Holder:
        """What cannot be read is a lease all the same: of an unknown process."""
        try:
            found = json.loads(data)
            return cls(
                run_id,
                str(found["host"]),
                str(found["boot"]),
                int(found["pid"]),
                str(found["born"]),
                int(found["renewals"]),
                bool(found["stop"]),
            )
        except (ValueError, KeyError, TypeError):
            return cls(run_id, "an unknown machine", "", 0, "")

    def is_gone(self) -> bool:
        """Whether it ran on this machine, in this very space of process numbers, and is no more."""
        if not self.boot or self.boot != _boot():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # another user's, whether that one or a later one of its number
        born = _born(self.pid)
        return born is not None and born != self.born


@cache
def _boot() -> str:
    """One text for this boot of this machine and this space of process numbers; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: process numbers are used again. None: it is not shown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the command's name may hold anything; proc(5)
    return "ended" if fields[0] in "ZX" else fields[19]


class Lease:
    """A lease that this process holds; a thread renews it until `release`."""

    def __init__(
        self, place: Place, holder: Holder, lost: Callable[[str], None], *, follows_dead: bool
    ) -> None:
        self.follows_dead = follows_dead
        """Whether a run was killed here before this one: it may have left unfinished outputs."""
        self._place = place
        self._holder = holder
        self._lost = lost
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="ptbin-lease", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return self._place.uri

    def ask_to_stop(self) -> None:
        """Have workers elsewhere stop, within seconds. A store's fault is passed over."""
        with contextlib.suppress(StorageError), self._lock:
            self._holder = replace(self._holder, stop=True, renewals=self._holder.renewals + 1)
            if not self._released.is_set():
                self._place.write_bytes(self._holder.to_bytes())

    def release(self) -> None:
        """Let others begin. No error where the store fails: the lease dies of itself."""
        with self._lock:
            if self._released.is_set():
                return
            self._released.set()
        self._thread.join(RENEWAL_SECONDS)
        with contextlib.suppress(StorageError):
            self._place.delete()

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._released.wait(RENEWAL_SECONDS):
            try:
                # Never written anew where it is gone: another run has taken this one for dead.
                self._place.stat()
                with self._lock:
                    if self._released.is_set():
                        return
                    self._holder = replace(self._holder, renewals=self._holder.renewals + 1)
                    self._place.write_bytes(self._holder.to_bytes())
                renewed = time.monotonic()
            except NotFoundInStoreError:
                self._lost("the run's lease was taken away: it was held for dead")
                return
            except StorageError as error:
                if time.monotonic() > renewed + STALE_AFTER_SECONDS:
                    self._lost(f"the run's lease could not be renewed: {error}")
                    return


def acquire_lease(
    dest: Where,
    run_id: str,
    *,
    lost: Callable[[str], None] = lambda _: None,
    tick: Callable[[], object] = lambda: None,
) -> Lease:
    """The lease on DEST for a run; `lost` is called, from another thread, if it cannot be kept.

    Waits until other leases turn out to be dead, at most about `STALE_AFTER_SECONDS`. `tick` may
    raise.

    Raises:
        DestinationBusyError: another run works there.
        StorageError: the store failed.
    """
    folder = place_of(dest) / LEASES_FOLDER
    place = folder / f"{run_id}.json"
    mine = Holder.here(run_id)
    removed = 0
    for attempt in range(ATTEMPTS):
        place.write_bytes(mine.to_bytes())
        others, dead = _living(folder, run_id)
        removed += dead
        if not others:
            return Lease(place, mine, lost, follows_dead=removed > 0)
        place.delete()
        # Two that began at once have both withdrawn now: the first one to come back finds none.
        time.sleep(random.uniform(0.05, 0.3) * (1 + attempt))  # noqa: S311 - not a secret
        removed += _wait_for_death(folder, run_id, others, tick)
    raise DestinationBusyError(f"{folder.uri}: other runs keep beginning there")


def _living(folder: Place, run_id: str) -> tuple[dict[str, Holder], int]:
    """The leases of others, by path; how many of processes that are known to be gone were removed."""
    living, removed = {}, 0
    for item in folder.iter_objects():
        name = item.path.rpartition("/")[2]
        if not name.endswith(".json") or name == f"{run_id}.json":
            continue
        place = folder / item.path
        try:
            holder = Holder.from_bytes(place.read_bytes(limit=MAX_NBYTES), name.removesuffix(".json"))
        except NotFoundInStoreError:
            continue
        if holder.is_gone():
            place.delete()
            removed += 1
        else:
            living[item.path] = holder
    return living, removed


def _wait_for_death(
    folder: Place, run_id: str, first: Mapping[str, Holder], tick: Callable[[], object]
) -> int:
    """Until all that were there are gone or dead, which are removed and counted.

    Raises DestinationBusyError as soon as one shows life.
    """
    began = time.monotonic()
    removed = 0
    while True:
        now, dead = _living(folder, run_id)
        removed += dead
        if not now:
            return removed
        tick()
        for path, holder in now.items():
            before = first.get(path)
            renewed = before is None or holder.renewals > before.renewals
            # A process of this machine that is not gone needs no renewal to be believed.
            if renewed or holder.boot == _boot() != "":
                place = folder.without("/" + LEASES_FOLDER).uri
                raise DestinationBusyError(
                    f"{place}: run {holder.run_id} is at work there, process {holder.pid} on {holder.host}"
                )
        if time.monotonic() > began + STALE_AFTER_SECONDS:
            for path in now:
                (folder / path).delete()
            return removed + len(now)
        time.sleep(POLL_SECONDS)


class LeaseWatch:
    """In a worker of a run elsewhere: calls `stop` once the run is over, told to stop, or dead."""

    def __init__(self, lease: Where, stop: Callable[[], None]) -> None:
        self._place = place_of(lease)
        self._stop = stop
        self._seen: int | None = None
        self._seen_at = time.monotonic()
        threading.Thread(target=self._watch, name="ptbin-lease-watch", daemon=True).start()

    def _watch(self) -> None:
        while not self.is_over():
            time.sleep(WATCH_SECONDS)
        self._stop()

    def is_over(self) -> bool:
        """One look at the lease."""
        try:
            holder = Holder.from_bytes(self._place.read_bytes(limit=MAX_NBYTES), "")
        except NotFoundInStoreError:
            return True
        except StorageError:
            holder = None
        now = time.monotonic()
        if holder is not None and holder.renewals != self._seen:
            self._seen, self._seen_at = holder.renewals, now
        return now > self._seen_at + STALE_AFTER_SECONDS or (holder is not None and holder.stop)
