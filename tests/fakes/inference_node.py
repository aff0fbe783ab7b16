"""One device in virtual time, whose servers answer by a script, and the `Inference` in front of it."""

from fakes.upstream import UpstreamServers
from nodeagent.front.answer import Answer
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.front.inference import Inference
from nodeagent.llama_server.relay import Upstream
from nodeagent.releases import Releases
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.scheduler import Scheduler

RULES = LaneRules(max_pending=4, queue_timeout_s=100, startup_timeout_s=30)
REQUEST = InferenceRequest(
    request_id="r1",
    model_id="a",
    path="/v1/chat/completions",
    headers=[(b"content-type", b"application/json")],
    body=b'{"model": "a"}',
)


class InferenceNode:
    """One device with its lane, and the `Inference` in front of it."""

    def __init__(self, servers: UpstreamServers) -> None:
        self.servers = servers
        self.lane: Lane[Upstream] = Lane("cpu:0", servers, RULES)
        self.scheduler = Scheduler({"cpu:0": self.lane}, {"cpu:0": servers})
        self.inference = Inference(self.scheduler)
        servers.fake.on_change = self.lane.nudge

    async def serve(self, request: InferenceRequest = REQUEST, chunks: list[bytes] | None = None) -> Answer:
        """Serve a request as a client that reads its whole answer; the answer's body goes into `chunks`."""
        with Releases() as stack:
            answer = await self.inference.serve(request, stack)
            async for chunk in answer.body:
                if chunks is not None:
                    chunks.append(chunk)
        return answer

    async def body(self, request: InferenceRequest = REQUEST) -> bytes:
        chunks: list[bytes] = []
        await self.serve(request, chunks)
        return b"".join(chunks)

    def assert_nothing_is_held(self) -> None:
        assert (self.scheduler.admitted, self.servers.in_flight) == (0, 0)
