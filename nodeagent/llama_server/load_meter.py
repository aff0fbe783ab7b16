"""Measures each load: its time, the memory that it took of the device, and the context that the server has.

On a CPU the memory is what the server has for itself, without the mapped weights. On a GPU it is the difference of two
readings of the device, if nothing else of the agent's changed there in between and what was expected is not far off:
the estimate, or what a load that ran out of memory showed.
"""

import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec
import psutil
import trio

from nodeagent.config import ModelConfig
from nodeagent.containment import Containment
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.llama_server.context import read_slot_ctx_size, shrunk
from nodeagent.llama_server.control import ControlError
from nodeagent.llama_server.fit import bytes_on_device
from nodeagent.llama_server.measured_loads import Load, MeasuredLoads, Shortage
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.seams import ModelFiles, ServerHooks
from supervisor.snapshot import ChildSnapshot
from supervisor.spec import ChildSpec

logger = logging.getLogger(__name__)

# Loads that wait to be measured, and shortages that wait to be written; with more, some are not.
_MOST_WAITING = 32


ReadSlotCtxSize = Callable[[Upstream], Awaitable[int | None]]
"""As `context.read_slot_ctx_size`."""


class Readings(Protocol):
    """What was measured on the devices; see `DeviceMonitor`."""

    def latest(self, device_id: str) -> DeviceMetrics | None: ...

    async def read_now(self, device_id: str) -> DeviceMetrics: ...


class _Begun(msgspec.Struct, frozen=True):
    """A start: when, and the device's free memory before it, None if unknown."""

    at: float
    free_bytes: int | None


class _Done(msgspec.Struct, frozen=True):
    """A server that has become ready."""

    model: ModelConfig
    spec: ChildSpec
    upstream: Upstream
    pid: int | None
    load_s: float
    free_bytes: int | None


