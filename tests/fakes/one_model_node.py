"""What the front needs of a node with one model, `a`, on one device, and the ways into its inference."""

from typing import Any, cast

import trio

from fakes.gates import open_gate
from fakes.upstream import UpstreamServers
from nodeagent.access.gate import Gate
from nodeagent.front.app import create_app
from nodeagent.front.asgi import Front
from nodeagent.front.fast_road import FastRoad
from nodeagent.front.inference import Inference
from nodeagent.front.seam import ModelCard, Node
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.scheduler import Scheduler


class OneModelNode:
    """A node over these servers, whose loads take no time. `front` and `options` are what `serve` takes, for either
    road."""

    node_id = "box-a"
    max_request_bytes = 2**20
    default_model_id = "a"
    stream_ping_s = 15.0
    allow_remote_media = False
    cors_origins = ()
    host_names = {"n"}

    def __init__(
        self, servers: UpstreamServers, *, road: str = "fast", max_pending: int = 4, gate: Gate | None = None
    ) -> None:
        self.gate = gate or open_gate()
        self.servers = servers
        rules = LaneRules(max_pending=max_pending, queue_timeout_s=100, startup_timeout_s=30)
        self.lane: Lane[Upstream] = Lane("cpu:0", servers, rules)
        self.scheduler = Scheduler({"cpu:0": self.lane}, {"cpu:0": servers})
        servers.fake.on_change = self.lane.nudge
        servers.fake.load_s = 0.0
        node, inference = cast(Node, self), Inference(self.scheduler)
        self.front = Front(create_app(node, inference), max_request_bytes=self.max_request_bytes, node_id=self.node_id)
        self.options: dict[str, Any] = {}
        if road == "fast":
            self.options["find_handler"] = FastRoad(node, self.front, inference).find_handler

    def cards(self) -> list[ModelCard]:
        return [ModelCard("a", (), 0)]

    async def start(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.lane.run, name="lane")

    def held(self) -> tuple[int, int, int]:
        """The requests that are admitted, those that a server works on, and the bytes of bodies that are kept."""
        return self.scheduler.admitted, self.servers.in_flight, self.front.body_bytes_held


def chat(*, stream: bool = True, close: bool = True) -> bytes:
    """A request for a chat, as a client sends it."""
    body = b'{"model": "a", "messages": [{"role": "user", "content": "hello"}], "stream": %s}'
    body %= b"true" if stream else b"false"
    last = b"Connection: close\r\n" if close else b""
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), last, body)
