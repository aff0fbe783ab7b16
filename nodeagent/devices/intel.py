"""Intel's cards through the kernel drivers xe and i915.

Documentation/ABI/testing/sysfs-driver-intel-xe-hwmon, sysfs-driver-intel-i915-hwmon and gpu/xe of the kernel describe
the files. Neither driver tells in sysfs how much memory is in use. Power is what an energy counter gained between two
readings, and utilisation the time that the card did not idle between them.
"""

from pathlib import Path
from typing import Final

import msgspec

from nodeagent.devices.backend import DriverError
from nodeagent.devices.cards import Card
from nodeagent.devices.drm import DrmCard, Readings, drm_cards, hwmon
from nodeagent.devices.values import DeviceMetrics
from supervisor.cgroups import number, read

_DRIVERS: Final = ("xe", "i915")
# Where the graphics in the processor always are.
_INTEGRATED: Final = "0000:00:02.0"
# How long each of its parts has idled, in ms, below the card's folder. The busiest part counts.
_IDLE: Final = {"xe": "device/tile*/gt*/gtidle/idle_residency_ms", "i915": "gt/gt*/rc6_residency_ms"}
_TEMPERATURES: Final = {"xe": ("temp2_input", "temp1_input"), "i915": ("temp1_input",)}


class _Counters(msgspec.Struct, frozen=True):
    at: float
    microjoules: int | None
    idle_ms: tuple[int, ...]


class IntelCards:
    """Implements `cards.CardSource`. `root` is where sys is.

    What changes: `_cards` in `cards`; `_counters`, by PCI address, and `_readings` in `read`.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        """Raises DriverError if there is no such card."""
        self._root = root
        self._cards: dict[str, DrmCard] = {}
        self._counters: dict[str, _Counters] = {}
        self._readings = Readings()
        if not drm_cards(root, _DRIVERS):
            raise DriverError("no card of the drivers xe or i915", absent=True)

    def cards(self) -> list[Card]:
        self._cards = {card.pci_id: card for card in drm_cards(self._root, _DRIVERS)}
        return [Card(key=pci_id, name="", pci_id=pci_id, integrated=pci_id == _INTEGRATED) for pci_id in self._cards]

    def read(self, card: Card, now: float) -> DeviceMetrics:
        drm = self._cards[card.key]
        return self._readings.of_card(drm, now, lambda: self._measured(drm, now))

    def close(self) -> None:
        """Does nothing: each reading opens its files."""

    def _measured(self, card: DrmCard, now: float) -> DeviceMetrics:
        counters = _Counters(
            now,
            hwmon(card, "energy1_input", "energy2_input"),
            tuple(
                idle
                for path in sorted(card.folder.glob(_IDLE[card.driver]))
                if (idle := number(read(path))) is not None
            ),
        )
        before = self._counters.get(card.pci_id)
        self._counters[card.pci_id] = counters
        millidegrees = hwmon(card, *_TEMPERATURES[card.driver])
        return DeviceMetrics(
            measured_at=now,
            utilization_ratio=_utilization(before, counters),
            temperature_celsius=millidegrees / 1000 if millidegrees is not None else None,
            power_watts=_watts(before, counters),
        )


def _watts(before: _Counters | None, after: _Counters) -> float | None:
    """None at the first reading, and when the counter began anew."""
    if before is None or before.microjoules is None or after.microjoules is None or after.at <= before.at:
        return None
    gained = after.microjoules - before.microjoules
    return gained / 1e6 / (after.at - before.at) if gained >= 0 else None


def _utilization(before: _Counters | None, after: _Counters) -> float | None:
    if before is None or after.at <= before.at or not after.idle_ms or len(before.idle_ms) != len(after.idle_ms):
        return None
    elapsed_ms = (after.at - before.at) * 1000
    idled = [now - then for then, now in zip(before.idle_ms, after.idle_ms, strict=True)]
    if min(idled) < 0:
        return None
    return min(1.0, max(0.0, 1 - min(idled) / elapsed_ms))