class LoadMeter:
    """Implements `seams.ServerHooks` around other hooks, and `seams.Measurements`.

    Measuring is a task of its own (`run`): no load waits for it. What changes: `_begun` and `_changed_at` (when a
    server was last started or stopped on a device), in the hooks.
    """

    def __init__(
        self,
        inner: ServerHooks,
        loads: MeasuredLoads,
        devices: Sequence[DeviceRef],
        *,
        catalogue: ModelFiles,
        monitor: Readings,
        child_of: Callable[[str], ChildSnapshot | None],
        read_slot_ctx_size: ReadSlotCtxSize = read_slot_ctx_size,
    ) -> None:
        self._inner = inner
        self._loads = loads
        self._devices = {device.device_id: device for device in devices}
        self._catalogue = catalogue
        self._monitor = monitor
        self._child_of = child_of
        self._read_slot_ctx_size = read_slot_ctx_size
        self._begun: dict[str, _Begun] = {}
        self._changed_at: dict[str, float] = {}
        self._send, self._receive = trio.open_memory_channel[_Done | None](_MOST_WAITING)
        self._containment = Containment("measuring a load")

    # What DeviceServers asks (seams.Measurements).

    @property
    def changes(self) -> int:
        """Rises when there is another measurement."""
        return self._loads.changes

    def memory_bytes(self, model: ModelConfig, spec: ChildSpec) -> int | None:
        load = self._load_of(model, spec)
        return load.memory_bytes if load is not None else None

    def least_bytes(self, model: ModelConfig, spec: ChildSpec) -> int | None:
        key = self._key(model, spec)
        shortage = None if key is None else self._loads.shortage(key)
        return shortage.least_bytes if shortage is not None else None

    def ran_out(self, model: ModelConfig, spec: ChildSpec, least_bytes: int | None) -> None:
        key = self._key(model, spec)
        if key is None:
            return
        if least_bytes is not None:
            ids = {"model_id": model.model_id, "device_id": spec.group}
            self._loads.put_shortage(Shortage(key=key, least_bytes=least_bytes, **ids))
        elif not self._loads.drop_shortage(key):
            return
        with suppress(trio.WouldBlock):  # the loads that wait to be measured are written, and this with them
            self._send.send_nowait(None)

    def load_s(self, model: ModelConfig, spec: ChildSpec) -> float | None:
        load = self._load_of(model, spec)
        return load.load_s if load is not None else None

    # What it is told (seams.ServerHooks).

    def before_start(self, model: ModelConfig, spec: ChildSpec) -> bool:
        self._begun[spec.child_id] = _Begun(trio.current_time(), self._free_bytes(self._devices[spec.group]))
        return self._inner.before_start(model, spec)

    async def after_ready(self, model: ModelConfig, spec: ChildSpec, upstream: Upstream) -> None:
        begun, child = self._begun.get(spec.child_id), self._child_of(spec.child_id)
        # A server that ran already was not loaded now.
        if begun is not None and child is not None and child.spawned_at is not None and child.spawned_at >= begun.at:
            load_s = trio.current_time() - child.spawned_at
            try:
                self._send.send_nowait(_Done(model, spec, upstream, child.pid, load_s, begun.free_bytes))
            except trio.WouldBlock:
                logger.debug("%s: its load is not measured: others wait", spec.child_id)
        await self._inner.after_ready(model, spec, upstream)

    def after_start(self, spec: ChildSpec) -> None:
        self._begun.pop(spec.child_id, None)
        self._changed(spec)
        self._inner.after_start(spec)

    async def before_stop(self, model: ModelConfig, spec: ChildSpec, upstream: Upstream) -> None:
        await self._inner.before_stop(model, spec, upstream)
        self._changed(spec)

    # The task.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Measure loads until cancelled."""
        task_status.started()
        async for done in self._receive:
            with self._containment:
                if done is None:
                    await self._write()
                else:
                    await self._look_at_context(done)
                    await self._measure(done)

    async def _look_at_context(self, done: _Done) -> None:
        try:
            slot_ctx_size = await self._read_slot_ctx_size(done.upstream)
        except ControlError as error:
            logger.debug("%s: its context is unknown: %s", done.spec.child_id, error)
            return
        done.upstream.slot_ctx_size = slot_ctx_size
        header = self._catalogue.header(done.model.model_id)
        said = None if slot_ctx_size is None else shrunk(done.model, header, slot_ctx_size)
        if said is not None:
            logger.warning("%s: %s", done.spec.child_id, said)

    async def _measure(self, done: _Done) -> None:
        device = self._devices[done.spec.group]
        key = self._key(done.model, done.spec)
        if key is None or done.upstream.closed.is_set():
            return
        memory_bytes = await self._memory_bytes(done, device)
        self._loads.put(
            Load(
                key=key,
                model_id=done.model.model_id,
                device_id=device.device_id,
                load_s=done.load_s,
                memory_bytes=memory_bytes,
            )
        )
        logger.debug("%s: loaded in %.2f s, memory %s bytes", done.spec.child_id, done.load_s, memory_bytes)
        await self._write()

    async def _write(self) -> None:
        # In a thread: a disk may be slow. What is written is complete, whatever happens meanwhile.
        await trio.to_thread.run_sync(self._loads.write, self._loads.encoded(), abandon_on_cancel=True)

    async def _memory_bytes(self, done: _Done, device: DeviceRef) -> int | None:
        if device.backend == "cpu":
            if done.pid is None:
                return None
            return await trio.to_thread.run_sync(own_bytes, done.pid, abandon_on_cancel=True)
        header = self._catalogue.header(done.model.model_id)
        free_bytes = _sum([(await self._monitor.read_now(part.device_id)).memory_free_bytes for part in device.parts])
        if header is None or free_bytes is None or done.free_bytes is None:
            return None
        least_bytes = self.least_bytes(done.model, done.spec) or 0
        took, expected = done.free_bytes - free_bytes, max(least_bytes, bytes_on_device(header, done.model, device))
        return took if expected / 2 <= took <= expected * 2 else None

    def _changed(self, spec: ChildSpec) -> None:
        for part in self._devices[spec.group].parts:
            self._changed_at[part.device_id] = trio.current_time()

    def _free_bytes(self, device: DeviceRef) -> int | None:
        """The free memory of the device, or of those that a model spans together; None if a reading is too old."""
        readings = {part.device_id: self._monitor.latest(part.device_id) for part in device.parts}
        return _sum(
            None if it is None or it.measured_at < self._changed_at.get(device_id, 0.0) else it.memory_free_bytes
            for device_id, it in readings.items()
        )

    def _load_of(self, model: ModelConfig, spec: ChildSpec) -> Load | None:
        key = self._key(model, spec)
        return None if key is None else self._loads.get(key)

    def _key(self, model: ModelConfig, spec: ChildSpec) -> str | None:
        """Changes with all that a load depends on: the model, the arguments, the binary and the device."""
        header, device = self._catalogue.header(model.model_id), self._devices.get(spec.group)
        if header is None or device is None:
            return None
        parts = (header.size_bytes, spec.argv, _stamp(spec.argv[0]), device.device_id, device.uuid, device.name)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _sum(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return sum(size or 0 for size in known) if None not in known else None


def own_bytes(pid: int) -> int | None:
    """The memory that a process has for itself, without what it shares with the page cache; None if it is gone."""
    try:
        memory = psutil.Process(pid).memory_info()
    except (psutil.Error, OSError):  # it is gone, or no file descriptor is free to read with
        return None
    return int(memory.rss - getattr(memory, "shared", 0))


def _stamp(binary: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(binary)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
