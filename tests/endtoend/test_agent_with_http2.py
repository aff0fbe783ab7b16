"""The agent as a process, with clients that speak HTTP/2: the page, openai's client, curl, and one that leaves."""

import asyncio
import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
from h2.errors import ErrorCodes
from playwright.sync_api import expect, sync_playwright

from fakes.agent_process import AgentProcess, running_agent, seconds_to_idle, write_config
from fakes.http2_client import AUTHORITY, CERTIFICATE, POST, client_context, connected

HELLO: Any = [{"role": "user", "content": "hello there"}]
LONG = {"model": "slow", "messages": HELLO, "max_tokens": 100_000, "stream": True}
# As the other tests of clients that leave have it.
STREAM_S = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("http2")


@pytest.fixture(scope="module")
def agent(llama_server: Path, tiny_model: Path, slow_model: Path, folder: Path) -> Iterator[AgentProcess]:
    CERTIFICATE.private_key_pem.write_to_path(folder / "node.key")
    CERTIFICATE.cert_chain_pems[0].write_to_path(folder / "node.pem")
    AUTHORITY.cert_pem.write_to_path(folder / "ca.pem")
    files = {"tls_cert": str(folder / "node.pem"), "tls_key": str(folder / "node.key")}
    models: list[dict[str, Any]] = [
        {"model_id": "chat", "path": str(tiny_model)},
        {"model_id": "slow", "path": str(slow_model), "threads": 1},
    ]
    config = write_config(folder, llama_server, models, max_pending_requests_per_device=20, **files)
    with running_agent(config, SSL_CERT_FILE=str(folder / "ca.pem")) as agent:
        yield agent


def trusting() -> ssl.SSLContext:
    return client_context("h2", "http/1.1")


def test_streams_of_openais_client_share_a_connection(agent: AgentProcess) -> None:
    """Its asynchronous one: TLS of CPython is not made for the threads in which the other one would share it."""

    async def ask(client: openai.AsyncOpenAI) -> tuple[str, str | None]:
        async with client.chat.completions.with_streaming_response.create(
            model="chat", messages=HELLO, max_tokens=8, stream=True
        ) as response:
            chunks = [chunk async for chunk in await response.parse()]
            return response.http_response.http_version, chunks[-1].choices[0].finish_reason

    async def ask_at_once() -> list[tuple[str, str | None]]:
        http = openai.DefaultAsyncHttpxClient(http2=True, verify=trusting(), trust_env=False)
        url = f"{agent.base_url}/v1"
        async with http, openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http, max_retries=0) as client:
            found = await asyncio.gather(*[ask(client) for _ in range(8)])
            assert {model.id for model in (await client.models.list()).data} == {"chat", "slow"}
            return found

    found = asyncio.run(ask_at_once())
    assert {version for version, _reason in found} == {"HTTP/2"}
    assert [reason in ("length", "stop") for _version, reason in found] == [True] * 8


def test_curl_gets_a_stream(agent: AgentProcess, folder: Path) -> None:
    body = json.dumps({"model": "chat", "messages": HELLO, "max_tokens": 4, "stream": True})
    curl = ["curl", "-sSN", "--noproxy", "*", "--http2", "--cacert", str(folder / "ca.pem"), "-w", "%{http_version}"]
    curl += [f"{agent.base_url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    answer = subprocess.run(curl, capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.startswith("data: {")
    assert answer.endswith("data: [DONE]\n\n2")


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_client_that_leaves_frees_its_slot(how: str, agent: AgentProcess) -> None:
    fields = [(name, "/v1/chat/completions" if name == ":path" else value) for name, value in POST]
    with trio.fail_after(60):
        async with connected(int(agent.base_url.rpartition(":")[2])) as client:
            number = await client.request(fields, json.dumps(LONG).encode())
            await client.until(number, b'"content":')
            [server] = (child for child in agent.children() if "slow" in " ".join(child.cmdline()))
            if how == "reset":
                client.h2.reset_stream(number, ErrorCodes.CANCEL)
                await client.flush()
                assert seconds_to_idle(server, STREAM_S) is not None
    if how == "close":
        assert seconds_to_idle(server, STREAM_S) is not None


def test_the_page_holds_more_streams_than_http_1_1_has_connections(agent: AgentProcess) -> None:
    """Browsers open six connections of HTTP/1.1 to a host: these eight streams would use up all of them."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "Chromium is not installed: apt install chromium"
    follow = """() => Promise.all(Array.from({length: 8}, async () => {
        const answer = await fetch("/livez");
        const logs = await fetch("/v1/node/devices/cpu:0/logs?follow=true",
            {headers: {Authorization: window.token}});
        const piece = await logs.body.getReader().read();
        return [answer.status, logs.status, piece.value.length > 0];
    }))"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(ignore_https_errors=True).new_page()
        page.set_default_timeout(20_000)
        page.goto(agent.base_url)
        expect(page.get_by_text("cpu:0").first).to_be_visible()
        protocol = "() => performance.getEntriesByType('navigation')[0].nextHopProtocol"
        assert page.evaluate(protocol) == "h2"
        page.evaluate("(token) => { window.token = token; }", agent.operator_headers()["Authorization"])
        assert page.evaluate(follow) == [[200, 200, True]] * 8
        browser.close()
