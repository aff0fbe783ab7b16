"""The node's own paths: its inventory and queues, and what operators can do.

A path that changes something, or shows more than a client needs (events, logs), requires the admin token. Web pages
may not use it: a request with an Origin is refused there, whatever its token. The inventory is for everybody, but what
servers printed is in it for operators only.
"""

import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

import trio
from quart import Blueprint, Response, request

from nodeagent.errors import BackendUnavailable, InvalidRequest, NoSuchDevice, OriginForbidden, Unauthorized
from nodeagent.events import NodeEvent, Ring
from nodeagent.front.seam import Node, find_card
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.lane import Lane

# So that a client, and the proxies in between, see that the stream is alive.
_PING_S = 15.0
_LINES_MAX = 1000


def blueprint(node: Node) -> Blueprint:
    """The routes under `/v1/node`."""
    routes = Blueprint("node", __name__)
    admin = Blueprint("admin", __name__)

    @admin.before_request
    async def authenticate() -> None:
        _authenticate(node.admin_token)

    @routes.get("/v1/node/inventory")
    async def inventory() -> Response:
        content = node.inventory_json(for_operators=_is_operator(node.admin_token))
        return Response(content, content_type="application/json")

    @routes.get("/v1/node/queue")
    async def queue() -> dict[str, Any]:
        # Requests for models that span devices are in the queue of the first of them.
        lanes = [lane for lane in node.scheduler.lanes.values() if len(lane.device_ids) == 1]
        return {"lanes": [_lane_json(lane) for lane in lanes]}

    @admin.get("/v1/node/events")
    async def events() -> Response:
        last_seen = request.headers.get("Last-Event-ID", request.args.get("after", "0"))
        if not last_seen.isdecimal():
            raise InvalidRequest(f"'Last-Event-ID' must be a number, not {last_seen[:40]!r}.", param="Last-Event-ID")
        follow = request.args.get("follow", "true") not in ("false", "0", "no")
        return _stream(_EventStream(node.events, int(last_seen), follow=follow), "text/event-stream")

    @admin.get("/v1/node/devices/<device_id>/logs")
    async def logs(device_id: str) -> Response:
        ring, wanted = node.log_of(device_id), _lines_wanted()
        if request.args.get("follow", "") in ("true", "1", "yes"):
            return _stream(_LineStream(ring, wanted), "text/plain; charset=utf-8")
        text = "".join(f"{line}\n" for line in _last(ring, wanted))
        return Response(text, content_type="text/plain; charset=utf-8")

    @admin.post("/v1/node/models/<path:model>/load")
    async def load(model: str) -> tuple[dict[str, Any], int]:
        fields = await _fields({"device_id": str, "wait": bool})
        model_id, device_id = find_card(node, model).model_id, fields.get("device_id")
        if device_id is not None and device_id not in node.scheduler.lanes:
            raise NoSuchDevice(device_id, list(node.scheduler.lanes))
        if fields.get("wait", True):
            return {"model_id": model_id, "device_id": await _load(node, model_id, device_id), "state": "ready"}, 200
        node.load_soon(model_id, device_id)
        return {"model_id": model_id, "device_id": device_id, "state": "starting"}, 202

    @admin.post("/v1/node/models/<path:model>/unload")
    async def unload(model: str) -> dict[str, Any]:
        fields = await _fields({"force": bool})
        model_id = find_card(node, model).model_id
        return {"model_id": model_id, "unloaded_from": await node.unload(model_id, force=fields.get("force", False))}

    @admin.post("/v1/node/models/<path:model>/restart")
    async def restart(model: str) -> dict[str, Any]:
        fields = await _fields({"force": bool})
        model_id = find_card(node, model).model_id
        devices = await node.unload(model_id, force=fields.get("force", False))
        return {"model_id": model_id, "restarted_on": [await _load(node, model_id, device) for device in devices]}

    @admin.post("/v1/node/drain")
    async def drain() -> dict[str, Any]:
        node.drain()
        return _state_json(node)

    @admin.post("/v1/node/undrain")
    async def undrain() -> dict[str, Any]:
        node.undrain()
        return _state_json(node)

    @admin.post("/v1/node/reload")
    async def reload() -> dict[str, Any]:
        what = await node.reload()
        return {
            "added": list(what.added),
            "changed": list(what.changed),
            "removed": list(what.removed),
            "needs_restart": list(what.needs_restart),
        }

    @admin.post("/v1/node/register")
    async def register() -> dict[str, Any]:
        return {"registering": node.register()}

    routes.register_blueprint(admin)
    return routes


