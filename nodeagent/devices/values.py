"""What the rest of the agent knows of a device: its names, and what was last measured on it.

Nothing here depends on the vendor.
"""

from collections.abc import Mapping, Sequence

import msgspec


class DeviceRef(msgspec.Struct, frozen=True, kw_only=True):
    """One device that can run a server.

    `device_id` is its name for people and on the wire (`cpu:0`, `gpu:0`); `index` is its number in the vendor's tools
    (or in the list of llama-server); `uuid` is the vendor's permanent name; `pci_id` is its address, as `0000:01:00.0`;
    `integrated` says whether it shares the host's memory. What is unknown is None. The rest is of the
    configuration; without it `threads` may follow from the process's own limits (`limits.py`).
    """

    device_id: str
    backend: str
    index: int
    name: str
    uuid: str | None = None
    memory_total_bytes: int | None = None
    pci_id: str | None = None
    integrated: bool | None = None
    threads: int | None = None
    cpus: frozenset[int] | None = None
    llama_server_bin: str | None = None
    env: Mapping[str, str] = msgspec.field(default_factory=dict)
    memory_reserve_bytes: int = 0
    """Memory that is kept free for other programs, by the configuration."""
    members: "tuple[DeviceRef, ...]" = ()
    """The devices that models span, in the order of their `devices`; empty for a device of its own."""

    @property
    def parts(self) -> "tuple[DeviceRef, ...]":
        """The members, or the device itself."""
        return self.members or (self,)


def joined(members: Sequence[DeviceRef]) -> DeviceRef:
    """Several devices of one backend as the one that a model spans, `gpu:0+gpu:1`."""
    first = members[0]
    totals = [member.memory_total_bytes for member in members]
    return DeviceRef(
        device_id=span_id([member.device_id for member in members]),
        backend=first.backend,
        index=first.index,
        name=" + ".join(member.name for member in members),
        memory_total_bytes=sum(total or 0 for total in totals) if None not in totals else None,
        threads=first.threads,
        cpus=first.cpus,
        llama_server_bin=first.llama_server_bin,
        env=first.env,
        memory_reserve_bytes=sum(member.memory_reserve_bytes for member in members),
        members=tuple(members),
    )


def span_id(device_ids: Sequence[str]) -> str:
    """The name of these devices together."""
    return "+".join(device_ids)


class DeviceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of a device, taken at `measured_at` (`trio.current_time()`); None is unknown."""

    measured_at: float
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilization_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
