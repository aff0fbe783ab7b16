"""Ctrl-C outside of the event loop: a command of a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, time
from nodeagent import __main__
from nodeagent.cli import main as shell

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        for _ in range({more}):
            os.kill(os.getpid(), signal.SIGINT)
        return shell.EXIT_INTERRUPTED

shell.main = main
raise SystemExit(__main__.run())
"""


@pytest.mark.parametrize(("more", "code"), [(0, 130), (1, -2), (2, -2)])
def test_ctrl_c_while_the_first_one_is_handled_ends_the_process_without_a_traceback(more: int, code: int) -> None:
    command = [sys.executable, "-c", PROGRAM.format(more=more)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (code, "")
