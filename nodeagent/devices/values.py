"""What the rest of the agent knows of a device: how it is named, and what was last measured on it.

The names of a device carry no vendor: `scheduling` sees only these two values.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceRef:
    """One device that can hold a server.

    `device_id` is what people and the wire say (`cpu:0`, `gpu:0`); `index` is the number that the backend's own
    tools use; `uuid` is the vendor's lasting name, where there is one. `memory_total_bytes` is None where unknown.
    `threads` and `cpus` are what the configuration says of a CPU device.
    """

    device_id: str
    backend: str
    index: int
    name: str
    uuid: str | None = None
    memory_total_bytes: int | None = None
    threads: int | None = None
    cpus: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class DeviceMetrics:
    """One reading of a device. Sizes in bytes; None is unknown, never a made-up 0.

    `measured_at` is `trio.current_time()` of the reading.
    """

    measured_at: float
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilization_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
