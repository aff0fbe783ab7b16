"""Runs the command-line tools that ask a driver."""

import subprocess
from collections.abc import Sequence

from nodeagent.devices.backend import DriverError


def run_command(command: Sequence[str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end, with an empty stdin. Raises DriverError if it can't be run, or hangs."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise DriverError(f"{command[0]}: not found", absent=True) from None
    except OSError as error:
        raise DriverError(f"{command[0]}: {error.strerror or error}") from error
    except subprocess.TimeoutExpired:
        raise DriverError(f"{command[0]}: no answer in {timeout_s:g} s") from None
