"""What may be looked at without being an operator: the inventory and the queue.

The page and others ask for these again and again, so the fast road serves them too (`fast_road.py`).
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from nodeagent.front.guard import given_key
from nodeagent.front.header_text import text_of
from nodeagent.front.origins import is_own_page
from nodeagent.front.seam import Node
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.lane import Lane

Headers = Mapping[bytes, bytes]


def look(node: Node, path: str, headers: Headers) -> bytes:
    """The JSON at one of `PATHS`, for a request with these headers (lower case)."""
    return PATHS[path](node, headers)


def is_operator(node: Node, headers: Headers) -> bool:
    """Whether a request with these headers is an operator's and comes from no web page but the node's own."""
    return not is_foreign_page(headers) and node.gate.is_operator(given_key(headers))


def is_foreign_page(headers: Headers) -> bool:
    """Whether a request with these headers comes from a web page other than the node's own."""
    origin, host, site = (headers.get(name) for name in (b"origin", b"host", b"sec-fetch-site"))
    if origin is None:
        return False
    return not is_own_page(origin.decode("latin-1"), host=text_of(host), fetch_site=text_of(site))


def _inventory(node: Node, headers: Headers) -> bytes:
    return node.inventory_json(for_operators=is_operator(node, headers))


def _queue(node: Node, _headers: Headers) -> bytes:
    return json.dumps({"lanes": [_lane_json(lane) for lane in node.scheduler.device_lanes]}).encode()


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


PATHS: Final = {"/v1/node/inventory": _inventory, "/v1/node/queue": _queue}
