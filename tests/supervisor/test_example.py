"""`examples/supervise.py`, which uses the supervisor alone."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.real

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "supervise.py"


def test_it_keeps_a_command_alive_and_ends_it_when_it_ends_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", port]
    argv = [sys.executable, str(EXAMPLE), port, "--", *command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None

        def wait_for(words: str) -> str:
            for line in running.stdout or ():
                if words in line:
                    return str(line)
            raise AssertionError(f"it ended without printing {words!r}")

        try:
            for _ in range(2):
                child = psutil.Process(int(wait_for("is starting, pid ").rpartition(" ")[2]))
                wait_for(f"is ready at 127.0.0.1:{port}")
                child.kill()
            child = psutil.Process(int(wait_for("is starting, pid ").rpartition(" ")[2]))
            running.send_signal(signal.SIGINT)
            wait_for("stopped")
            assert running.wait(10) == 0
            assert not psutil.pid_exists(child.pid)
        finally:
            running.kill()
