"""`GET /metrics`: the node in figures, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/

Labels have closed sets of values: devices, configured models, states, and the reasons of the tables in the READMEs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from quart import Blueprint, Response, request

from nodeagent.front.seam import Node
from nodeagent.front.server_figures import COUNTERS, ServerFigures
from nodeagent.front.tallies import Tallies
from nodeagent.histogram import Histogram
from nodeagent.scheduling.seam import ServerState
from nodeagent.status import DeviceStatus, NodeSnapshot, NodeStatus

_PREFIX: Final = "nodeagent"
# Of a device, what its last reading says; unknown values have no sample.
_READINGS: Final = {
    "memory_total_bytes": "Memory of the device.",
    "memory_used_bytes": "Memory in use on the device, by whatever program.",
    "utilization_ratio": "Share of the time in which the device was busy.",
    "temperature_celsius": "Temperature of the device.",
    "power_watts": "Power that the device draws.",
}


def blueprint(node: Node, tallies: Tallies, figures: ServerFigures) -> Blueprint:
    """The route `/metrics`."""
    routes = Blueprint("metrics", __name__)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_NodeCollector(node, tallies, figures))

    @routes.get("/metrics")
    async def metrics() -> Response:
        await figures.refresh()
        encode, content_type = _encoder(request.headers.get("Accept", ""))
        return Response(encode(registry), content_type=content_type)

    return routes


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """The format that the client takes, and its type; the plain one if it names a version that is no number, which
    prometheus_client raises for."""
    try:
        return choose_encoder(accept)
    except TypeError:
        return choose_encoder("")


class _NodeCollector(Collector):
    """Reads the node when it is asked."""

    def __init__(self, node: Node, tallies: Tallies, figures: ServerFigures) -> None:
        self._node = node
        self._tallies = tallies
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        """Every metric as it is now."""
        node = self._node.snapshot()
        yield from _of_node(node)
        yield from _of_lanes(node.devices)
        yield from _of_readings(node.devices)
        yield from _of_servers(node.devices, self._node.backend_exits)
        loads = HistogramMetricFamily(
            f"{_PREFIX}_backend_load_seconds",
            "From the spawn of a server to its readiness.",
            labels=["device", "model"],
        )
        for labels, histogram in self._node.backend_load_s.items():
            _add_histogram(loads, [*labels], histogram)
        yield loads
        yield from _of_dispatcher(self._node.dispatcher_state)
        connections = GaugeMetricFamily(
            f"{_PREFIX}_connections", "Connections of clients, by whether they serve a request.", labels=["state"]
        )
        for state, count in self._node.connections.items():
            connections.add_metric([state], count)
        yield connections
        lag = HistogramMetricFamily(
            f"{_PREFIX}_event_loop_lag_seconds", "How late the agent's event loop was, five times a second."
        )
        _add_histogram(lag, [], self._node.loop_lag_s)
        yield lag
        yield from self._of_caches()
        yield from self._of_counters()
        yield from self._of_requests()

    def _of_caches(self) -> Iterator[Metric]:
        text = "Share of the KV cache that requests in progress fill"
        on_node, of_servers = self._figures.cache_use()
        whole = GaugeMetricFamily(f"{_PREFIX}_kv_cache_usage_ratio", f"{text}, of all servers together.")
        whole.add_metric([], on_node)
        yield whole
        each = GaugeMetricFamily(
            f"{_PREFIX}_backend_kv_cache_usage_ratio", f"{text}, of a server.", labels=["device", "model"]
        )
        for labels, ratio in of_servers.items():
            each.add_metric(labels, ratio)
        yield each

    def _of_counters(self) -> Iterator[Metric]:
        for name, theirs in COUNTERS.items():
            family = CounterMetricFamily(
                f"{_PREFIX}_backend_{name}",
                f"What llama-server counts as {theirs}, summed up over the restarts of a model's server.",
                labels=["device", "model"],
            )
            for labels, sums in self._figures.counters.items():
                family.add_metric(labels, sums[name])
            yield family

    def _of_requests(self) -> Iterator[Metric]:
        tallies, sums = self._tallies, self._tallies.settled
        requests = CounterMetricFamily(
            f"{_PREFIX}_requests",
            "Requests for inference that have ended, by status and by why they were not answered completely.",
            labels=["model", "code", "reason"],
        )
        for (model_id, status, reason), count in sums.requests.items():
            requests.add_metric([model_id, str(status), reason], count)
        yield requests
        for name, text, histograms in (
            ("request_duration_seconds", "From the admission of a request to its end.", sums.duration_s),
            ("time_to_first_token_seconds", "From its admission to its first bytes.", tallies.first_token_s),
            ("time_per_output_token_seconds", "Mean time per generated token of a request.", sums.per_token_s),
            ("queue_wait_seconds", "Its wait for a turn, the load of its model not counted.", tallies.queue_wait_s),
        ):
            yield _histograms(name, text, histograms)
        for name, text, counts in (
            ("prompt_tokens", "Tokens of prompts that were processed.", sums.prompt_tokens),
            ("cached_prompt_tokens", "Tokens of prompts that were in a server's cache.", sums.cached_tokens),
            ("generation_tokens", "Tokens that were generated.", sums.generated_tokens),
        ):
            family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=["model"])
            for model_id, count in counts.items():
                family.add_metric([model_id], count)
            yield family


def _of_node(node: NodeSnapshot) -> Iterator[Metric]:
    lanes = [device.lane for device in node.devices]
    for name, text, count in (
        ("running", "in flight", sum(lane.in_flight for lane in lanes)),
        ("waiting", "queued", sum(lane.waiting for lane in lanes)),
    ):
        family = GaugeMetricFamily(f"{_PREFIX}_num_requests_{name}", f"Requests {text} on the whole node.")
        family.add_metric([], count)
        yield family
    status = GaugeMetricFamily(f"{_PREFIX}_status", "1 for the status that the node has.", labels=["status"])
    for one in NodeStatus:
        status.add_metric([one.value], float(one is node.state.status))
    yield status
    build = InfoMetricFamily(f"{_PREFIX}_build", "The agent's version.")
    build.add_metric([], {"version": node.agent_version})
    yield build


def _of_dispatcher(state: tuple[bool, float | None] | None) -> Iterator[Metric]:
    up = GaugeMetricFamily(f"{_PREFIX}_dispatcher_up", "Whether the dispatcher knows this node, if there is one.")
    age = GaugeMetricFamily(f"{_PREFIX}_heartbeat_age_seconds", "Since the dispatcher last accepted a call.")
    if state is not None:
        registered, age_s = state
        up.add_metric([], float(registered))
        if age_s is not None:
            age.add_metric([], age_s)
    yield up
    yield age


def _of_lanes(devices: Iterable[DeviceStatus]) -> Iterator[Metric]:
    for name, key, text in (
        ("requests_running", "in_flight", "Requests in flight."),
        ("requests_waiting", "waiting", "Queued requests."),
        ("requests_limit", "limit", "How many requests may be in flight and queued."),
        ("estimated_wait_seconds", "estimated_wait_s", "When a request that arrives now would start."),
    ):
        family = GaugeMetricFamily(f"{_PREFIX}_device_{name}", text, labels=["device"])
        for device in devices:
            family.add_metric([device.ref.device_id], getattr(device.lane, key))
        yield family


def _of_readings(devices: Iterable[DeviceStatus]) -> Iterator[Metric]:
    for name, text in _READINGS.items():
        family = GaugeMetricFamily(f"{_PREFIX}_device_{name}", text, labels=["device"])
        for device in devices:
            value = None if device.metrics is None else getattr(device.metrics, name)
            if value is not None:
                family.add_metric([device.ref.device_id], value)
        yield family


def _of_servers(devices: Iterable[DeviceStatus], exits: Mapping[tuple[str, str, str], int]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        f"{_PREFIX}_backend_state",
        "1 for the state of a model's server on a device; no samples where it has none.",
        labels=["device", "model", "state"],
    )
    for device in devices:
        for server in device.servers:
            for state in ServerState:
                labels = [device.ref.device_id, server.model_id, state.value]
                states.add_metric(labels, float(state is server.state))
    yield states
    ends = CounterMetricFamily(
        f"{_PREFIX}_backend_exits", "Servers that have ended, by why.", labels=["device", "model", "reason"]
    )
    for labels_of, count in exits.items():
        ends.add_metric(list(labels_of), count)
    yield ends


def _histograms(name: str, text: str, histograms: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"{_PREFIX}_{name}", text, labels=["model"])
    for model_id, histogram in histograms.items():
        _add_histogram(family, [model_id], histogram)
    return family


def _add_histogram(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    buckets, total = [], 0
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric(labels, buckets, histogram.sum)
