"""A throw-away one-node Ceph cluster that speaks S3 on loopback: one mon, one in-memory OSD, one gateway.

Needs the packages ceph-mon, ceph-osd and radosgw (Debian 12: 16.2.15); no root, no systemd, no cephx.
Starts from nothing in 1 to 3 s under a temporary directory. Processes are ended by the ids they were
started with, in `stop`, and no later than with this process. Memory: about twice the bytes stored; do
not fill it, near its limit writes and deletes hang instead of failing.

    python -m tests.servers.rados_gateway      # run one by hand until Ctrl-C
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from tests.servers.endpoint import S3Endpoint

__all__ = ["RadosGateway", "missing_programs"]

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
CAPACITY_NBYTES = 3 << 30
GC_WAIT_S = 60
START_TIMEOUT_S = 90.0
ATTEMPTS = 3  # a port found free may be taken before it is bound

# cephx is off, and then the messenger's default "secure" mode cannot be had: all modes are crc. One copy
# of everything, few placement groups. Without tcp_nodelay each small GET takes 40 ms (Nagle's algorithm
# against delayed acknowledgements). Deleted objects are to give their memory back at once.
CONFIG = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}]
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_client_mode = crc
ms_cluster_mode = crc
ms_service_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
ms_bind_ipv6 = false
ms_bind_msgr1 = false
ms_bind_msgr2 = true
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = {folder}/keyring
run_dir = {folder}
admin_socket =
crash_dir = {folder}/crash
log_file = {folder}/$name.log
log_to_stderr = false
err_to_stderr = true
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
mon_warn_on_pool_no_redundancy = false
[mon]
mon_data = {folder}/mon
mon_cluster_log_file = {folder}/cluster.log
mon_data_avail_crit = 0
mon_data_avail_warn = 1
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
[osd]
osd_data = {folder}/osd
osd_journal = {folder}/osd/journal
osd_objectstore = memstore
memstore_device_bytes = {capacity}
osd_fast_shutdown = true
debug_osd = 0/0
debug_ms = 0/0
[client]
debug_rgw = 0/0
debug_ms = 0/0
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 32
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_enable_lc_threads = false
rgw_enable_quota_threads = false
rgw_run_sync_thread = false
rgw_gc_obj_min_wait = {gc_wait_s}
rgw_gc_processor_period = 5
"""


def missing_programs() -> list[str]:
    """What of the server is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _allocator() -> dict[str, str]:
    """tcmalloc for the gateway, a fifth faster: a library that comes with radosgw's package."""
    found = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    return {"LD_PRELOAD": str(found[0])} if found else {}


def _ended_with_us() -> list[str]:
    """Has the kernel end the command behind it when this process ends, in whatever way (prctl(2))."""
    setpriv = shutil.which("setpriv", path=PATH)  # of util-linux
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


