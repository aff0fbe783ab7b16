"""No spelling of a path leads past the keys, on either road: the whole front, over connections without addresses."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from fakes.one_model_node import OneModelNode
from fakes.pair_serving import PairListener, start_pair_serving
from fakes.upstream import UpstreamServers
from nodeagent.access.gate import Gate
from nodeagent.config import ApiKeyConfig
from nodeagent.config.api_keys import digest_of
from nodeagent.front.app import create_app
from nodeagent.front.guard import role_for
from nodeagent.front.seam import Node

KEYS = [
    ApiKeyConfig(name="all", sha256=digest_of("all")),
    ApiKeyConfig(name="scraper", sha256=digest_of("scraper"), roles=("metrics",)),
]
OTHER = {"inference": "scraper", "metrics": "all", "admin": "all"}

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": lambda path: path,
    "slash at the end": lambda path: path + "/",
    "double slashes": lambda path: path.replace("/", "//"),
    "one letter escaped": lambda path: path[:-1] + f"%{ord(path[-1]):02x}",
    "slashes escaped": lambda path: "/" + path[1:].replace("/", "%2F"),
    "all escaped": lambda path: "/" + "".join(f"%{ord(letter):02X}" for letter in path[1:]),
    "escaped twice": lambda path: path[:-1] + f"%25{ord(path[-1]):02x}",
    "with its host": lambda path: "http://n" + path,
    "capitals": str.upper,
    "a dot": lambda path: "/." + path,
    "two dots": lambda path: "/livez/.." + path,
    "two dots escaped": lambda path: "/livez/%2e%2e" + path,
    "below what is open": lambda path: "/page/.." + path,
    "a parameter": lambda path: path + ";a=b",
    "an open path behind a question mark": lambda path: path + "?/livez",
    "a line break at the end": lambda path: path + "%0a",
    "an open path behind a line break": lambda path: path + "%0d%0a/livez",
    "a null at the end": lambda path: path + "%00",
    "a fragment": lambda path: path + "#/livez",
    "backslashes": lambda path: "/" + path[1:].replace("/", "%5C"),
}


def protected(node: OneModelNode) -> Iterator[tuple[str, str]]:
    """The method and the path of each route that needs a key."""
    for rule in create_app(cast(Node, node)).url_map.iter_rules():
        path = re.sub("<[^>]*>", "a", rule.rule)
        for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}:
            if role_for(method, path) is not None:
                yield method, path


async def status_of(listener: PairListener, method: str, target: str, key: str | None) -> int:
    authorization = "" if key is None else f"Authorization: Bearer {key}\r\n"
    head = f"{method} {target} HTTP/1.1\r\nHost: n\r\nConnection: close\r\nContent-Length: 2\r\n{authorization}\r\n"
    async with listener.connect() as client:
        await client.send(head.encode() + b"{}")
        answer = await client.rest()
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=list(SPELLINGS))
async def test_no_spelling_of_a_path_opens_it_without_a_key_or_to_one_of_another_role(
    spell: Callable[[str], str], nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    gate = Gate("token", Path("/nonexistent"), {key.sha256 or "": key for key in KEYS})
    node = OneModelNode(UpstreamServers(nursery), gate=gate)
    await node.start(nursery)
    listener = await start_pair_serving(nursery, node)
    tried = 0
    for method, path in protected(node):
        role = role_for(method, path)
        assert role is not None
        target = spell(path)
        status = await status_of(listener, method, target, None)
        # What is no target any more is refused before its key is looked at, and below /page there is nothing else.
        assert status in (400, 401, 404), (method, target)
        assert await status_of(listener, method, target, OTHER[role]) in (400, 403, 404, 405), (method, target)
        tried += 1
    assert tried > 30
    assert node.servers.sent == []
    assert node.held() == (0, 0, 0)
    nursery.cancel_scope.cancel()
