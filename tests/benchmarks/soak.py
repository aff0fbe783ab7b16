#!/usr/bin/env python3
"""Whether the agent's memory, descriptors, threads or tasks grow under mixed traffic, with the real llama-server.

    python tests/benchmarks/soak.py [--minutes 10] [--clients 8]

Two tiny models on one CPU device are asked in turn by clients that stream, wait for whole answers, leave in the
middle, and send what is no valid request. After each `--pause` seconds of traffic the agent gets a moment of quiet,
and its figures are read. The exit code is 1 if a figure of the last third exceeds that of the middle third by more
than its bound, if the agent logged a traceback, or if one of its servers was restarted for a fault.
"""

import argparse
import json
import os
import random
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the root first: tests/nodeagent is no package

from benchmarks.peers import free_port
from benchmarks.processes import Peer, process
from fakes import tiny_models
from nodeagent.config import find_llama_server, parse_config

MODELS = ("tiny", "tiny-b")
_WORDS = ("the", "sun", "is", "bright", "and", "far", "away")
_QUIET_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The agent's figures at one quiet moment."""

    minute: float
    requests: int
    resident_mib: float
    descriptors: int
    threads: int
    tasks: int


# How much more the last third may have than the middle third.
BOUNDS = {"resident_mib": 2.0, "descriptors": 0, "threads": 1, "tasks": 0}


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """By how much each figure grew from the middle third of the samples to the last one; the first is a warm-up."""
    third = max(1, len(samples) // 3)
    middle, last = samples[-2 * third : -third] or samples[:1], samples[-third:]
    return {name: _typical(last, name) - _typical(middle, name) for name in BOUNDS}


def _typical(samples: Sequence[Sample], name: str) -> float:
    """The median of the memory. The least of what is counted: one more may be open in any sample, but a leak raises
    all of them."""
    values = [getattr(it, name) for it in samples]
    return float(statistics.median(values) if name == "resident_mib" else min(values))


class Clients:
    """The traffic. Each client is a thread of its own, with a seeded choice of what it does next."""

    def __init__(self, base_url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._base_url = base_url
        self._lock = threading.Lock()

    def run(self, count: int, seconds: float, seed: int) -> None:
        """Let so many clients work for so long, and wait until all have ended."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(self._client, random.Random(f"{seed} {it}"), until) for it in range(count)]:
                future.result()

    def _client(self, choices: random.Random, until: float) -> None:
        acts = [self._whole, self._stream, self._leave_a_stream, self._leave, self._bad, self._broken_bytes]
        with httpx.Client(base_url=self._base_url, timeout=120, trust_env=False) as http:
            while time.monotonic() < until:
                act = choices.choice(acts)
                outcome = act(http, choices)
                with self._lock:
                    self.outcomes[f"{act.__name__.strip('_')} {outcome}"] += 1

    def _chat(self, choices: random.Random, **more: Any) -> dict[str, Any]:
        # Mostly the same model: each change of models is a restart.
        model = MODELS[choices.random() < 0.15]
        content = " ".join(choices.choice(_WORDS) for _ in range(choices.randint(1, 40)))
        return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 16, **more}

    def _whole(self, http: httpx.Client, choices: random.Random) -> str:
        return str(http.post("/v1/chat/completions", json=self._chat(choices)).status_code)

    def _stream(self, http: httpx.Client, choices: random.Random) -> str:
        body = self._chat(choices, stream=True)
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            text = answer.read()
        complete = answer.status_code != 200 or text.endswith(b"data: [DONE]\n\n")
        return str(answer.status_code) if complete else "truncated"

    def _leave_a_stream(self, http: httpx.Client, choices: random.Random) -> str:
        body = self._chat(choices, stream=True, max_tokens=1500)
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_raw(), b"")
        return str(answer.status_code)

    def _leave(self, http: httpx.Client, choices: random.Random) -> str:
        try:
            body = self._chat(choices, max_tokens=1500)
            return str(http.post("/v1/chat/completions", json=body, timeout=choices.random()).status_code)
        except httpx.TimeoutException:
            return "left"

    def _bad(self, http: httpx.Client, choices: random.Random) -> str:
        content = choices.choice(
            [b"{", b"[]", b'{"model": "none", "messages": []}', b'{"messages": 1}', b"\xff" * 10_000]
        )
        return str(http.post("/v1/chat/completions", content=content).status_code)

    def _broken_bytes(self, _http: httpx.Client, choices: random.Random) -> str:
        address = self._base_url.removeprefix("http://").split(":")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nContent-Length: 100000\r\n\r\n"
        with socket.create_connection((address[0], int(address[1])), timeout=30) as sock:
            sock.sendall(head[: choices.randint(1, len(head))] + b"{" * choices.randint(0, 1000))
        return "left"


def read_sample(agent: Peer, tasks: Path, minute: float, requests: int) -> Sample:
    """Wait until the agent's figures are at rest, as connections that were just left are not, and read them."""
    its = psutil.Process(agent.pid)
    until = time.monotonic() + _QUIET_S
    before: tuple[int, str] | None = None
    while time.monotonic() < until:
        now = (its.num_fds(), tasks.read_text())
        if now == before:
            break
        before = now
        time.sleep(1.5)
    return Sample(
        minute=minute,
        requests=requests,
        resident_mib=its.memory_info().rss / 2**20,
        descriptors=its.num_fds(),
        threads=its.num_threads(),
        tasks=int(tasks.read_text()),
    )


# Counts the tasks, for which the agent has no figure of its own.
COUNTING_AGENT = """
import functools, os, sys, time, trio

path = sys.argv.pop(1)

class Tasks(trio.abc.Instrument):
    count, written_at = 0, 0.0
    def task_spawned(self, task): self.count += 1
    def task_exited(self, task): self.count -= 1
    def before_io_wait(self, timeout):
        if time.monotonic() - self.written_at > 0.5:
            self.written_at = time.monotonic()
            with open(path + ".new", "w") as file:
                file.write(str(self.count))
            os.replace(path + ".new", path)

trio.run = functools.partial(trio.run, instruments=[Tasks()])
from nodeagent.cli.main import main
sys.exit(main())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=15.0, help="seconds of traffic between two readings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return soak(Path(scratch), options)


def soak(folder: Path, options: argparse.Namespace) -> int:
    files = [tiny_models.write_model(shape, folder) for shape in (tiny_models.TINY, tiny_models.TINY_B)]
    models = [{"model_id": name, "path": str(path)} for name, path in zip(MODELS, files, strict=True)]
    port = free_port()
    config = {
        "listen_port": port,
        "state_dir": str(folder / "state"),
        "llama_server_bin": str(find_llama_server(parse_config(json.dumps({"models": models}), folder / "none.yaml"))),
        "backend": "cpu",
        "max_pending_requests_per_device": 4 * options.clients,
        "models": models,
    }
    (folder / "agent.yaml").write_text(json.dumps(config))
    print(f"{options.minutes:g} minutes, {options.clients} clients, load average: {os.getloadavg()[0]:.1f}")
    tasks, log = folder / "tasks", folder / "agent.log"
    argv = [sys.executable, "-c", COUNTING_AGENT, str(tasks), "--config", str(folder / "agent.yaml")]
    samples: list[Sample] = []
    with process(argv, f"http://127.0.0.1:{port}/livez", log, cpus=os.sched_getaffinity(0)) as agent:
        clients = Clients(agent.base_url)
        began = time.monotonic()
        print("  ".join(f"{it.name:>12}" for it in fields(Sample)), flush=True)
        while time.monotonic() - began < options.minutes * 60:
            clients.run(options.clients, options.pause, seed=len(samples))
            minute = (time.monotonic() - began) / 60
            samples.append(read_sample(agent, tasks, minute, clients.outcomes.total()))
            print("  ".join(f"{it:>12,.1f}" if isinstance(it, float) else f"{it:>12,}" for it in astuple(samples[-1])))
            sys.stdout.flush()
    return report(samples, clients.outcomes, log.read_text(errors="replace"))


def report(samples: Sequence[Sample], outcomes: Counter[str], log: str) -> int:
    """Print what happened; return the exit code."""
    print()
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome:>30}  {count:>8,}")
    grown = growth(samples)
    faults = [f"{name} grew by {grown[name]:g}" for name, bound in BOUNDS.items() if grown[name] > bound]
    if "Traceback" in log:
        faults.append("the log has a traceback: " + log[log.index("Traceback") :][:2000])
    if restarts := re.findall(r".*restart in .*", log):
        faults.append(f"servers were restarted: {restarts[:3]}")
    if unexpected := [it for it in outcomes if it.endswith((" 500", " 502", " truncated"))]:
        faults.append(f"unexpected: {unexpected}")
    growths = ", ".join(f"{name} {value:+g}" for name, value in grown.items())
    print(f"\ngrowth from the middle third to the last: {growths}")
    print("\n".join(faults) or "nothing grew")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
