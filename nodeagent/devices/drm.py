"""What is common to the kernel's graphics drivers: their cards in sysfs, and when a card may be looked at.

Reading a card's values wakes it, and postpones its sleep by seconds, so a card that sleeps is not read at all, and one
that may sleep and has nothing to do is read once a minute. `power/` of a device is in Documentation/ABI/testing/
sysfs-devices-power of the kernel.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from nodeagent.devices.backend import DriverError
from nodeagent.devices.listing import pci_address
from nodeagent.devices.values import DeviceMetrics
from supervisor.cgroups import number, read

_IDLE_INTERVAL_S: Final = 60.0
# A card with less than this in use holds no model. An idle driver and a small framebuffer need some.
_IDLE_BYTES: Final = 256 << 20
_IDLE_UTILIZATION: Final = 0.01


class DrmCard(msgspec.Struct, frozen=True):
    """`folder` is /sys/class/drm/cardN; `device` in it is the PCI device."""

    folder: Path
    driver: str
    pci_id: str

    @property
    def device(self) -> Path:
        return self.folder / "device"


def drm_cards(root: Path, drivers: tuple[str, ...]) -> list[DrmCard]:
    """The cards of these drivers by PCI address. Reads nothing that wakes a card."""
    found = []
    for folder in root.joinpath("sys/class/drm").glob("card*"):
        if not folder.name.removeprefix("card").isdecimal():  # card0-HDMI-A-1 is a connector
            continue
        facts = dict(line.partition("=")[::2] for line in read(folder / "device/uevent").splitlines())
        if facts.get("DRIVER") in drivers and facts.get("PCI_SLOT_NAME"):
            found.append(DrmCard(folder, facts["DRIVER"], pci_address(facts["PCI_SLOT_NAME"])))
    return sorted(found, key=lambda card: card.pci_id)


def hwmon(card: DrmCard, *names: str) -> int | None:
    """The first of these values that the card's sensors have."""
    for folder in sorted(card.device.glob("hwmon/hwmon*")):
        for name in names:
            if (value := number(read(folder / name))) is not None:
                return value
    return None


class Readings:
    """The last reading of each card, by its folder in sysfs, and whether it is time for another.

    What changes: `_last`, in `read`.
    """

    def __init__(self) -> None:
        self._last: dict[Path, DeviceMetrics] = {}

    def of_card(self, card: DrmCard, now: float, measure: Callable[[], DeviceMetrics]) -> DeviceMetrics:
        """The same for a card of the kernel's drivers. Raises DriverError if the card is gone."""
        if not card.device.joinpath("uevent").exists():
            raise DriverError(f"the card {card.pci_id} is gone")
        return self.read(card.device, now, measure)

    def read(self, device: Path, now: float, measure: Callable[[], DeviceMetrics]) -> DeviceMetrics:
        """What `measure` returns, or the last reading, with its time, if the PCI device should not be woken."""
        last = self._last.get(device)
        if read(device / "power/runtime_status").strip() in ("suspended", "suspending"):
            return last or DeviceMetrics(measured_at=now)
        if last is not None and now - last.measured_at < _IDLE_INTERVAL_S and _idle(last) and _may_sleep(device):
            return last
        self._last[device] = reading = measure()
        return reading


def _may_sleep(device: Path) -> bool:
    return read(device / "power/control").strip() == "auto"


def _idle(reading: DeviceMetrics) -> bool:
    busy, used = reading.utilization_ratio, reading.memory_used_bytes
    return (used is None or used < _IDLE_BYTES) and busy is not None and busy < _IDLE_UTILIZATION
