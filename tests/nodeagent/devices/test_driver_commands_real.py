"""The tools that ask a driver, as real programs."""

from pathlib import Path

import pytest

from nodeagent.devices.backend import DriverError
from nodeagent.devices.commands import run_command


def test_what_a_tool_prints_is_returned_with_its_exit_status() -> None:
    ended = run_command(["sh", "-c", "cat; echo out; printf '\\377' >&2; exit 3"], 10)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "out\n", "\ufffd")


def test_a_tool_that_is_missing_is_absent() -> None:
    with pytest.raises(DriverError, match="no-such-tool: not found") as failed:
        run_command(["no-such-tool"], 10)
    assert failed.value.absent


def test_a_tool_that_is_no_program_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="Permission denied") as failed:
        run_command([str(tmp_path)], 10)
    assert not failed.value.absent


def test_a_tool_that_hangs_is_an_error_after_its_time() -> None:
    with pytest.raises(DriverError, match=r"sleep: no answer in 0\.2 s"):
        run_command(["sleep", "60"], 0.2)
