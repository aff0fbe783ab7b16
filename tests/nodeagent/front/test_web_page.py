"""The page's files, and how they are served; `tests/endtoend/test_page.py` has a browser use them."""

import re
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, cast

import pytest
from trio.testing import MockClock

from fakes.asgi import Exchange
from nodeagent.front.app import create_app
from nodeagent.front.seam import ModelCard, Node
from nodeagent.front.web_page import CONTENT_SECURITY_POLICY, FOLDER

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir()) if path.is_file()}
SCRIPTS = [name for name in TEXTS if name.endswith(".js")]
BROWSERS = (b"accept", b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8")
HOST = (b"host", b"127.0.0.1:8081")


class BareNode:
    node_id = "box-a"
    max_request_bytes = 1000
    scheduler: Any = SimpleNamespace(lanes={})
    admin_token = "token"
    cors_origins = ()
    host_names = ("box",)

    def __init__(self, *, has_page: bool = True) -> None:
        self.has_page = has_page

    def cards(self) -> list[ModelCard]:
        return []


async def got(
    path: str, *headers: tuple[bytes, bytes], method: str = "GET", node: BareNode | None = None
) -> tuple[Exchange, str]:
    exchange = Exchange(HOST, *headers, method=method, path=path)
    await exchange.through(create_app(cast(Node, node or BareNode())))
    return exchange, b"".join(message.get("body", b"") for message in exchange.sent[1:]).decode()


async def test_a_browser_gets_the_page_with_a_strict_policy(autojump_clock: MockClock) -> None:
    exchange, content = await got("/", BROWSERS)
    assert exchange.sent[0]["status"] == 200
    assert content == TEXTS["index.html"]
    headers = exchange.headers
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'" in CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"
    assert headers["vary"] == "Accept"


@pytest.mark.parametrize("accept", [(), ((b"accept", b"*/*"),), ((b"accept", b"application/json"),)])
async def test_another_client_is_told_where_the_paths_are(
    accept: tuple[tuple[bytes, bytes], ...], autojump_clock: MockClock
) -> None:
    exchange, _content = await got("/", *accept)
    assert exchange.error() == (404, "not_found")
    assert "OpenAI's API is under /v1/" in exchange.content["error"]["message"]


@pytest.mark.parametrize("name", TEXTS)
async def test_each_file_is_served_with_its_type_and_the_policy(name: str, autojump_clock: MockClock) -> None:
    exchange, content = await got(f"/page/{name}")
    assert (exchange.sent[0]["status"], content) == (200, TEXTS[name])
    kinds = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    assert exchange.headers["content-type"].split(";")[0] == kinds[PurePath(name).suffix]
    assert exchange.headers["content-security-policy"] == CONTENT_SECURITY_POLICY


async def test_a_browser_that_has_a_file_is_not_sent_it_again(autojump_clock: MockClock) -> None:
    first, _content = await got("/page/main.js")
    tag = first.headers["etag"].encode()
    for known in (tag, b"W/" + tag, b'"other", ' + tag):
        again, content = await got("/page/main.js", (b"if-none-match", known))
        assert (again.sent[0]["status"], content) == (304, "")
        assert again.headers["etag"].encode() == tag
        assert "content-type" not in again.headers
    other, content = await got("/page/style.css", (b"if-none-match", tag))
    assert other.sent[0]["status"] == 200
    assert content


@pytest.mark.parametrize(
    "path", ["/page/nothing.js", "/page/../web_page.py", "/page/..%2fweb_page.py", "/page//etc/passwd"]
)
async def test_there_is_nothing_but_the_pages_files(path: str, autojump_clock: MockClock) -> None:
    exchange, _content = await got(path, BROWSERS)
    assert exchange.error() == (404, "not_found")


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
async def test_the_page_can_be_turned_off(path: str, autojump_clock: MockClock) -> None:
    exchange, _content = await got(path, BROWSERS, node=BareNode(has_page=False))
    assert exchange.error() == (404, "not_found")


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
async def test_the_page_is_not_served_under_a_foreign_name(path: str, autojump_clock: MockClock) -> None:
    exchange = Exchange((b"host", b"evil.example:8081"), BROWSERS, method="GET", path=path)
    await exchange.through(create_app(cast(Node, BareNode())))
    assert exchange.error() == (403, "host_forbidden")


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_turns_text_into_html_or_code(name: str) -> None:
    text = TEXTS[name]
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "Function("):
        assert word not in text
    assert "createContextualFragment" not in text
    assert "srcdoc" not in text
    assert not re.search(r"setTimeout\(\s*[\"'`]", text)


def test_the_document_has_no_script_style_or_listener_in_it() -> None:
    text = TEXTS["index.html"]
    assert re.findall(r"<script[^>]*>", text) == ['<script type="module" src="/page/main.js">']
    assert "</script>" in text
    assert "<style" not in text
    assert not re.search(r"\s(on\w+|style)=", text)


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    text = TEXTS[name]
    addresses = set(re.findall(r"\w+://[^\s\"'`)>]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert "@import" not in text
    assert "url(" not in text


def test_each_file_that_is_named_is_there_and_used() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(r"(?:from \"\./|/page/)([\w.]+)\"", text)}
    assert named | {"index.html"} == set(TEXTS)
