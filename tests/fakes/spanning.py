"""A scheduler of devices with fake servers, some of whose models span devices."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import trio

from fakes.servers import FakeServers
from nodeagent.errors import BackendUnavailable
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.scheduling.seam import Obstacle
from nodeagent.scheduling.span import SharedServers, Span
from nodeagent.scheduling.spanning_lane import SpanningLane


class _Placed(FakeServers):
    """Servers that can run the models of `spans`, or only others."""

    here: Callable[[str], bool]

    async def prepare(self, model_id: str) -> None:
        if not self.here(model_id):
            raise BackendUnavailable(model_id, "elsewhere")
        await super().prepare(model_id)

    def obstacle(self, model_id: str) -> Obstacle | None:
        return super().obstacle(model_id) if self.here(model_id) else Obstacle("elsewhere", elsewhere=True)


class SpanningNode:
    """`count` devices and a lane for each group of devices that models of `spans` (devices by model id) use."""

    def __init__(
        self,
        rules: LaneRules,
        spans: Mapping[str, Sequence[str]],
        *,
        make: Callable[[], FakeServers],
        count: int = 3,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._groups = {"+".join(devices): tuple(devices) for devices in spans.values()}
        ids = [f"gpu:{number}" for number in range(count)]
        self.servers = {device_id: self._made(make, partial(_is_single, spans)) for device_id in ids}
        for name, devices in self._groups.items():
            self.servers[name] = self._made(make, partial(_spans_these, spans, devices))
        shared = {
            device_id: SharedServers(
                self.servers[device_id],
                [self.servers[name] for name, devices in self._groups.items() if device_id in devices],
            )
            for device_id in ids
        }
        self.devices: dict[str, Lane[str]] = {it: Lane(it, shared[it], rules) for it in ids}
        self.lanes = dict(self.devices)
        for name, devices in self._groups.items():
            members = [device_id for device_id in ids if device_id in devices]
            span = Span([self.devices[it] for it in members], [shared[it] for it in members])
            self.lanes[name] = SpanningLane(name, self.servers[name], rules, span)
            self.lanes[name].share_places(self.devices[devices[0]])
        self.scheduler: Scheduler[str] = Scheduler(self.lanes, self.servers)

    def ids(self, name: str) -> Sequence[str]:
        """The devices of a lane."""
        return self._groups.get(name, (name,))

    def lanes_of(self, model_id: str) -> list[Lane[str]]:
        """The lanes where the model has a server."""
        return [self.lanes[name] for name, servers in self.servers.items() if model_id in servers.servers]

    def crash(self, model_id: str) -> None:
        """Its ready servers die."""
        for servers in self.servers.values():
            server = servers.servers.get(model_id)
            if server is not None and server.endpoint is not None:
                servers.crash(model_id)

    def mend(self) -> None:
        """From now on every model can be started."""
        for servers in self.servers.values():
            servers.broken.clear()

    async def start(self, nursery: trio.Nursery) -> None:
        for name, lane in self.lanes.items():
            await nursery.start(lane.run, name=f"lane {name}")

    def _made(self, make: Callable[[], FakeServers], here: Callable[[str], bool]) -> FakeServers:
        plain = make()
        servers = _Placed(
            load_s=plain.load_s,
            slots=plain.slots,
            broken=plain.broken,
            idle_unload_s=plain.idle_unload_s,
            hesitates_s=plain.hesitates_s,
        )
        servers.here = here
        servers.on_change = self._changed
        return servers

    def _changed(self) -> None:
        for lane in self.lanes.values():
            lane.nudge()
        self.on_change()


def _is_single(spans: Mapping[str, Sequence[str]], model_id: str) -> bool:
    return model_id not in spans


def _spans_these(spans: Mapping[str, Sequence[str]], devices: Sequence[str], model_id: str) -> bool:
    return tuple(spans.get(model_id, ())) == tuple(devices)
