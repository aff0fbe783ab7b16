"""Devices of several backends, or of several builds of llama-server, on one host: a Vulkan card beside a CUDA card."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import msgspec
from msgspec.structs import replace

from nodeagent.devices.backend import Backend, DeclaredDevice
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.errors import ConfigError, Problem

logger = logging.getLogger(__name__)


class Part(msgspec.Struct, frozen=True):
    """One backend, and the declared devices that are its own, by their places in the configuration."""

    backend: Backend
    places: tuple[int, ...]


class MixedBackend:
    """Implements `backend.Backend` for declared devices: each is handled by the backend of its part.

    What changes: `_backends`, by device id, in `devices`.
    """

    name: Final = "mixed"

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._backends: dict[str, Backend] = {}

    def discover(self) -> list[DeviceRef]:
        """All devices of all parts, declared or not."""
        return [device for part in self._parts for device in part.backend.discover()]

    def devices(self, declared: Sequence[DeclaredDevice]) -> list[DeviceRef]:
        """See Backend. Warns of a card that is declared twice, for two backends."""
        found: dict[int, DeviceRef] = {}
        problems: list[Problem] = []
        for part in self._parts:
            try:
                devices = part.backend.devices([declared[place] for place in part.places])
            except ConfigError as error:
                problems += [_relocated(problem, part.places) for problem in error.problems]
                continue
            found |= zip(part.places, devices, strict=True)
            self._backends |= {device.device_id: part.backend for device in devices}
        if problems:
            raise ConfigError(problems)
        ordered = [found[place] for place in sorted(found)]
        for pci_id, times in Counter(device.pci_id for device in ordered).items():
            if pci_id is not None and times > 1:
                twice = ", ".join(device.device_id for device in ordered if device.pci_id == pci_id)
                logger.warning("%s are one card (%s): their servers share its memory", twice, pci_id)
        return ordered

    def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
        return self._backends[device.device_id].read(device, now)

    def child_env(self, device: DeviceRef) -> dict[str, str]:
        return self._backends[device.parts[0].device_id].child_env(device)

    def child_args(self, device: DeviceRef) -> list[str]:
        return self._backends[device.parts[0].device_id].child_args(device)

    def close(self) -> None:
        with ExitStack() as stack:
            for part in self._parts:
                stack.callback(part.backend.close)


def _relocated(problem: Problem, places: Sequence[int]) -> Problem:
    """The problem with the place in the whole list of devices, instead of that among the devices of the part."""
    where = re.sub(r"^devices\[(\d+)\]", lambda found: f"devices[{places[int(found[1])]}]", problem.where)
    return replace(problem, where=where)
