"""NVIDIA's cards as a source of readings, for backends other than CUDA that run on them."""

from nodeagent.devices.cards import Card
from nodeagent.devices.nvidia_driver import Driver, measured
from nodeagent.devices.values import DeviceMetrics


class NvidiaCards:
    """Implements `cards.CardSource` with either way to NVIDIA's driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def cards(self) -> list[Card]:
        return [
            Card(
                key=str(gpu.index),
                name=gpu.name,
                pci_id=gpu.pci_id,
                uuid=gpu.uuid,
                memory_total_bytes=gpu.memory_total_bytes,
            )
            for gpu in self._driver.gpus()
        ]

    def read(self, card: Card, now: float) -> DeviceMetrics:
        return measured(self._driver.read(card.uuid, int(card.key), now), now)

    def close(self) -> None:
        self._driver.close()
