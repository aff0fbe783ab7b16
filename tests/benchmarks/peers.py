"""What is compared: ways to one llama-server, each started as a process on loopback, ready when this returns."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CANNED = Path(__file__).parent / "canned_server.py"
# The load and the upstream share the first CPU, what is measured has the last one for itself.
_FRONT_CPU = {max(os.sched_getaffinity(0))}
_LOAD_CPU = {min(os.sched_getaffinity(0))}


def keep_to_load_cpu() -> None:
    os.sched_setaffinity(0, _LOAD_CPU)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def process(argv: list[str], health_url: str, log: Path, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run a command on the CPU for what is measured until the block is left; enter it once the URL answers 200."""
    with log.open("wb") as output:
        running = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, **(env or {})})
        os.sched_setaffinity(running.pid, _FRONT_CPU)
        try:
            _wait_healthy(health_url, running, log)
            yield
        finally:
            running.terminate()
            try:
                running.wait(10)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def _wait_healthy(url: str, running: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if running.poll() is not None:
            break
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} did not become healthy; {log} ends: {log.read_text(errors='replace')[-1000:]}")


@contextmanager
def canned(folder: Path, alias: str) -> Iterator[str]:
    """The canned server itself, on the load's CPU."""
    port = free_port()
    argv = [sys.executable, str(CANNED), "-a", alias, "--port", str(port)]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "canned.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def agent(folder: Path, server: Path, models: list[dict[str, Any]], *, cpus: bool, **keys: Any) -> Iterator[str]:
    """The agent with one CPU device; `cpus` keeps its server to the load's CPU. `keys` are of its configuration."""
    port = free_port()
    device: dict[str, Any] = {"device_id": "cpu:0"} | ({"cpus": sorted(_LOAD_CPU)} if cpus else {})
    config = {
        "listen_port": port,
        "state_dir": str(folder / "agent-state"),
        "llama_server_bin": str(server),
        "backend": "cpu",
        "devices": [device],
        "drain_grace_s": 0,
        "max_pending_requests_per_device": 64,
        "models": models,
        **keys,
    }
    path = folder / "agent.yaml"
    path.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "nodeagent", "--config", str(path), "--log-level", "warning"]
    with process(argv, f"http://127.0.0.1:{port}/readyz", folder / "agent.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def router(folder: Path, server: Path, models: Mapping[str, Path], flags: Sequence[str] = ()) -> Iterator[str]:
    """llama-server's own router mode with room for one model; it names models by their files, and hands `flags` on."""
    files = folder / "router-models"
    files.mkdir()
    for name, path in models.items():
        (files / f"{name}.gguf").symlink_to(path)
    port = free_port()
    argv = [str(server), "--models-dir", str(files), "--models-max", "1", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["-np", "1", "--device", "none", *flags]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "router.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def haproxy(folder: Path, upstream: str) -> Iterator[str]:
    port = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(f"""\
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend front
  bind 127.0.0.1:{port}
  default_backend servers
backend servers
  server one {upstream.removeprefix("http://")}
""")
    argv = [shutil.which("haproxy") or "haproxy", "-db", "-f", str(config)]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "haproxy.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def llama_swap(folder: Path, binary: Path, commands: Mapping[str, list[str]]) -> Iterator[str]:
    """llama-swap with one model loaded at a time; `commands` are without host and port."""
    port = free_port()
    models = {
        name: {"cmd": " ".join([*command, "--host", "127.0.0.1", "--port", "${PORT}"]), "concurrencyLimit": 64}
        for name, command in commands.items()
    }
    config = folder / "llama-swap.yaml"
    # Its servers get the ports from 5800 on, below those that the system gives to clients.
    config.write_text(json.dumps({"models": models}))
    argv = [str(binary), "--config", str(config), "--listen", f"127.0.0.1:{port}"]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "llama-swap.log"):
        yield f"http://127.0.0.1:{port}"
