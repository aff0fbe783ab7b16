"""What is compared: ways to one llama-server, each started as a process on loopback, ready when the block begins."""

import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.load import first_byte_s
from benchmarks.options import Options
from benchmarks.processes import LOAD_CPUS, Peer, process
from fakes import tiny_models

CANNED = Path(__file__).parent / "canned_server.py"
TRIO_RELAY = Path(__file__).parent / "trio_relay.py"
CANNED_ALIAS = "canned"
# More than any load here has clients.
MAX_REQUESTS = 128


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def canned_peers(options: Options) -> Iterator[dict[str, Peer]]:
    """All that can be measured here, by name, each with the canned server behind it; "direct" is that server."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        direct = stack.enter_context(canned(folder))
        peers = {"direct": direct, "agent": stack.enter_context(agent_before_canned(folder))}
        peers["trio"] = stack.enter_context(trio_relay(folder, direct.base_url))
        if shutil.which("haproxy"):
            peers["haproxy"] = stack.enter_context(haproxy(folder, direct.base_url))
        if shutil.which("nginx"):
            peers["nginx"] = stack.enter_context(nginx(folder, direct.base_url))
        if options.llama_swap:
            peers["llama-swap"] = stack.enter_context(llama_swap_before_canned(folder, options.llama_swap))
        for peer in peers.values():
            warm_up(peer)
        yield peers


def warm_up(peer: Peer) -> None:
    """One streamed request, so that a canned server runs behind the peer."""
    first_byte_s(peer.base_url, {"model": CANNED_ALIAS, "messages": [], "stream": True})


@contextmanager
def canned(folder: Path) -> Iterator[Peer]:
    """The canned server itself, on the load's CPU."""
    port = free_port()
    argv = [sys.executable, str(CANNED), "-a", CANNED_ALIAS, "--port", str(port)]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "canned.log", cpus=LOAD_CPUS) as peer:
        yield peer


@contextmanager
def agent_before_canned(
    folder: Path,
    *,
    health: str = "/readyz",
    python: Sequence[str] = (),
    program: Sequence[str] = ("-m", "nodeagent"),
    log_level: str = "warning",
    task: str = "chat",
    server_env: Mapping[str, str] = MappingProxyType({}),
    **keys: Any,
) -> Iterator[Peer]:
    """The agent with a canned server of that task on the load's CPU; the rest is as for `agent`."""
    # The agent looks at a model's file before it starts the server. The canned server does not read it.
    path = tiny_models.write_model(tiny_models.TINY, folder)
    model = {
        "model_id": CANNED_ALIAS,
        "path": str(path),
        "parallel": MAX_REQUESTS,
        "task": task,
        "env": dict(server_env),
    }
    cpus = sorted(LOAD_CPUS)
    with agent(
        folder, CANNED, [model], cpus=cpus, health=health, python=python, program=program, log_level=log_level, **keys
    ) as peer:
        yield peer


@contextmanager
def agent(
    folder: Path,
    server: Path,
    models: list[dict[str, Any]],
    *,
    cpus: Sequence[int] = (),
    health: str = "/readyz",
    python: Sequence[str] = (),
    program: Sequence[str] = ("-m", "nodeagent"),
    log_level: str = "warning",
    **keys: Any,
) -> Iterator[Peer]:
    """The agent with one CPU device; its server runs on `cpus`, or else where the agent does.

    `keys` are of its configuration; it is ready when `health` answers 200; `python` are options of the interpreter,
    and `program` is what that runs.
    """
    port = free_port()
    config = {
        "listen_port": port,
        "state_dir": str(folder / "agent-state"),
        "llama_server_bin": str(server),
        "backend": "cpu",
        "devices": [{"device_id": "cpu:0"} | ({"cpus": list(cpus)} if cpus else {})],
        "drain_grace_s": 0,
        "max_pending_requests_per_device": MAX_REQUESTS,
        "models": models,
        **keys,
    }
    path = folder / "agent.yaml"
    path.write_text(json.dumps(config))
    argv = [sys.executable, *python, *program, "--config", str(path), "--log-level", log_level]
    with process(argv, f"http://127.0.0.1:{port}{health}", folder / "agent.log") as peer:
        yield peer


@contextmanager
def router(folder: Path, server: Path, models: Mapping[str, Path], flags: Sequence[str] = ()) -> Iterator[Peer]:
    """llama-server's own router mode with room for one model; it names models by their files, and passes `flags` on."""
    files = folder / "router-models"
    files.mkdir()
    for name, path in models.items():
        (files / f"{name}.gguf").symlink_to(path)
    port = free_port()
    argv = [str(server), "--models-dir", str(files), "--models-max", "1", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["-np", "1", "--device", "none", *flags]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "router.log") as peer:
        yield peer


@contextmanager
def trio_relay(folder: Path, upstream: str) -> Iterator[Peer]:
    """What trio itself costs: a relay that copies bytes."""
    port = free_port()
    argv = [sys.executable, str(TRIO_RELAY), str(port), upstream.rpartition(":")[2]]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "trio.log") as peer:
        yield peer


@contextmanager
def haproxy(folder: Path, upstream: str) -> Iterator[Peer]:
    """HAProxy with one thread, since it has one CPU; `http-no-delay`, or it holds events back for up to 200 ms."""
    port = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(f"""\
global
  nbthread 1
defaults
  mode http
  option http-no-delay
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
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "haproxy.log") as peer:
        yield peer


@contextmanager
def nginx(folder: Path, upstream: str) -> Iterator[Peer]:
    """nginx as one process, set up to stream, to keep connections, and to keep bodies of 32 KiB in memory."""
    port = free_port()
    root = folder / "nginx"
    root.mkdir()
    temporary = "\n".join(f"  {it}_temp_path {root};" for it in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config = root / "nginx.conf"
    config.write_text(f"""\
daemon off;
master_process off;
pid {root}/pid;
events {{ worker_connections 1024; }}
http {{
  access_log off;
{temporary}
  keepalive_requests 1000000000;
  client_body_buffer_size 1m;
  upstream servers {{
    server {upstream.removeprefix("http://")};
    keepalive {MAX_REQUESTS};
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://servers;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
""")
    argv = [shutil.which("nginx") or "nginx", "-e", "stderr", "-p", str(root), "-c", str(config)]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "nginx.log") as peer:
        yield peer


@contextmanager
def llama_swap_before_canned(folder: Path, binary: Path) -> Iterator[Peer]:
    """llama-swap with a canned server on the load's CPU."""
    cpus = ",".join(map(str, sorted(LOAD_CPUS)))
    command = [sys.executable, str(CANNED), "-a", CANNED_ALIAS, "--run-on-cpus", cpus]
    with llama_swap(folder, binary, {CANNED_ALIAS: command}) as peer:
        yield peer


@contextmanager
def llama_swap(folder: Path, binary: Path, commands: Mapping[str, list[str]]) -> Iterator[Peer]:
    """llama-swap with one model loaded at a time; `commands` are without host and port."""
    port = free_port()
    models = {
        name: {
            "cmd": " ".join([*command, "--host", "127.0.0.1", "--port", "${PORT}"]),
            "concurrencyLimit": MAX_REQUESTS,
        }
        for name, command in commands.items()
    }
    config = folder / "llama-swap.yaml"
    # Its servers get the ports from 5800 on, below those that the system gives to clients.
    config.write_text(json.dumps({"models": models}))
    argv = [str(binary), "--config", str(config), "--listen", f"127.0.0.1:{port}"]
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "llama-swap.log") as peer:
        yield peer
