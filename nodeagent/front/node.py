"""The node's own paths: its inventory and queues, and what operators can do.

A path that changes something, or shows more than a client needs (events, logs), is for operators (`guard.py`). Web
pages other than the node's own may not use it: their requests are refused there, whatever their token. What servers
printed is in the inventory for operators only.
"""

import json
from typing import Any

import trio
from quart import Blueprint, Response, request

from nodeagent.access.gate import Account
from nodeagent.access.sums import account_json
from nodeagent.errors import BackendUnavailable, InvalidRequest, NoSuchDevice, OriginForbidden
from nodeagent.events import NodeEvent, Ring
from nodeagent.front import activity_routes, looks, upstream
from nodeagent.front.inference import Inference
from nodeagent.front.seam import Node, find_card
from nodeagent.front.streams import follows, stream_response
from nodeagent.front.whole_numbers import whole_number

# So that a client, and the proxies in between, see that the stream is alive.
_PING_S = 15.0
_LINES_MAX = 1000


def blueprint(node: Node, inference: Inference) -> Blueprint:
    """The routes under `/v1/node`, and the servers' own under `/upstream`."""
    routes = Blueprint("node", __name__)
    admin = Blueprint("admin", __name__)

    @admin.before_request
    async def refuse_pages() -> None:
        if looks.is_foreign_page(dict(request.scope["headers"])):
            raise OriginForbidden(request.headers["Origin"])

    @routes.get("/v1/node/inventory")
    @routes.get("/v1/node/queue")
    async def look() -> Response:
        content = looks.look(node, request.path, dict(request.scope["headers"]))
        return Response(content, content_type="application/json")

    @routes.get("/v1/node/requests")
    async def requests() -> dict[str, Any]:
        return {"requests": inference.running.shown()}

    @admin.delete("/v1/node/requests/<int:number>")
    async def end_request(number: int) -> dict[str, Any]:
        return inference.running.cancel(number)

    @admin.get("/v1/node/events")
    async def events() -> Response:
        last_seen = whole_number("Last-Event-ID", request.headers.get("Last-Event-ID", request.args.get("after", "0")))
        follow = request.args.get("follow", "true") not in ("false", "0", "no")
        return stream_response(_EventStream(node.events, last_seen, follow=follow), "text/event-stream")

    @admin.get("/v1/node/devices/<device_id>/logs")
    async def logs(device_id: str) -> Response:
        ring, wanted = node.log_of(device_id), _lines_wanted()
        if follows():
            return stream_response(_LineStream(ring, wanted), "text/plain; charset=utf-8")
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

    @admin.get("/v1/node/keys")
    async def keys() -> dict[str, Any]:
        return {"keys": [_account_json(account) for account in node.gate.accounts]}

    @admin.post("/v1/node/register")
    async def register() -> dict[str, Any]:
        return {"registering": node.register()}

    activity_routes.add_routes(admin, inference.tallies.activity)
    upstream.add_routes(admin, node, inference)
    routes.register_blueprint(admin)
    return routes


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
    return min(whole_number("lines", request.args.get("lines", str(_LINES_MAX))), _LINES_MAX)


def _last(ring: Ring[str], wanted: int) -> list[str]:
    return ring.after(max(0, ring.last - wanted)).items if wanted else []


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


def _account_json(account: Account) -> dict[str, Any]:
    return {**account_json(account.entry, account.sums), "in_flight": account.meter.in_flight}


def _state_json(node: Node) -> dict[str, Any]:
    state = node.state()
    return {"status": state.status.value, "reasons": list(state.reasons)}
