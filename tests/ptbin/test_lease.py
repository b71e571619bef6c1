"""One run at a time on a destination, by leases; on files and on S3."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptbin.catalog import lease as lease_module
from ptbin.catalog.lease import Holder, Lease, LeaseWatch, acquire_lease
from ptbin.errors import DestinationBusyError
from ptbin.stores import open_store, place_of
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3
from tests.servers.prefect_stack import wait_for

__all__ = ["moto_s3"]


@dataclass
class Place:
    """A destination that a test may use."""

    dest: str
    options: dict[str, Any]

    def acquire(
        self,
        run_id: str,
        lost: Callable[[str], None] = lambda _: None,
        tick: Callable[[], object] = lambda: None,
    ) -> Lease:
        return acquire_lease(place_of(self.dest, self.options), run_id, lost=lost, tick=tick)

    def put(self, holder: Holder) -> None:
        """A lease that nobody renews."""
        store, path = open_store(f"{self.dest}/_ptbin/leases/{holder.run_id}.json", self.options)
        store.write_bytes(path, holder.to_bytes())

    def leases(self) -> list[str]:
        store, path = open_store(f"{self.dest}/_ptbin/leases", self.options)
        return sorted(item.path for item in store.iter_objects(path))


@pytest.fixture(params=["files", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "files":
        return Place(str(tmp_path / "out"), {})
    if request.param == "memory":
        return Place(f"memory://{tmp_path.name}/out", {})
    endpoint: S3Endpoint = request.getfixturevalue("moto_s3")
    return Place(f"s3://{endpoint.make_bucket()}/out", endpoint.storage_options)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits shrunk, their proportions kept."""
    monkeypatch.setattr(lease_module, "RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "STALE_AFTER_SECONDS", 0.6)
    monkeypatch.setattr(lease_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 0.05)


def elsewhere(run_id: str) -> Holder:
    return replace(Holder.here(run_id), host="another", boot="another boot", pid=1)


def test_a_second_run_is_refused_and_told_of_the_first(place: Place) -> None:
    first = place.acquire("first")
    with pytest.raises(DestinationBusyError, match="run first is at work there"):
        place.acquire("second")
    assert place.leases() == ["first.json"]
    first.release()
    assert place.leases() == []
    place.acquire("third").release()


def test_of_many_that_begin_at_once_one_gets_it(place: Place) -> None:
    held: list[Lease] = []
    busy: list[Exception] = []

    def begin(number: int) -> None:
        try:
            held.append(place.acquire(f"run{number}"))
        except DestinationBusyError as error:
            busy.append(error)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) <= 1
    assert len(held) + len(busy) == 5
    for lease in held:
        assert place.leases() == [lease.uri.rsplit("/", 1)[1]]
        lease.release()


@pytest.mark.starts_processes
def test_a_process_of_this_machine_that_is_gone_holds_nothing(place: Place) -> None:
    code = "import sys\nfrom ptbin.catalog.lease import Holder\n"
    code += "sys.stdout.buffer.write(Holder.here('dead').to_bytes())"
    data = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    place.put(Holder.from_bytes(data, "dead"))
    waits: list[None] = []
    lease = place.acquire("next", tick=lambda: waits.append(None))
    assert not waits
    assert lease.follows_dead
    assert place.leases() == ["next.json"]
    lease.release()


def test_a_number_that_another_process_has_now_holds_nothing(place: Place) -> None:
    place.put(replace(Holder.here("dead"), born="12345"))
    lease = place.acquire("next")
    assert lease.follows_dead
    lease.release()


@pytest.mark.thorough
@pytest.mark.usefixtures("impatient")
def test_another_machine_s_lease_counts_until_it_is_not_renewed_for_long(place: Place) -> None:
    place.put(elsewhere("far"))
    lease = place.acquire("next")
    assert lease.follows_dead
    assert place.leases() == ["next.json"]
    lease.release()


@pytest.mark.usefixtures("impatient")
def test_another_machine_that_renews_its_lease_is_at_work(place: Place) -> None:
    place.put(elsewhere("far"))
    renewed = replace(elsewhere("far"), renewals=1)
    with pytest.raises(DestinationBusyError, match="on another"):
        place.acquire("next", tick=lambda: place.put(renewed))
    assert place.leases() == ["far.json"]


@pytest.mark.usefixtures("impatient")
def test_who_was_held_for_dead_is_told_and_takes_nothing_back(place: Place) -> None:
    told: list[str] = []
    lease = place.acquire("sleepy", lost=told.append)
    store, path = open_store(lease.uri, place.options)
    store.delete(path)
    wait_for(lambda: told, 200)
    assert "held for dead" in told[0]
    assert place.leases() == []
    lease.release()


@pytest.mark.thorough  # they wait
@pytest.mark.parametrize("end", ["told to stop", "released", "dead"])
def test_workers_elsewhere_hear_of_the_end(
    place: Place, end: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 0.05)
    lease = place.acquire("run")
    stopped = threading.Event()
    if end == "dead":
        request.getfixturevalue("impatient")
        lease.release()
        place.put(elsewhere("run"))
    LeaseWatch(place_of(lease.uri, place.options), stopped.set)
    if end == "told to stop":
        lease.ask_to_stop()
    elif end == "released":
        lease.release()
    assert stopped.wait(200)
    lease.release()


def test_workers_elsewhere_go_on_while_a_lease_is_renewed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 0.05)
    stopped = threading.Event()
    place.put(elsewhere("run"))
    watch = LeaseWatch(place_of(f"{place.dest}/_ptbin/leases/run.json", place.options), stopped.set)
    for renewals in range(1, 4):
        place.put(replace(elsewhere("run"), renewals=renewals))
        assert not watch.is_over()
        now += lease_module.STALE_AFTER_SECONDS * 0.9
    assert not stopped.is_set()
    now += lease_module.STALE_AFTER_SECONDS
    assert stopped.wait(200)


@pytest.mark.thorough
def test_a_lease_that_cannot_be_read_is_somebody_s(place: Place, impatient: None) -> None:
    store, path = open_store(f"{place.dest}/_ptbin/leases/odd.json", place.options)
    store.write_bytes(path, b"{ not JSON")
    lease = place.acquire("next")  # after the patience, as with any that nobody renews
    assert lease.follows_dead
    lease.release()
