"""One device as the node runs it: its servers, its lane, and what its servers printed."""

from collections.abc import Callable, Iterable, Mapping

from nodeagent.config import NodeConfig
from nodeagent.device_fit import Facts, device_fit
from nodeagent.devices.monitor import DeviceMonitor
from nodeagent.devices.values import DeviceRef
from nodeagent.events import Ring
from nodeagent.llama_server.device_servers import DeviceServers
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.queueing import FirstCome
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

    What changes: `lines` in `Node.on_child_line`, the lane's rules and the servers' configuration in `reconfigure`.
    """

    def __init__(self, ref: DeviceRef, servers: DeviceServers, build_specs: BuildSpecs, config: NodeConfig) -> None:
        self.ref = ref
        self.servers = servers
        self.lane: Lane[Upstream] = Lane(ref.device_id, servers, lane_rules(config, ref.device_id))
        self.lines: Ring[str] = Ring(_LINES_KEPT)
        self._build_specs = build_specs

    def __repr__(self) -> str:
        return f"<ManagedDevice {self.ref.device_id}: {self.lane!r}>"

    def handle(self, event: Event) -> None:
        """Handle a supervisor's event about a server of this device."""
        self.servers.handle(event)
        self.lane.nudge()

    def recall_loads(self) -> None:
        """Take over how long loads took in earlier runs of the agent. Call it before the lane runs."""
        for model_id, load_s in self.servers.measured_loads_s().items():
            self.lane.times.loaded(model_id, load_s)

    def reconfigure(self, config: NodeConfig) -> list[str]:
        """Apply another configuration; return the models whose running server it does not allow any more."""
        self.lane.rules = rules = lane_rules(config, self.ref.device_id)
        models = {model.model_id: model for model in config.models}
        patience_s = config.llama_server_startup_timeout_s
        self.lane.nudge()
        return self.servers.replace(models, self._build_specs(config), patience_s, rules.max_models)

    def status(self, monitor: DeviceMonitor) -> DeviceStatus:
        """The device at this moment."""
        metrics = monitor.latest(self.ref.device_id)
        return DeviceStatus(self.ref, metrics, self.lane.view(), tuple(self.servers.views()))

    def fits(self, model_ids: Iterable[str]) -> dict[str, DeviceFit]:
        """How each of these configured models fits on the device at this moment."""
        servers = self.servers
        views = {view.model_id: view for view in servers.views()}
        has_place = sum(view.is_active for view in views.values()) < self.lane.rules.max_models
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
        }
        return {model_id: device_fit(its) for model_id, its in facts.items()}


def lane_rules(config: NodeConfig, device_id: str) -> LaneRules:
    """The configuration's rules for the lane of that device."""
    own = next((device for device in config.devices if device.device_id == device_id), None)
    max_models = own.max_models if own is not None else None
    concurrent = own.concurrent_models if own is not None else None
    swap_aware = SwapAware(config.swap_fairness_s, config.min_residency_s)
    return LaneRules(
        max_pending=config.max_pending_requests_per_device,
        queue_timeout_s=config.queue_timeout_s,
        startup_timeout_s=config.llama_server_startup_timeout_s,
        abandoned_load_grace_s=config.abandoned_load_grace_s,
        max_models=config.max_models_per_device if max_models is None else max_models,
        concurrent_models=config.concurrent_models if concurrent is None else concurrent,
        queue_timeouts_s={
            model.model_id: model.queue_timeout_s for model in config.models if model.queue_timeout_s is not None
        },
        policy=FirstCome() if config.scheduling == "fifo" else swap_aware,
    )
