"""One device as the node runs it, or several that models span: its servers, its lane, and what its servers printed."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from nodeagent.config import NodeConfig
from nodeagent.device_fit import Facts, device_fit
from nodeagent.devices.monitor import DeviceMonitor
from nodeagent.devices.values import DeviceRef
from nodeagent.events import Ring
from nodeagent.llama_server.device_servers import DeviceServers
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.queueing import FirstCome
from nodeagent.scheduling.seam import Servers
from nodeagent.scheduling.span import SharedServers, Span
from nodeagent.scheduling.spanning_lane import SpanningLane
from nodeagent.scheduling.swap_aware import SwapAware
from nodeagent.status import DeviceFit, DeviceStatus
from supervisor.lifecycle import Event
from supervisor.spec import ChildSpec

# For `/v1/node/devices/{device_id}/logs`, which shows 1000 lines at most.
_LINES_KEPT = 2000

BuildSpecs = Callable[[NodeConfig], Mapping[str, ChildSpec]]
"""Builds, from a configuration, the spec of the child that serves each model on one device, by model id."""


class ManagedDevice:
    """One device with everything that the node keeps for it. `build_specs` describes the child for each model here.

    Devices that models span are one more of these, beside each of them, with the lanes of the members (`span`).
    `seen` is what the lane sees of the servers, if that is not these alone. `spanning` are the groups that the device
    belongs to.
    What changes: `lines` in `Node.on_child_line`, the lane's rules and the servers' configuration in `reconfigure`.
    """

    def __init__(
        self,
        ref: DeviceRef,
        servers: DeviceServers,
        build_specs: BuildSpecs,
        config: NodeConfig,
        *,
        seen: SharedServers[Upstream] | None = None,
        span: Span[Upstream] | None = None,
    ) -> None:
        self.ref = ref
        self.servers = servers
        self._seen: Servers[Upstream] = seen or servers
        self.spanning: list[ManagedDevice] = []
        self._members: Sequence[ManagedDevice] = ()
        rules = lane_rules(config, ref)
        self.lane: Lane[Upstream]
        if span is None:
            self.lane = Lane(ref.device_id, self._seen, rules)
        else:
            self.lane = SpanningLane(ref.device_id, servers, rules, span)
        self.lines: Ring[str] = Ring(_LINES_KEPT)
        self._build_specs = build_specs

    def __repr__(self) -> str:
        return f"<ManagedDevice {self.ref.device_id}: {self.lane!r}>"

    def handle(self, event: Event) -> None:
        """Handle a supervisor's event about a server of this device."""
        self.servers.handle(event)
        self.lane.nudge()
        for member in self._members:
            member.lane.nudge()

    def belong_to(self, members: "Sequence[ManagedDevice]", home: "ManagedDevice") -> None:
        """These are the devices that the models here span; places in the queue and output are those of `home`."""
        self._members, self.lines = members, home.lines
        self.lane.share_places(home.lane)
        for member in members:
            member.spanning.append(self)

    def recall_loads(self) -> None:
        """Take over how long loads took in earlier runs of the agent. Call it before the lane runs."""
        for model_id, load_s in self.servers.measured_loads_s().items():
            self.lane.times.loaded(model_id, load_s)

    def reconfigure(self, config: NodeConfig) -> list[str]:
        """Apply another configuration; return the models whose running server it does not allow any more."""
        self.lane.rules = rules = lane_rules(config, self.ref)
        models = {model.model_id: model for model in config.models}
        patience_s = config.llama_server_startup_timeout_s
        self.lane.nudge()
        return self.servers.replace(models, self._build_specs(config), patience_s, rules.max_models)

    def status(self, monitor: DeviceMonitor) -> DeviceStatus:
        """The device at this moment. A server that spans several is one of the first of them."""
        metrics = monitor.latest(self.ref.device_id)
        servers, used_by = list(self.servers.views()), []
        for span in self.spanning:
            views = span.servers.views()
            if span.ref.members[0].device_id == self.ref.device_id:
                device_ids = tuple(part.device_id for part in span.ref.members)
                servers += [replace(view, device_ids=device_ids) for view in views]
            else:
                used_by += [view.model_id for view in views if view.is_active]
        return DeviceStatus(self.ref, metrics, self.lane.view(), tuple(servers), tuple(used_by))

    def fits(self, model_ids: Iterable[str]) -> dict[str, DeviceFit]:
        """How each of these models fits on the device at this moment, but for those that are kept to other devices."""
        servers = self.servers
        views = {view.model_id: view for view in servers.views()}
        has_place = sum(view.is_active for view in self._seen.views()) < self.lane.rules.max_models
        free_bytes = servers.memory_free_bytes()
        facts = {
            model_id: Facts(
                device_id=self.ref.device_id,
                fit=servers.fit(model_id),
                server=views.get(model_id),
                obstacle=servers.obstacle(model_id),
                why_loaded=self.lane.why_loaded(model_id),
                free_bytes=free_bytes,
                most_bytes=servers.memory_most_bytes(model_id),
                has_place=has_place,
                offloads_in_part=self.ref.backend != "cpu",
            )
            for model_id in model_ids
            if servers.serves(model_id)
        }
        return {model_id: device_fit(its) for model_id, its in facts.items()}