class RadosGateway:
    """One server; `start` and `stop`, each once.

    `capacity_nbytes` is no reservation. `gc_wait_s`: how long a deleted object's data outlives it, for
    the sake of those who still read it; a benchmark that deletes gigabytes wants little.
    """

    def __init__(self, *, capacity_nbytes: int = CAPACITY_NBYTES, gc_wait_s: int = GC_WAIT_S) -> None:
        self._capacity_nbytes = capacity_nbytes
        self._gc_wait_s = gc_wait_s
        # Ceph's configuration has no quoting; temporary directories' names need none.
        self._folder = Path(tempfile.mkdtemp(prefix="ptbin-rados-"))
        self._config = self._folder / "ceph.conf"
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._deadline = 0.0

    def start(self) -> S3Endpoint:
        """Build the cluster and wait until S3 answers; nothing is left running where that fails."""
        self._deadline = time.monotonic() + START_TIMEOUT_S
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> S3Endpoint:
        for name in ("osd", "rgw", "crash"):
            (self._folder / name).mkdir()
        (self._folder / "keyring").touch()
        fsid, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
        for attempt in range(ATTEMPTS):
            mon_port, port = _free_port(), _free_port()
            self._write_config(fsid, mon_port, port)
            self._make_mon(fsid, mon_port)
            mon = self._launch("mon", "ceph-mon", "-f", "-i", "a")
            if self._step("ceph", "--connect-timeout", "10", "osd", "new", osd_id, required=attempt == 2):
                break
            self._end(mon)
        self._step("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        osd_environment = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # gives deleted objects' memory back
        self._launch("osd", "ceph-osd", "-f", "-i", "0", **osd_environment)
        endpoint = S3Endpoint(f"http://127.0.0.1:{port}")
        # The first client makes the zone and its pools, alone while it does; it waits for the OSD.
        user = ("--uid=s3test", "--display-name=s3test")
        keys = (f"--access-key={endpoint.key}", f"--secret-key={endpoint.secret}")
        self._step("radosgw-admin", "user", "create", *user, *keys)
        for _ in range(ATTEMPTS):
            gateway = self._launch("rgw", "radosgw", "-f", "-n", "client.rgw", **_allocator())
            if self._answers(gateway, port):
                return S3Endpoint(f"http://127.0.0.1:{port}")
            port = _free_port()
            self._write_config(fsid, mon_port, port)
        raise RuntimeError(f"radosgw does not start:\n{self._tail('rgw')}")

    def _write_config(self, fsid: str, mon_port: int, port: int) -> None:
        text = CONFIG.format(
            fsid=fsid,
            mon_port=mon_port,
            port=port,
            folder=self._folder,
            capacity=self._capacity_nbytes,
            gc_wait_s=self._gc_wait_s,
        )
        self._config.write_text(text)

    def _make_mon(self, fsid: str, mon_port: int) -> None:
        shutil.rmtree(self._folder / "mon", ignore_errors=True)
        (self._folder / "mon").mkdir()
        monmap = str(self._folder / "monmap")
        address = f"[v2:127.0.0.1:{mon_port}]"
        self._step("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, monmap)
        self._step("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)

    def _command(self, program: str, *arguments: str) -> list[str]:
        found = shutil.which(program, path=PATH)
        if found is None:
            raise FileNotFoundError(f"{program} is not installed")
        config = () if program == "monmaptool" else ("-c", str(self._config))
        return [found, *config, *arguments]

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CEPH_")}
        return {**kept, "PATH": PATH, "LC_ALL": "C"}

    def _step(self, program: str, *arguments: str, required: bool = True) -> bool:
        """Run to its end; RuntimeError where a required one fails."""
        done = subprocess.run(
            self._command(program, *arguments),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=max(5.0, self._deadline - time.monotonic()),
        )
        if done.returncode and required:
            raise RuntimeError(f"{program} failed with {done.returncode}: {done.stderr[-2000:]}")
        return done.returncode == 0

    def _launch(self, name: str, program: str, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.out").open("wb") as output:
            process = subprocess.Popen(
                [*_ended_with_us(), *self._command(program, *arguments)],
                env={**self._environment(), **more},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the test's terminal is not meant for it
            )
        self._running.append((name, process))
        return process

    def _answers(self, gateway: subprocess.Popen[bytes], port: int) -> bool:
        """Wait until it serves; False where it ended instead (its port was taken)."""
        while gateway.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("GET", "/")
                answer = connection.getresponse()
                if answer.status == 200 and b"ListAllMyBucketsResult" in answer.read():
                    return True
            if time.monotonic() > self._deadline:
                raise RuntimeError(f"no S3 after {START_TIMEOUT_S:.0f} s:\n{self._tail('rgw')}")
            time.sleep(0.05)
        return False

    def _tail(self, name: str) -> str:
        return (self._folder / f"{name}.out").read_text(errors="replace")[-2000:]

    def collect_garbage(self) -> None:
        """Give the memory of deleted objects back now; takes about a second."""
        self._deadline = time.monotonic() + START_TIMEOUT_S
        self._step("radosgw-admin", "gc", "process", "--include-all")

    def stop(self) -> None:
        """End the three processes, newest first, and remove what they kept."""
        while self._running:
            self._end(self._running[-1][1])
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._running = [(name, kept) for name, kept in self._running if kept is not process]
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does, children too
    server = RadosGateway()
    found = server.start()
    sys.stdout.write(f"{found.url} key={found.key} secret={found.secret}\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()
    server.stop()
