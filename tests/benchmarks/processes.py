"""The processes of a benchmark: on which CPU each runs, when it answers, what it costs in CPU time and memory.

Linux only: macOS can't keep a process to one CPU.
"""

import http.client
import os
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

# What is measured has the last CPU for itself. The load and a canned server share the first one.
FRONT_CPUS = {max(os.sched_getaffinity(0))}
LOAD_CPUS = {min(os.sched_getaffinity(0))}

# By its command line, a process below the front that is not part of it.
UPSTREAM_WORDS = ("canned_server.py", "llama-server")

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
# Also the resolution of a measured start.
_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Peer:
    """A running front, reached at `base_url`. Times are `time.perf_counter()`."""

    base_url: str
    pid: int
    spawned_at: float
    ready_at: float

    @property
    def ready_after_s(self) -> float:
        return self.ready_at - self.spawned_at

    def cpu_s(self) -> dict[int, float]:
        """User plus system time in seconds of each process of the front, without its upstream servers: that of the
        threads that it has now, which the kernel counts in ns."""
        return {it.pid: _of_threads_s(it.pid) for it in self._front()}

    def resident_mib(self) -> float:
        """The resident memory of the front's processes, without its upstream servers."""
        return sum(it.memory_info().rss for it in self._front()) / 2**20

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def _front(self) -> list[psutil.Process]:
        return [psutil.Process(self.pid), *(it for it in self.descendants() if not is_upstream(it.cmdline()))]


def _of_threads_s(pid: int) -> float:
    """The CPU time of the threads that the process has now, in seconds.

    The first number of `schedstat` is it in ns (Linux, Documentation/scheduler/sched-stats.rst).
    """
    return sum(int(it.read_text().split()[0]) for it in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def is_upstream(command_line: Collection[str]) -> bool:
    """Whether the command line is that of a server behind the front."""
    return any(word in argument for argument in command_line for word in UPSTREAM_WORDS)


def used_s(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """CPU seconds used between two readings of `Peer.cpu_s`.

    A new process counts from its start. Raises ValueError if one has ended: its last CPU time is unknown.
    """
    ended = before.keys() - after.keys()
    if ended:
        raise ValueError(f"processes {sorted(ended)} of the front ended during the measurement")
    return sum(after.values()) - sum(before.values())


def keep_to_load_cpu() -> None:
    """Run the calling thread, and what it starts from now on, on the load's CPU."""
    os.sched_setaffinity(0, LOAD_CPUS)


@contextmanager
def spawned(argv: list[str], log: Path, cpus: set[int], env: Mapping[str, str]) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a command on these CPUs until the block ends; its output goes to `log`."""
    with log.open("wb") as output:
        with _on_cpus(cpus):
            running = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, **env})
        try:
            yield running
        finally:
            _stop(running)


def _stop(running: "subprocess.Popen[bytes]") -> None:
    """End it and its descendants: a busy router ends without its servers, which would go on using the CPU."""
    descendants = psutil.Process(running.pid).children(recursive=True) if running.poll() is None else []
    running.terminate()
    try:
        running.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
    for left in psutil.wait_procs(descendants, timeout=1)[1]:
        left.kill()


@contextmanager
def _on_cpus(cpus: set[int]) -> Iterator[None]:
    """A child inherits the affinity at its fork: set afterwards, it would miss threads that the child has started."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def process(
    argv: list[str],
    health_url: str,
    log: Path,
    *,
    cpus: set[int] = FRONT_CPUS,
    env: Mapping[str, str] | None = None,
) -> Iterator[Peer]:
    """Run a command until the block ends; the block begins once the URL answers 200. Raises RuntimeError if it never
    does."""
    address = urlsplit(health_url)
    spawned_at = time.perf_counter()
    with spawned(argv, log, cpus, env or {}) as running:
        while not answers_200(health_url):
            if running.poll() is not None or time.perf_counter() - spawned_at > _START_TIMEOUT_S:
                output = log.read_text(errors="replace")
                raise RuntimeError(f"{health_url} did not become healthy; {log} ends: {output[-1000:]}")
            time.sleep(_POLL_S)
        yield Peer(f"{address.scheme}://{address.netloc}", running.pid, spawned_at, time.perf_counter())


def answers_200(url: str) -> bool:
    """Ask once, on a new connection."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=2)
    try:
        connection.request("GET", address.path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
