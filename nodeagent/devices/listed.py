"""The devices of one backend as the llama-server binary lists them, measured by the vendors' drivers.

A device is named by its place in the binary's list: `gpu:0` is `Vulkan0`. Unlike NVIDIA's numbers, those of Vulkan are
not the ones of any tool; the device's name, UUID and PCI address say which card it is.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

import msgspec
from msgspec.structs import replace

from nodeagent.devices.backend import Build, DeclaredDevice, DriverError, Faults, as_declared, within
from nodeagent.devices.cards import Card, CardSource, match, same
from nodeagent.devices.listing import ListedDevice, identified, list_devices
from nodeagent.devices.pinning import Pin, entries, pin_all
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.errors import StartupError

logger = logging.getLogger(__name__)

OpenSource = Callable[[], CardSource]
"""Opens a vendor's driver. Raises DriverError."""

# NVIDIA's library takes seconds to start where the driver is not kept loaded; nvidia-smi has 15 s.
_SOURCE_MAX_S: Final = 20.0
# Metal counts only what its own process has taken. The same holds for a Vulkan driver without VK_EXT_memory_budget,
# which does not say so: nothing but the total is taken from the list.


class _Found(msgspec.Struct, frozen=True):
    """One device: its names in the binary's list and in the vendor's software (None: unknown), and the card that it is,
    with what measures it."""

    listed_name: str
    entry: str | None
    card: Card | None = None
    source: CardSource | None = None


class ListedBackend:
    """One backend of llama.cpp; implements `backend.Backend`.

    What changes: `_found`, by device id, and `_devices` in `discover`.
    """

    def __init__(
        self, name: str, build: Build, sources: Sequence[OpenSource] = (), environ: Mapping[str, str] = os.environ
    ) -> None:
        """Opens the drivers of `sources`; those that are not there, or fail, measure nothing."""
        self.name: Final = name
        self._build = build
        self._environ = environ
        self._faults = Faults()
        self._vendor_only = len(sources) == 1
        self._found: dict[str, _Found] = {}
        self._devices: list[DeviceRef] = []
        self._sources = [source for open_it in sources if (source := _opened(open_it)) is not None]

    def discover(self) -> list[DeviceRef]:
        """The devices that the binary lists for this backend. Raises StartupError if it lists none, or no list."""
        try:
            listed = list_devices(self._build, self._environ)
        except DriverError as error:
            raise StartupError(f"the devices can't be listed: {error}") from error
        ours = [device for device in listed if device.backend == self.name]
        if not ours:
            others = ", ".join(device.name for device in listed) or "none at all"
            raise StartupError(f"{self._build.binary} lists no device for {self.name} here; it lists {others}")
        cards = [pair for source in self._sources for pair in self._cards_of(source)]
        if cards:
            ours = identified(ours, self._build, self._environ)
        names = entries(self.name, {**self._environ, **self._build.env}, len(ours))
        found = [card for card, _source in cards]
        places = [match(device, found) for device in ours]
        if self._vendor_only and same(ours, found):
            places = [0]
        self._devices = [
            self._device(place, device, names, cards[at] if at is not None else None)
            for place, (device, at) in enumerate(zip(ours, places, strict=True))
        ]
        return self._devices

    def devices(self, declared: Sequence[DeclaredDevice]) -> list[DeviceRef]:
        """See Backend. As in llama.cpp, what shares the host's memory is used only where there is no other card."""
        found = self._devices or self.discover()
        if declared:
            return as_declared(found, declared, self.name)
        if all(device.integrated for device in found):
            return found
        for device in found:
            if device.integrated:
                logger.info("%s (%s) is integrated, so it is not used unless declared", device.device_id, device.name)
        return [device for device in found if not device.integrated]

    def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
        """See Backend. Without a driver that knows the device, only its whole memory is known."""
        found = self._found[device.device_id]
        if found.card is None or found.source is None:
            return DeviceMetrics(measured_at=now, memory_total_bytes=device.memory_total_bytes)
        card, source = found.card, found.source
        reading = self._faults.read(device.device_id, now, lambda: source.read(card, now))
        if reading.memory_total_bytes is None:
            return replace(reading, memory_total_bytes=device.memory_total_bytes)
        return reading

    def child_env(self, device: DeviceRef) -> dict[str, str]:
        return dict(self._pin(device).env)

    def child_args(self, device: DeviceRef) -> list[str]:
        """`--device`, so that a server that does not find its device fails, and does not run on the CPU unnoticed."""
        return list(self._pin(device).args)

    def close(self) -> None:
        with ExitStack() as stack:
            for source in self._sources:
                stack.callback(source.close)

    def _pin(self, device: DeviceRef) -> Pin:
        found = [self._found[part.device_id] for part in device.parts]
        return pin_all(self.name, [(it.listed_name, it.entry) for it in found])

    def _cards_of(self, source: CardSource) -> list[tuple[Card, CardSource]]:
        try:
            return [(card, source) for card in within(_SOURCE_MAX_S, source.cards)]
        except DriverError as error:
            logger.warning("some devices can't be measured: %s", error)
            return []

    def _device(
        self, place: int, listed: ListedDevice, names: list[str] | None, measured_by: tuple[Card, CardSource] | None
    ) -> DeviceRef:
        card, source = measured_by or (None, None)
        entry = names[place] if names is not None else None
        if self.name == "rocm" and entry is not None and card is not None and card.uuid is not None:
            entry = card.uuid  # unlike the number, it does not change when another card is gone
        device_id = f"{self._build.id_prefix}:{place}"
        self._found[device_id] = _Found(listed.name, entry, card, source)
        return DeviceRef(
            device_id=device_id,
            backend=self.name,
            index=place,
            name=listed.description,
            uuid=card.uuid if card is not None else None,
            memory_total_bytes=listed.memory_total_bytes,
            pci_id=listed.pci_id or (card.pci_id if card is not None else None),
            integrated=listed.integrated if listed.integrated is not None or card is None else card.integrated,
        )


def _opened(open_it: OpenSource) -> CardSource | None:
    try:
        return within(_SOURCE_MAX_S, open_it)
    except DriverError as error:
        # A driver that is installed and fails is worth a warning: the node serves, and measures less.
        logger.log(logging.DEBUG if error.absent else logging.WARNING, "some devices can't be measured: %s", error)
        return None
