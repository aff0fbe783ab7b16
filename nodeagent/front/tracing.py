"""Traces by OpenTelemetry, of the extra `otel`: a span for each request for inference that has ended, and in it what it
took to wait for its turn (`queue`), for its model (`load`) and for its server (`upstream`).

The attributes are those of the semantic conventions for generative AI, and of HTTP. They hold no texts. Spans are sent
by OTLP over HTTP, in a thread; a collector that is away costs the requests nothing.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nodeagent.containment import REPEAT_S
from nodeagent.front.activity import Record

logger = logging.getLogger(__name__)

_SERVICE: Final = "rolemesh-node-agent"
_EXPORT_TIMEOUT_S: Final = 5.0
# The conventions' names of what a path asks for; what they have no name for goes by its path.
_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/completion": "text_completion",
    "/infill": "text_completion",
    "/api/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/embedding": "embeddings",
    "/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}
_PASSED_ON: Final = (b"traceparent", b"tracestate")
_NS: Final = 1_000_000_000
_COMPLAINT_MAX_CHARS: Final = 300


class Tracing:
    """Sends the spans of the requests that have `ended` to an endpoint (`http://host:4318`).

    Further settings are the SDK's: `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_RESOURCE_ATTRIBUTES` and so on. At most 2048
    spans wait to be sent; more are dropped.
    """

    def __init__(self, endpoint: str, *, node_id: str, version: str) -> None:
        _quieten()
        about = {"service.name": _SERVICE, "service.version": version, "service.instance.id": node_id}
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_SERVICE, version)

    def ended(self, record: Record, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Note the spans of a request; `headers` have the trace that it belongs to, if the client named one."""
        operation = _OPERATIONS.get(record.path, record.path)
        began_ns = int(record.began_at * _NS)
        ended_ns = began_ns + _ns(record.duration_ms)
        span = self._tracer.start_span(
            f"{operation} {record.model_id}" if record.model_id else operation,
            context=_context_of(headers),
            kind=SpanKind.SERVER,
            attributes=attributes_of(record, operation),
            start_time=began_ns,
        )
        if record.error is not None:
            failed = record.status >= 500 or record.error == "server_lost"
            span.set_status(Status(StatusCode.ERROR, record.error) if failed else Status(StatusCode.UNSET))
        within = set_span_in_context(span)
        at_ns = began_ns
        for name, took_ms in (("queue", record.queue_ms), ("load", record.load_ms)):
            if took_ms:
                until_ns = min(at_ns + _ns(took_ms), ended_ns)
                self._tracer.start_span(name, context=within, start_time=at_ns).end(until_ns)
                at_ns = until_ns
        if record.device_id is not None:
            kind = SpanKind.CLIENT
            self._tracer.start_span("upstream", context=within, kind=kind, start_time=at_ns).end(ended_ns)
        span.end(ended_ns)

    def close(self) -> None:
        """Send what is left. Blocks for seconds if the collector is away."""
        self._provider.shutdown()


class _Quiet(logging.Handler):
    """Logs what the SDK complains of at most once a minute: it does so with every batch that it can't send."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told_at = -REPEAT_S

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() - self._told_at >= REPEAT_S:
            self._told_at = time.monotonic()
            logger.warning("traces are not sent: %s", record.getMessage()[:_COMPLAINT_MAX_CHARS])


def _quieten() -> None:
    sdk = logging.getLogger("opentelemetry")
    sdk.propagate = False
    sdk.handlers[:] = [_Quiet()]


def attributes_of(record: Record, operation: str) -> dict[str, Any]:
    """The attributes of a request's span; what is unknown is left out."""
    first_token_s = None if record.first_token_ms is None else record.first_token_ms / 1000
    known = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "llama.cpp",
        "gen_ai.request.model": record.model_id,
        "gen_ai.request.stream": record.streamed,
        "gen_ai.response.time_to_first_chunk": first_token_s,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "error.type": record.error,
        "http.request.method": "POST",
        "http.response.status_code": record.status,
        "url.path": record.path,
        "user_agent.original": record.user_agent,
        "rolemesh.request.id": record.request_id,
        "rolemesh.device.id": record.device_id,
        "rolemesh.key.name": record.key_name,
    }
    return {name: value for name, value in known.items() if value is not None}


def _context_of(headers: Iterable[tuple[bytes, bytes]]) -> Context:
    carrier = {name.decode("ascii"): value.decode("latin-1") for name, value in headers if name in _PASSED_ON}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _ns(ms: float) -> int:
    return int(ms * 1_000_000)
