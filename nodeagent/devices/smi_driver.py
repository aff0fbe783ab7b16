"""The NVIDIA driver through the command `nvidia-smi`, for hosts where its library can't be loaded."""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from nodeagent.devices.backend import DriverError
from nodeagent.devices.commands import run_command
from nodeagent.devices.nvidia_driver import Gpu, GpuReading

_FIELDS: Final = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.used",
    "memory.free",
    "utilization.gpu",
    "temperature.gpu",
    "power.draw",
)
_COMMAND: Final = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
# Without persistence mode each call starts the driver, which takes seconds on a host with many GPUs.
_TIMEOUT_S: Final = 15.0
# One call lists all GPUs, which are read one after the other.
_FRESH_S: Final = 1.0
_MIB: Final = 1 << 20


class SmiResult(msgspec.Struct, frozen=True):
    """The result of one call of nvidia-smi, which writes its errors to stdout."""

    returncode: int
    stdout: str


def run_smi(command: Sequence[str]) -> SmiResult:
    """Run the command to its end. Raises DriverError if it can't be run, or hangs."""
    done = run_command(command, _TIMEOUT_S)
    return SmiResult(done.returncode, done.stdout or done.stderr)


class SmiDriver:
    """`nvidia-smi`; implements `nvidia_driver.Driver`. Raises DriverError if it can't be used.

    What changes: `_rows` and `_queried_at`, in `read`.
    """

    def __init__(self, run: Callable[[Sequence[str]], SmiResult] = run_smi) -> None:
        self._run = run
        self._rows: list[tuple[Gpu, GpuReading]] = []
        self._queried_at: float | None = None
        self._query()

    def gpus(self) -> list[Gpu]:
        return [gpu for gpu, _ in self._query()]

    def mig_device(self, uuid: str, index: int) -> Gpu:
        """The slice as the mask names it: nvidia-smi does not list slices, and nothing will be measured."""
        return Gpu(index, uuid, "MIG device", None)

    def read(self, uuid: str | None, index: int, now: float) -> GpuReading:
        if self._queried_at is None or now - self._queried_at >= _FRESH_S:
            self._queried_at = None
            self._rows = self._query()
            self._queried_at = now
        for gpu, reading in self._rows:
            if gpu.uuid == uuid if uuid is not None else gpu.index == index:
                return reading
        raise DriverError(f"nvidia-smi does not list {uuid or index}")

    def close(self) -> None:
        """Does nothing: each call is a process of its own."""

    def _query(self) -> list[tuple[Gpu, GpuReading]]:
        result = self._run(_COMMAND)
        rows = parse_smi(result.stdout)
        # With one broken GPU it may list the others and still fail. "No devices were found" is a valid result.
        if result.returncode != 0 and not rows and "No devices were found" not in result.stdout:
            message = next((line.strip() for line in result.stdout.splitlines() if line.strip()), "no output")
            raise DriverError(f"nvidia-smi: {message} (exit {result.returncode})")
        return rows


def parse_smi(stdout: str) -> list[tuple[Gpu, GpuReading]]:
    """The rows of the output; other lines, such as errors about a broken GPU, are skipped."""
    return [row for line in stdout.splitlines() if (row := _row(line)) is not None]


def _row(line: str) -> tuple[Gpu, GpuReading] | None:
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(_FIELDS) or not values[0].isdecimal():
        return None
    index, uuid, name, *measured = values
    total, used, free, utilization, temperature, power = map(_number, measured)
    reading = GpuReading(
        memory_total_bytes=_bytes(total),
        memory_used_bytes=_bytes(used),
        memory_free_bytes=_bytes(free),
        utilization_ratio=None if utilization is None else utilization / 100,
        temperature_celsius=temperature,
        power_watts=power,
    )
    return Gpu(int(index), uuid if uuid.startswith("GPU-") else None, name, reading.memory_total_bytes), reading


def _number(value: str) -> float | None:
    """None for `[N/A]`, `[Not Supported]`, `[Unknown Error]`, `[GPU is lost]` and anything else that is no number."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def _bytes(mebibytes: float | None) -> int | None:
    return None if mebibytes is None else int(mebibytes * _MIB)