def _authenticate(token: str) -> None:
    origin = request.headers.get("Origin")
    if origin is not None:
        raise OriginForbidden(origin)
    if request.method != "OPTIONS" and not _is_operator(token):
        raise Unauthorized


def _is_operator(token: str) -> bool:
    """Whether the request has the admin token and comes from no web page."""
    given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
    return "Origin" not in request.headers and hmac.compare_digest(given, f"Bearer {token}".encode())


async def _load(node: Node, model_id: str, device_id: str | None) -> str:
    """See `Node.load`; a failure is told with what the server printed, since operators may see its log too."""
    try:
        return await node.load(model_id, device_id)
    except BackendUnavailable as error:
        raise error.for_operators() from error


async def _fields(kinds: dict[str, type]) -> dict[str, Any]:
    """The body's fields, all of them optional; null counts as missing."""
    body = await request.get_data(cache=False)
    try:
        given = json.loads(body or b"{}")
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(given, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    for name, value in given.items():
        if name not in kinds:
            raise InvalidRequest(
                f"{name!r} is not a field of this request. It may have: {', '.join(kinds)}.", param=name
            )
        if value is not None and not isinstance(value, kinds[name]):
            wanted = "true or false" if kinds[name] is bool else "a string"
            raise InvalidRequest(f"{name!r} must be {wanted}, not {json.dumps(value)[:40]}.", param=name)
    return {name: value for name, value in given.items() if value is not None}


def _lines_wanted() -> int:
    text = request.args.get("lines", str(_LINES_MAX))
    if not text.isdecimal():
        raise InvalidRequest(f"'lines' must be a number, not {text[:40]!r}.", param="lines")
    return min(int(text), _LINES_MAX)


def _last(ring: Ring[str], wanted: int) -> list[str]:
    return ring.after(max(0, ring.last - wanted)).items if wanted else []


def _stream(source: AsyncIterator[bytes], content_type: str) -> Response:
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
    return Response(source, content_type=content_type, headers=headers)


class _EventStream:
    """The events after a given number as server-sent events: without end, or with `follow=False` those so far."""

    def __init__(self, ring: Ring[NodeEvent], last_seen: int, *, follow: bool = True) -> None:
        self._ring = ring
        self._seen = last_seen
        self._follow = follow
        self._begun = False

    def __aiter__(self) -> "_EventStream":
        return self

    async def __anext__(self) -> bytes:
        page = self._ring.after(self._seen)
        if self._begun and not self._follow:
            raise StopAsyncIteration
        if not page.items and not self._begun:
            self._begun = True
            return b": nothing yet\n\n"  # the response head is sent with the first bytes
        if not page.items:
            with trio.move_on_after(_PING_S):
                await self._ring.more_than(page.last)
            page = self._ring.after(page.last)
        self._begun, self._seen = True, page.last
        if not page.items:
            return b": ping\n\n"
        first = page.last - len(page.items) + 1
        gap = [f"event: missed\ndata: {page.missed}\n\n"] if page.missed else []
        events = [
            f"id: {number}\nevent: {event.kind}\ndata: {json.dumps(event.as_json())}\n\n"
            for number, event in enumerate(page.items, first)
        ]
        return "".join(gap + events).encode()


class _LineStream:
    """The last lines of a log and all that follow, without end."""

    def __init__(self, ring: Ring[str], wanted: int) -> None:
        self._ring = ring
        self._seen = max(0, ring.last - wanted)

    def __aiter__(self) -> "_LineStream":
        return self

    async def __anext__(self) -> bytes:
        await self._ring.more_than(self._seen)
        page = self._ring.after(self._seen)
        self._seen = page.last
        missed = [f"[{page.missed} lines missed]"] if page.missed else []
        return "".join(f"{line}\n" for line in (*missed, *page.items)).encode()


def _lane_json(lane: Lane[Upstream]) -> dict[str, Any]:
    view = lane.view()
    return {
        "device_id": lane.device_id,
        "in_flight": view.in_flight,
        "waiting": view.waiting,
        "limit": view.limit,
        "estimated_wait_s": round(view.estimated_wait_s, 3),
        "held_for": lane.held_for,
        "tickets": [
            {
                "request_id": ticket.request_id,
                "model_id": ticket.model_id,
                "state": ticket.state,
                "priority": ticket.priority.name.lower(),
                "age_s": round(ticket.age_s, 3),
                "position": ticket.position,
                "starts_in_s": None if ticket.starts_in_s is None else round(ticket.starts_in_s, 3),
            }
            for ticket in lane.queue()
        ],
    }


def _state_json(node: Node) -> dict[str, Any]:
    state = node.state()
    return {"status": state.status.value, "reasons": list(state.reasons)}
