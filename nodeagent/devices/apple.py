"""Apple's GPU through the command `ioreg`, which needs no rights."""

import re
from collections.abc import Callable, Sequence
from typing import Final

from nodeagent.devices.backend import DriverError
from nodeagent.devices.cards import Card
from nodeagent.devices.commands import run_command
from nodeagent.devices.values import DeviceMetrics

_COMMAND: Final = ("ioreg", "-r", "-c", "IOGPU", "-d", "1", "-f")
_TIMEOUT_S: Final = 10.0
_MODEL: Final = re.compile(r'"model" = "([^"]+)"')


def run_ioreg(command: Sequence[str]) -> str:
    """The output of the command. Raises DriverError if it can't be run, hangs or fails."""
    done = run_command(command, _TIMEOUT_S)
    if done.returncode != 0:
        raise DriverError(f"{command[0]}: {done.stderr.strip() or 'failed'} (exit {done.returncode})")
    return done.stdout


class AppleCards:
    """Implements `cards.CardSource`. Raises DriverError if `ioreg` shows no GPU."""

    def __init__(self, run: Callable[[Sequence[str]], str] = run_ioreg) -> None:
        self._run = run
        if not self.cards():
            raise DriverError("ioreg shows no GPU", absent=True)

    def cards(self) -> list[Card]:
        """There is one: its memory is the host's, of which llama-server says how much it may use."""
        model = _MODEL.search(self._run(_COMMAND))
        return [Card(key=model[1], name=model[1], integrated=True)] if model is not None else []

    def read(self, card: Card, now: float) -> DeviceMetrics:
        """What is free is unknown: other programs' memory counts as well."""
        text = self._run(_COMMAND)
        percent = _statistic(text, "Device Utilization %")
        return DeviceMetrics(
            measured_at=now,
            memory_used_bytes=_statistic(text, "In use system memory"),
            utilization_ratio=min(1.0, percent / 100) if percent is not None else None,
        )

    def close(self) -> None:
        """Does nothing: each call is a process of its own."""


def _statistic(text: str, name: str) -> int | None:
    found = re.search(rf'"{re.escape(name)}"\s*=\s*(\d+)', text)
    return int(found[1]) if found is not None else None
