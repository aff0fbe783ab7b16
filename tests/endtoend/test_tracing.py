"""The spans of requests, received by a collector as an agent sends them."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from fakes.agent_process import AgentProcess, running_agent, write_config
from nodeagent.front.activity import Record
from nodeagent.front.tracing import Tracing

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
MS = 1_000_000


class Collector:
    """Keeps the spans that are posted to `url`, and the attributes of the resource that they are of."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                assert self.headers["content-encoding"] is None
                collector.keep(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def keep(self, content: bytes) -> None:
        for of_resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            self.resource = attributes(of_resource.resource)
            for scope in of_resource.scope_spans:
                self.spans += scope.spans

    def wait_for(self, count: int) -> dict[str, Span]:
        """The spans by name, once there are that many."""
        until = time.monotonic() + 10
        while len(self.spans) < count:
            assert time.monotonic() < until, self.spans
            time.sleep(0.02)
        return {span.name: span for span in self.spans}


def attributes(of: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()
    thread.join()


@pytest.fixture
def agent(collector: Collector, llama_server: Path, tiny_model: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    models = [{"model_id": "tiny", "path": str(tiny_model)}]
    config = write_config(tmp_path, llama_server, models, otlp_endpoint=collector.url)
    with running_agent(config, OTEL_BSP_SCHEDULE_DELAY="100", NO_PROXY="127.0.0.1") as agent:
        yield agent


def test_a_request_is_a_span_in_its_clients_trace_with_what_it_waited_for(
    agent: AgentProcess, collector: Collector
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 3, "stream": True}
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "user-agent": "tests/1"}
    url = f"{agent.base_url}/v1/chat/completions"
    assert httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False).status_code == 200
    spans = collector.wait_for(3)
    request, load, upstream = spans["chat tiny"], spans["load"], spans["upstream"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert (request.parent_span_id.hex(), request.kind) == (PARENT_ID, Span.SPAN_KIND_SERVER)
    assert (load.parent_span_id, upstream.parent_span_id) == (request.span_id, request.span_id)
    assert request.start_time_unix_nano <= load.start_time_unix_nano < load.end_time_unix_nano
    assert load.end_time_unix_nano == upstream.start_time_unix_nano
    assert upstream.end_time_unix_nano == request.end_time_unix_nano
    told = attributes(request)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llama.cpp",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": True,
        "gen_ai.usage.output_tokens": 3,
        "http.response.status_code": 200,
        "rolemesh.device.id": "cpu:0",
        "user_agent.original": "tests/1",
    }
    assert {name: told[name] for name in expected} == expected
    assert told["gen_ai.usage.input_tokens"] > 3
    assert "error.type" not in told
    assert "secret" not in str(collector.spans)
    assert (collector.resource["service.name"], collector.resource["service.instance.id"]) == (
        "rolemesh-node-agent",
        "test-node",
    )


def test_a_refusal_is_a_span_of_its_own_trace_and_is_sent_before_the_agent_ends(
    agent: AgentProcess, collector: Collector
) -> None:
    body = {"model": "none", "messages": []}
    assert httpx.post(f"{agent.base_url}/v1/chat/completions", json=body, trust_env=False).status_code == 404
    agent.process.terminate()
    assert agent.wait_exit() == 0
    [span] = collector.spans
    assert (span.name, span.parent_span_id) == ("chat", b"")
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert attributes(span)["error.type"] == "model_not_found"


def record(**fields: Any) -> Record:
    known: dict[str, Any] = {"id": 1, "request_id": "r1", "began_at": 1000.0, "path": "/v1/embeddings"}
    return Record(**{**known, "model_id": "a", "duration_ms": 100.0, "status": 200, **fields})


def test_spans_lie_within_their_request_and_a_failure_of_the_node_is_an_error(collector: Collector) -> None:
    tracing = Tracing(collector.url, node_id="box", version="1")
    took = {"queue_ms": 60.0, "load_ms": 70.0, "device_id": "gpu:0"}
    tracing.ended(record(**took, status=502, error="backend_crashed"), [(b"traceparent", b"\xff not one")])
    tracing.close()
    spans = collector.wait_for(4)
    request = spans["embeddings a"]
    began = 1000 * 10**9
    times = {name: (span.start_time_unix_nano - began, span.end_time_unix_nano - began) for name, span in spans.items()}
    assert times == {
        "embeddings a": (0, 100 * MS),
        "queue": (0, 60 * MS),
        "load": (60 * MS, 100 * MS),
        "upstream": (100 * MS, 100 * MS),
    }
    assert (request.status.code, request.status.message) == (Status.STATUS_CODE_ERROR, "backend_crashed")
    assert request.parent_span_id == b""


def test_a_collector_that_is_away_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    tracing = Tracing("http://127.0.0.1:9", node_id="box", version="1")
    tracing.ended(record(), [])
    tracing.close()
    tracing.ended(record(), [])
    [message] = caplog.messages
    assert message.startswith("traces are not sent: ")
    assert len(message) < 350
