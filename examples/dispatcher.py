#!/usr/bin/env python3
"""A small dispatcher: nodes register with it and send heartbeats; it keeps a table of them.

    python examples/dispatcher.py --port 9000
    # in a node's configuration:  dispatcher_base_url: http://127.0.0.1:9000
    curl http://127.0.0.1:9000/nodes

It shows the dispatcher's side of the protocol, and only that. It keeps everything in memory: after a restart of the
dispatcher every node registers again with its next heartbeat.
"""

import argparse
import hmac
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import request
from quart_trio import QuartTrio

INTERVAL_S = 5.0
# A node that missed this many heartbeats is late.
MISSED = 3


@dataclass
class Node:
    """A node: its registration, its last heartbeat, and when that arrived (monotonic seconds)."""

    registered: dict[str, Any]
    last_heard_at: float = field(default_factory=time.monotonic)
    heartbeat: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        silent_s = time.monotonic() - self.last_heard_at
        return {
            "base_url": self.registered["base_url"],
            "status": "late" if silent_s > MISSED * INTERVAL_S else self.heartbeat.get("status", "registered"),
            "silent_s": round(silent_s, 1),
            "devices": [device["device_id"] for device in self.registered["devices"]],
            "models": {
                model["model_id"]: model["loaded_on"] or "not loaded" for model in self.heartbeat.get("models", [])
            },
        }


def create_app(token: str | None) -> QuartTrio:
    """The dispatcher as an application; if `token` is set, every request needs it."""
    app = QuartTrio(__name__)
    nodes: dict[str, Node] = {}

    @app.before_request
    async def authenticate() -> tuple[str, int] | None:
        given = request.headers.get("Authorization", "")
        if token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return None
        return "unknown token\n", 401

    @app.post("/v1/nodes/register")
    async def register() -> tuple[dict[str, float], int]:
        registration = await request.get_json(force=True)
        nodes[registration["node_id"]] = Node(registration)
        print(f"{registration['node_id']} registered: {registration['base_url']}", flush=True)
        return {"heartbeat_interval_s": INTERVAL_S}, 200

    @app.post("/v1/nodes/heartbeat")
    async def heartbeat() -> tuple[dict[str, Any], int]:
        beat = await request.get_json(force=True)
        node = nodes.get(beat["node_id"])
        if node is None:
            return {"error": "register first"}, 404
        if beat["incarnation"] != node.registered["incarnation"]:
            return {"error": "a newer incarnation is registered"}, 409
        if beat["sequence"] > node.heartbeat.get("sequence", 0):
            if beat["status"] != node.heartbeat.get("status"):
                print(f"{beat['node_id']} is {beat['status']} {'; '.join(beat['reasons'])}".rstrip(), flush=True)
            node.heartbeat, node.last_heard_at = beat, time.monotonic()
        return {}, 200

    @app.get("/nodes")
    async def show() -> dict[str, Any]:
        return {node_id: node.as_json() for node_id, node in nodes.items()}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--token-file", type=Path, help="file with a token that every request needs")
    args = parser.parse_args()
    token = args.token_file.read_text().strip() if args.token_file else None
    config = Config()
    config.bind = [f"{args.host}:{args.port}"]
    try:
        trio.run(serve, create_app(token), config)
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
