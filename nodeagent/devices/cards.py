"""The interface to what a vendor's driver says of its cards.

The devices of a backend are those that the llama-server binary lists (`listing`). It can't measure them while a server
runs there; the vendor's driver can, and `match` finds which of its cards a device is.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from nodeagent.devices.listing import ListedDevice
from nodeagent.devices.values import DeviceMetrics

# The binary rounds to MiB, and some drivers keep a part of the memory for themselves.
_SAME_MEMORY = 0.05


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One card as its driver knows it. `key` is the driver's own name for it."""

    key: str
    name: str
    pci_id: str | None = None
    uuid: str | None = None
    memory_total_bytes: int | None = None
    integrated: bool | None = None


class CardSource(Protocol):
    """The cards of one vendor. Every method but `close` may block, and raises DriverError."""

    def cards(self) -> list[Card]:
        """Every card of this host, in the order in which the vendor's software numbers them; none if it has none."""
        ...

    def read(self, card: Card, now: float) -> DeviceMetrics:
        """Measure the card. A card that sleeps is left alone: then this is an earlier reading, or knows nothing."""
        ...

    def close(self) -> None: ...


def same(found: Sequence[ListedDevice], cards: Sequence[Card]) -> bool:
    """Whether the only device must be the only card of its vendor, if neither has an address to tell."""
    return len(found) == len(cards) == 1 and None in (found[0].pci_id, cards[0].pci_id)


def match(device: ListedDevice, cards: Sequence[Card]) -> int | None:
    """The position of the card that this device is: by PCI address, else by name and memory if only one fits."""
    if device.pci_id is not None:
        return next((place for place, card in enumerate(cards) if card.pci_id == device.pci_id), None)
    alike = [place for place, card in enumerate(cards) if _alike(device, card)]
    return alike[0] if len(alike) == 1 else None


def _alike(device: ListedDevice, card: Card) -> bool:
    names = (device.description.lower(), card.name.lower())
    if not card.name or not (names[0] in names[1] or names[1] in names[0]) or card.memory_total_bytes is None:
        return False
    return abs(card.memory_total_bytes - device.memory_total_bytes) <= _SAME_MEMORY * device.memory_total_bytes