class Part(msgspec.Struct, frozen=True):
    """What a managed device is made of."""

    ref: DeviceRef
    servers: DeviceServers
    build_specs: BuildSpecs


def manage(devices: Sequence[Part], spans: Sequence[Part], config: NodeConfig) -> dict[str, ManagedDevice]:
    """Every device with its lane, in this order, then every group of devices that models span with its own."""
    for part in (*devices, *spans):
        groups = [[it.servers for it in (*devices, *spans) if _share(it.ref, one)] for one in part.ref.parts]
        part.servers.share_with(groups)
    managed: dict[str, ManagedDevice] = {}
    seen: dict[str, SharedServers[Upstream]] = {}
    for part in devices:
        over = [span.servers for span in spans if part.ref.device_id in _member_ids(span.ref)]
        device_id = part.ref.device_id
        seen[device_id] = SharedServers(part.servers, over)
        shared = seen[device_id] if over else None
        managed[device_id] = ManagedDevice(part.ref, part.servers, part.build_specs, config, seen=shared)
    for part in spans:
        member_ids = [device.ref.device_id for device in devices if device.ref.device_id in _member_ids(part.ref)]
        members = [managed[device_id] for device_id in member_ids]
        span = Span([member.lane for member in members], [seen[device_id] for device_id in member_ids])
        group = ManagedDevice(part.ref, part.servers, part.build_specs, config, span=span)
        group.belong_to(members, home=managed[part.ref.members[0].device_id])
        managed[part.ref.device_id] = group
    return managed


def _share(ref: DeviceRef, device: DeviceRef) -> bool:
    """Whether servers of the one use the other."""
    return device.device_id in [part.device_id for part in ref.parts]


def _member_ids(ref: DeviceRef) -> list[str]:
    return [member.device_id for member in ref.members]


def lane_rules(config: NodeConfig, device: DeviceRef) -> LaneRules:
    """The configuration's rules for the lane of that device. One for models that span devices follows the strictest of
    their rules, and serves one model at a time."""
    declared = {it.device_id: it for it in config.devices}
    own = [declared.get(part.device_id) for part in device.parts]
    limits = [it.max_models if it is not None else None for it in own]
    max_models = min(config.max_models_per_device if limit is None else limit for limit in limits)
    concurrent = own[0].concurrent_models if own[0] is not None else None
    swap_aware = SwapAware(config.swap_fairness_s, config.min_residency_s)
    return LaneRules(
        max_pending=config.max_pending_requests_per_device,
        queue_timeout_s=config.queue_timeout_s,
        startup_timeout_s=config.llama_server_startup_timeout_s,
        abandoned_load_grace_s=config.abandoned_load_grace_s,
        max_models=max_models,
        concurrent_models=not device.members and (config.concurrent_models if concurrent is None else concurrent),
        queue_timeouts_s={
            model.model_id: model.queue_timeout_s for model in config.models if model.queue_timeout_s is not None
        },
        policy=FirstCome() if config.scheduling == "fifo" else swap_aware,
    )
