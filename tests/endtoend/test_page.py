"""The page at `/`, in Debian's Chromium: one agent and one browser for all tests, and a new tab for each."""

import json
import re
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Route, expect, sync_playwright

from fakes.agent_process import AgentProcess, running_agent, write_config

VIEWS = ("overview", "models", "chat", "activity", "events", "logs")
MARKUP = "<img src=x onerror=document.title=1><script>document.title=2</script>"
PHONE_WIDTH = 360
RECORD = {
    "id": 7,
    "request_id": "r-7",
    "time": "2026-11-28T06:57:32.000Z",
    "path": "/v1/chat/completions",
    "key_name": "laptop",
    "model_id": "tiny",
    "device_id": "cpu:0",
    "queue_ms": 210.0,
    "load_ms": 0.0,
    "first_token_ms": 350.0,
    "duration_ms": 2500.0,
    "prompt_tokens": 1200,
    "completion_tokens": 96,
    "cached_tokens": 1000,
    "tokens_per_s": 44.65,
    "status": 200,
    "error": None,
    "streamed": True,
    "user_agent": "openai-python",
}


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, slow_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    """Its names, its servers' output and a reason have markup in them."""
    folder = tmp_path_factory.mktemp("page")
    noisy = folder / "noisy-llama-server"
    noisy.write_text(f"#!/bin/sh\necho 'noise: {MARKUP}' >&2\nexec '{llama_server}' \"$@\"\n")
    noisy.chmod(noisy.stat().st_mode | stat.S_IXUSR)
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "alias": "small", "llama_server_bin": str(noisy)},
        {"model_id": "slow", "path": str(slow_model), "threads": 1, "roles": [MARKUP]},
        {"model_id": "missing", "path": str(folder / f"{MARKUP.replace('/', '')}.gguf")},
    ]
    keys = {
        "node_name": MARKUP,
        "max_pending_requests_per_device": 8,
        "max_models_per_device": 2,
        "drain_grace_s": 60,
        "stream_ping_s": 0.5,
    }
    with running_agent(write_config(folder, llama_server, models, **keys)) as agent:
        yield agent


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium is not None, "Chromium is not installed: apt install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(eq=False)
class Tab:
    """A tab that shows the page. Nothing may go wrong in it but requests that end with an `expected` status."""

    page: Page
    agent: AgentProcess
    expected: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(10_000)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(self.agent.base_url)

    def _heard(self, message: ConsoleMessage) -> None:
        status = re.search(r"status of (\d+)", message.text)
        is_expected = status is not None and int(status[1]) in self.expected
        # The records of requests are for later: without them the view says so.
        if (
            message.type in ("error", "warning")
            and not is_expected
            and "/v1/node/activity" not in message.location["url"]
        ):
            self.problems.append(f"{message.text} ({message.location['url']})")

    @property
    def token(self) -> str:
        return self.agent.operator_headers()["Authorization"].removeprefix("Bearer ")

    def sign_in(self, token: str | None = None) -> None:
        self.button("Sign in").first.click()
        self.page.get_by_label("Token").fill(self.token if token is None else token)
        self.page.keyboard.press("Enter")
        if token is None:
            expect(self.button("Sign out")).to_be_visible()

    def show(self, view: str) -> Locator:
        self.page.get_by_role("navigation").get_by_role("link", name=view.capitalize()).click()
        return self.page.get_by_role("region", name=view.capitalize())

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def ask(self, question: str, model: str, most_tokens: int) -> Locator:
        """Ask in the chat; the answer."""
        chat = self.show("chat")
        chat.get_by_label("Model").select_option(model)
        chat.get_by_text("Options").click()
        chat.get_by_label("Most tokens").fill(str(most_tokens))
        chat.get_by_text("Options").click()
        chat.get_by_label("Message").fill(question)
        self.page.keyboard.press("Enter")
        return chat.get_by_role("article").last


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context() as context:
        yield context


@pytest.fixture
def tab(context: BrowserContext, agent: AgentProcess) -> Iterator[Tab]:
    with context.new_page() as page:
        tab = Tab(page, agent)
        yield tab
        assert tab.problems == []


@pytest.fixture(scope="module")
def operator(agent: AgentProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=agent.base_url, headers=agent.operator_headers(), timeout=30, trust_env=False) as http:
        yield http


@contextmanager
def busy(agent: AgentProcess, requests: int = 3) -> Iterator[None]:
    """So many requests for `slow`, which has one slot, until the block ends."""
    body = {"model": "slow", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with httpx.Client(base_url=agent.base_url, trust_env=False, timeout=30) as http, ThreadPoolExecutor() as pool:
        ended: list[Any] = []

        def ask() -> None:
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                ended.append(answer)
                for _piece in answer.iter_raw():
                    if len(ended) > requests:  # the block has ended
                        return

        for _ in range(requests):
            pool.submit(ask)
        until = time.monotonic() + 10
        while in_flight(agent) == 0 or waiting(agent) < requests - 1:
            assert time.monotonic() < until
        try:
            yield
        finally:
            ended += [None] * (requests + 1)
            httpx.post(
                f"{agent.base_url}/v1/node/models/slow/unload",
                json={"force": True},
                headers=agent.operator_headers(),
                timeout=30,
                trust_env=False,
            )


def lane(agent: AgentProcess) -> dict[str, Any]:
    [lane] = httpx.get(f"{agent.base_url}/v1/node/queue", timeout=30, trust_env=False).json()["lanes"]
    found: dict[str, Any] = lane
    return found


def in_flight(agent: AgentProcess) -> int:
    return int(lane(agent)["in_flight"])


def waiting(agent: AgentProcess) -> int:
    return int(lane(agent)["waiting"])


def test_the_devices_are_shown_with_their_memory_use_servers_and_queue(tab: Tab, operator: httpx.Client) -> None:
    operator.post("/v1/node/models/tiny/load")
    tab.sign_in()  # it looks again at once, so that the chart has two points
    device = tab.show("overview").get_by_role("article")
    expect(device.get_by_role("heading", name="cpu:0")).to_be_visible()
    expect(device).to_contain_text(re.compile(r"Memory[\d.]+ [MG]iB of [\d.]+ GiB"))
    expect(device.get_by_role("img", name=re.compile(r"^Memory: \d+ % now"))).to_be_visible()
    expect(device.get_by_role("img", name=re.compile(r"^Utilisation: ")).locator(".line")).to_have_attribute(
        "d", re.compile(r"^M\d.*L")
    )
    server = device.get_by_role("listitem").filter(has_text="tiny")
    expect(server).to_contain_text(re.compile(r"tiny.*ready.*for .*1 slot.*4,096 tokens"))
    failed = device.get_by_role("listitem").filter(has_text="missing")
    expect(failed).to_contain_text("no such file")
    expect(device).to_contain_text("0 in flight, 0 queued; room for 8.")


def test_the_queue_says_who_waits_when_each_starts_and_why(tab: Tab, agent: AgentProcess) -> None:
    with busy(agent):
        tab.page.reload()
        queue = tab.show("overview").get_by_role("table", name="Queue")
        expect(queue.get_by_role("row")).to_have_count(4)
        expect(queue.get_by_role("row").nth(1)).to_contain_text(re.compile("in flight.*slow.*normal"))
        expect(queue.get_by_role("row").nth(2)).to_contain_text(re.compile("^place 1slow.*the slot is busy"))
        expect(queue.get_by_role("row").nth(3)).to_contain_text(re.compile("^place 2"))
    tab.page.reload()
    expect(tab.show("overview")).to_contain_text("0 in flight, 0 queued")
    expect(queue).to_be_hidden()


def test_the_models_are_shown_with_task_size_fit_and_place(tab: Tab, operator: httpx.Client) -> None:
    operator.post("/v1/node/models/tiny/load")
    models = tab.show("models").get_by_role("table", name="Models")
    expect(models.get_by_role("row").filter(has_text="tiny")).to_contain_text(
        re.compile(r"tinyalso small.*chat.*loaded.*cpu:0.*KiB.*under 1 % of cpu:0.*4,096")
    )
    expect(models.get_by_role("row").filter(has_text="missing")).to_contain_text(re.compile("failed.*no such file"))


def test_a_model_is_loaded_restarted_and_unloaded_by_its_buttons(
    tab: Tab, agent: AgentProcess, operator: httpx.Client
) -> None:
    operator.post("/v1/node/models/tiny/unload")
    row = tab.show("models").get_by_role("row").filter(has_text="tiny")
    expect(tab.button("Unload tiny")).to_be_disabled()
    tab.button("Load tiny").click()  # asks for the token
    tab.page.get_by_label("Token").fill(tab.token)
    tab.page.keyboard.press("Enter")
    notices = tab.page.get_by_role("status")
    expect(notices.filter(has_text="tiny is ready on cpu:0.")).to_be_visible()
    expect(row).to_contain_text(re.compile("loadedcpu:0"))
    expect(tab.button("Load tiny")).to_be_disabled()
    tab.button("Restart tiny").click()
    expect(notices.filter(has_text="tiny was restarted on cpu:0.")).to_be_visible()
    tab.button("Unload tiny").click()
    expect(notices.filter(has_text="tiny was unloaded from cpu:0.")).to_be_visible()
    expect(row).to_contain_text("unloaded")
    assert [child for child in agent.children() if "tiny" in child.cmdline()] == []


def test_an_order_that_fails_says_why(tab: Tab) -> None:
    tab.expected = [503]
    tab.sign_in()
    tab.show("models")
    tab.button("Load missing").click()
    expect(tab.page.get_by_role("status").filter(has_text="no such file")).to_be_visible()


def test_unloading_a_model_in_use_asks_whether_to_wait(tab: Tab, agent: AgentProcess) -> None:
    tab.sign_in()
    tab.show("models")
    with busy(agent, 1):
        tab.button("Unload slow").click()
        question = tab.page.get_by_role("dialog", name="Unload slow?")
        expect(question).to_contain_text("A request is in flight.")
        tab.button("Cancel").click()
        assert in_flight(agent) == 1
        tab.button("Unload slow").click()
        tab.button("End them now").click()
        expect(tab.page.get_by_role("status").filter(has_text="slow was unloaded from cpu:0.")).to_be_visible()
        assert in_flight(agent) == 0


def test_the_node_is_drained_and_undrained(tab: Tab) -> None:
    tab.sign_in()
    tab.button("Drain").click()
    tab.page.get_by_role("dialog", name="Take the node out of service?").get_by_role("button", name="Drain").click()
    expect(tab.page.locator("#status")).to_have_text("draining")
    expect(tab.page.locator("#facts")).to_contain_text("drained by an operator")
    tab.button("Undrain").click()
    expect(tab.page.locator("#status")).to_have_text("degraded")


def test_a_crash_is_seen_as_it_happens(tab: Tab, agent: AgentProcess, operator: httpx.Client) -> None:
    tab.sign_in()
    operator.post("/v1/node/models/tiny/load")
    events = tab.show("events")
    expect(events.get_by_role("listitem").first).to_contain_text(re.compile("ready.*tiny on cpu:0"))
    [child] = [child for child in agent.children() if "tiny" in child.cmdline()]
    child.send_signal(signal.SIGKILL)
    exited = events.get_by_role("listitem").filter(has_text="SIGKILL").filter(has_text="exited").first
    expect(exited).to_be_visible(timeout=2_000)
    exited.get_by_text("What it printed last").click()
    expect(exited.locator("pre")).to_contain_text("load_model")
    expect(events.get_by_role("listitem").first).to_contain_text(re.compile("ready.*tiny on cpu:0"))


def test_the_log_goes_on(tab: Tab, operator: httpx.Client) -> None:
    tab.sign_in()
    operator.post("/v1/node/models/tiny/load")
    log = tab.show("logs").get_by_role("log")
    expect(log).to_contain_text("load_model: loading model")
    operator.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    )
    expect(log).to_contain_text("stop processing")


def test_activity_is_shown_with_where_the_time_went(tab: Tab) -> None:
    records = [
        RECORD,
        RECORD | {"id": 6, "status": 429, "error": "queue_full", "tokens_per_s": None, "model_id": MARKUP},
    ]
    with_activity(tab, records)
    tab.sign_in()
    rows = tab.show("activity").get_by_role("row")
    expect(rows.nth(1)).to_contain_text(
        re.compile(
            r"laptop · openai-python200tiny/v1/chat/completionscpu:0210 ms0 ms350 ms2\.5 s1,2001,000 cached9644\.[67]$"
        )
    )
    expect(rows.nth(2)).to_contain_text("429 queue full")
    expect(rows.nth(2)).to_contain_text(MARKUP)


def test_a_request_that_ends_is_seen_in_activity(tab: Tab) -> None:
    followed = f"id: 8\nevent: request\ndata: {json.dumps(RECORD | {'id': 8, 'model_id': 'new'})}\n\n"
    with_activity(tab, [RECORD], followed)
    tab.sign_in()
    with tab.page.expect_request(re.compile("activity.follow=true&since=7$")):
        rows = tab.show("activity").get_by_role("row")
    expect(rows.nth(1)).to_contain_text("new")
    expect(rows.nth(2)).to_contain_text("tiny")


def with_activity(tab: Tab, records: list[dict[str, Any]], followed: str = ": nothing new\n\n") -> None:
    """Have the node answer so."""
    tab.page.route("**/v1/node/activity?limit=*", lambda route: route.fulfill(json={"activity": records}))
    tab.page.route(
        "**/v1/node/activity?follow=*", lambda route: route.fulfill(content_type="text/event-stream", body=followed)
    )


def test_the_bodies_of_a_request_are_shown_as_text_when_they_are_asked_for(tab: Tab) -> None:
    with_activity(tab, [RECORD | {"has_bodies": True}, RECORD | {"id": 6, "has_bodies": False}])
    bodies = {
        "request_body": {"type": "application/json", "bytes": 70_000, "cut": True, "text": f'{{"a": "{MARKUP}"'},
        "answer_body": {"type": "audio/wav", "bytes": 2048, "cut": False, "text": None},
    }
    tab.page.route("**/v1/node/activity/7", lambda route: route.fulfill(json=RECORD | bodies))
    tab.sign_in()
    rows = tab.show("activity").get_by_role("row")
    expect(rows.nth(1)).to_contain_text("Bodies")
    expect(rows.nth(2)).to_contain_text("tiny")
    expect(rows.nth(2).get_by_role("button")).to_have_count(0)
    rows.nth(1).get_by_role("button", name="Bodies").click()
    dialog = tab.page.get_by_role("dialog", name="Request 7: /v1/chat/completions")
    expect(dialog).to_contain_text("application/json · 68 KiB · cut")
    expect(dialog.locator("pre")).to_have_text([f'{{"a": "{MARKUP}"'])
    expect(dialog).to_contain_text("audio/wav · 2.0 KiB · no text")
    assert dialog.locator("img, script").count() == 0
    assert tab.page.title() not in ("1", "2")
    assert faults_of(tab.page) == []
    tab.page.set_viewport_size({"width": PHONE_WIDTH, "height": 740})
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH
    expect(dialog.get_by_role("button", name="Close")).to_be_visible()
    tab.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert tab.page.locator("dialog pre").count() == 0, "what people wrote does not stay"


def test_bodies_that_are_not_kept_any_more_are_a_message_and_a_lost_token_closes_them(tab: Tab) -> None:
    tab.expected += [404, 401]
    with_activity(tab, [RECORD | {"has_bodies": True}])
    gone = {"error": {"message": f"There is no record 7; {MARKUP}"}}
    tab.page.route("**/v1/node/activity/7", lambda route: route.fulfill(status=404, json=gone))
    tab.sign_in()
    tab.show("activity").get_by_role("button", name="Bodies").click()
    expect(tab.page.get_by_role("dialog")).to_contain_text(f"There is no record 7; {MARKUP}")
    tab.button("Close").click()
    tab.page.route("**/v1/node/activity/7", lambda route: route.fulfill(status=401, json=gone))
    tab.show("activity").get_by_role("button", name="Bodies").click()
    expect(tab.button("Sign in").first).to_be_visible()
    expect(tab.page.get_by_role("dialog")).to_be_hidden()


def test_a_node_without_activity_says_so(tab: Tab) -> None:
    tab.page.route("**/v1/node/activity?*", lambda route: route.fulfill(status=404, json={"error": {"message": "no"}}))
    tab.sign_in()
    expect(tab.show("activity")).to_contain_text("This node keeps no activity.")


def test_a_chat_shows_the_answer_and_what_it_took(tab: Tab) -> None:
    answer = tab.ask("hello", "tiny", 20)
    expect(answer).to_contain_text(re.compile(r"first token .* · 20 tokens · [\d.]+ tokens/s"))
    expect(answer.locator(".text")).to_have_text(re.compile(r"^\s*(\w+ ){19}\w+$"))
    expect(tab.button("Stop")).to_be_hidden()
    with tab.page.expect_request("**/v1/chat/completions") as sent:
        tab.ask("and more", "tiny", 5)
    said = json.loads(sent.value.post_data or "")["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user"]


def test_a_stream_is_stopped_and_so_is_its_generation(tab: Tab, agent: AgentProcess) -> None:
    answer = tab.ask("hello", "slow", 5000)
    expect(answer).to_contain_text(re.compile(r"\d+ tokens · [\d.]+ tokens/s"))
    assert in_flight(agent) == 1
    tab.button("Stop").click()
    expect(answer).to_contain_text(re.compile(r"stopped · .*tokens/s"))
    until = time.monotonic() + 3
    while in_flight(agent):
        assert time.monotonic() < until
    expect(tab.button("Send")).to_be_enabled()
    expect(answer.locator(".text")).not_to_be_empty()


def test_a_chat_that_waits_says_for_what(tab: Tab, agent: AgentProcess) -> None:
    with busy(agent, 2):
        answer = tab.ask("hello", "slow", 5)
        expect(answer).to_contain_text("waiting: place 2 in the queue")
        tab.button("Stop").click()
        expect(answer).to_contain_text("stopped")


def test_an_error_in_an_answer_is_shown(tab: Tab) -> None:
    events = (
        'data: {"choices":[{"delta":{"content":"so far"}}]}\n\ndata: {"error":{"message":"the server crashed"}}\n\n'
    )
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=events))
    answer = tab.ask("hello", "tiny", 5)
    expect(answer).to_contain_text("the server crashed")
    expect(answer).to_contain_text("so far")


def test_a_wrong_token_is_refused_and_a_right_one_stays_in_this_tab_alone(tab: Tab, browser: Browser) -> None:
    tab.expected = [401]
    stored = "[sessionStorage.length, localStorage.length, document.cookie]"
    tab.show("events")
    tab.sign_in("wrong")
    expect(tab.page.get_by_role("dialog")).to_contain_text("The node does not know this token.")
    tab.page.get_by_label("Token").fill("käse")
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_role("dialog")).to_contain_text("only letters, digits and signs")
    assert tab.page.evaluate(stored) == [0, 0, ""]
    tab.page.get_by_label("Token").fill(tab.token)
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_role("region", name="Events").get_by_role("listitem").first).to_be_visible()
    assert tab.page.evaluate(stored) == [2, 0, ""]
    tab.button("Sign out").click()
    expect(tab.page.get_by_role("region", name="Events")).to_contain_text("only operators see")
    assert tab.page.evaluate(stored) == [0, 0, ""]


def test_names_logs_prompts_and_answers_are_text_and_nothing_else(tab: Tab, operator: httpx.Client) -> None:
    operator.post("/v1/node/models/tiny/load")
    tab.sign_in()
    expect(tab.page.get_by_role("heading", level=1)).to_have_text(MARKUP)
    expect(tab.show("overview")).to_contain_text("<img src=x onerror=")
    expect(tab.show("models")).to_contain_text(MARKUP)
    expect(tab.show("events")).to_contain_text("<img src=x onerror=")
    expect(tab.show("logs").get_by_role("log")).to_contain_text(f"noise: {MARKUP}")
    said = json.dumps({"choices": [{"delta": {"content": MARKUP, "reasoning_content": MARKUP}}]})
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {said}\n\ndata: [DONE]\n\n"),
    )
    answer = tab.ask(MARKUP, "tiny", 5)
    expect(answer.locator(".text")).to_have_text(MARKUP)
    expect(answer.locator("pre")).to_have_text(MARKUP)
    expect(tab.page.get_by_role("region", name="Chat").get_by_role("article").first).to_contain_text(MARKUP)
    assert tab.page.locator("img, main script").count() == 0
    assert tab.page.title() == f"{MARKUP} · RoleMesh node"


def test_the_browser_itself_runs_no_other_script(tab: Tab) -> None:
    """Even if markup got into the document."""
    tab.page.evaluate(
        """markup => {
            window.violated = [];
            document.addEventListener("securitypolicyviolation", event => violated.push(event.effectiveDirective));
            document.querySelector("main").insertAdjacentHTML("beforeend", markup);
            const script = document.createElement("script");
            script.textContent = "document.title = 3";
            document.body.append(script);
        }""",
        "<img src='data:,x' onerror='document.title=1'><p style='color:red'>",
    )
    tab.page.wait_for_function("window.violated.length >= 3")
    assert set(tab.page.evaluate("window.violated")) == {"script-src-attr", "script-src-elem", "style-src-attr"}
    assert tab.page.title() not in ("1", "3")
    assert len(tab.problems) >= 3
    tab.problems.clear()


def test_on_a_phone_nothing_has_to_be_scrolled_sideways(tab: Tab, agent: AgentProcess) -> None:
    with busy(agent, 2):
        tab.page.set_viewport_size({"width": PHONE_WIDTH, "height": 740})
        with_activity(tab, [RECORD])
        tab.sign_in()
        expect(tab.show("overview").get_by_role("table", name="Queue")).to_be_visible()
        for view in VIEWS:
            expect(tab.show(view)).to_contain_text(re.compile(r"\w"))
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH, view
            for name in VIEWS:
                expect(tab.page.get_by_role("link", name=name.capitalize())).to_be_in_viewport()


def test_axe_finds_no_fault_of_accessibility(tab: Tab) -> None:
    with_activity(tab, [RECORD])
    tab.button("Sign in").click()
    faults = {"sign in": faults_of(tab.page)}
    tab.page.keyboard.press("Escape")
    tab.sign_in()
    for view in VIEWS:
        expect(tab.show(view)).to_contain_text(re.compile(r"\w"))
        faults[view] = faults_of(tab.page)
    expect(tab.ask("hello", "tiny", 3)).to_contain_text("tokens/s")
    faults["answered"] = faults_of(tab.page)
    # In the dark there are other colours alone.
    tab.page.emulate_media(color_scheme="dark")
    for view in ("overview", "chat", "events"):
        tab.show(view)
        faults[f"{view}, dark"] = faults_of(tab.page, "color-contrast")
    assert {view: found for view, found in faults.items() if found} == {}


def faults_of(page: Page, *rules: str) -> list[str]:
    options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
    found = Axe().run(page, options=options).response["violations"]
    return [f"{one['id']} ({one['impact']}): {node['html'][:200]}" for one in found for node in one["nodes"]]


def test_everything_is_reached_by_the_keyboard(tab: Tab) -> None:
    def focused() -> str:
        text = "document.activeElement.ariaLabel ?? document.activeElement.innerText"
        return str(tab.page.evaluate(text)).strip()

    tab.page.clock.install()
    tab.page.reload()
    expect(tab.button("Drain")).to_be_visible()
    tab.page.keyboard.press("Tab")
    assert focused() == "Skip to the content"
    seen = []
    for _ in range(8):
        tab.page.keyboard.press("Tab")
        seen.append(focused())
    assert seen == ["Drain", "Sign in", *(view.capitalize() for view in VIEWS)]
    tab.page.get_by_role("link", name="Models").focus()
    tab.page.keyboard.press("Enter")
    order = "Load missing"
    for _ in range(20):
        tab.page.keyboard.press("Tab")
        if focused() == order:
            break
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_role("dialog", name="Sign in")).to_be_visible()
    expect(tab.page.get_by_label("Token")).to_be_focused()
    tab.page.keyboard.press("Escape")
    expect(tab.page.get_by_role("dialog")).to_be_hidden()
    expect(tab.button(order)).to_be_focused()
    with tab.page.expect_response("**/v1/node/inventory"):  # what is shown is refreshed, and the focus stays
        tab.page.clock.run_for(3_000)
    expect(tab.button("Sign in")).to_be_visible()
    assert focused() == order


def test_a_hidden_page_asks_for_nothing(tab: Tab) -> None:
    tab.page.clock.install()
    tab.page.reload()
    tab.sign_in()
    tab.show("logs")
    expect(tab.page.get_by_role("log")).to_be_visible()
    set_hidden(tab.page, True)
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.page.clock.run_for(60_000)
    assert asked == []
    set_hidden(tab.page, False)
    expect(tab.page.get_by_role("log")).to_contain_text("load_model")
    assert {url.rpartition("/v1/node/")[2].partition("?")[0] for url in asked} >= {
        "inventory",
        "events",
        "devices/cpu%3A0/logs",
    }


def set_hidden(page: Page, is_hidden: bool) -> None:
    page.evaluate(
        """isHidden => {
            Object.defineProperty(document, "hidden", {value: isHidden, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        is_hidden,
    )


def test_a_node_that_does_not_answer_is_said_and_asked_again(tab: Tab) -> None:
    tab.page.clock.install()
    tab.page.reload()
    expect(tab.show("overview")).to_contain_text("cpu:0")
    tab.page.route("**/v1/node/inventory", lambda route: route.abort())
    tab.page.clock.run_for(3_000)
    alarm = tab.page.get_by_role("alert")
    expect(alarm).to_have_text("The node does not answer. What you see may be old.")
    expect(tab.show("overview")).to_contain_text("cpu:0")
    tab.page.unroute("**/v1/node/inventory")
    tab.page.clock.run_for(20_000)
    expect(alarm).to_be_hidden()
    assert len(tab.problems) >= 1
    tab.problems.clear()


def test_where_api_keys_are_needed_one_for_inference_opens_the_chat_alone(tab: Tab) -> None:
    def guard(route: Route) -> None:
        is_key = route.request.headers.get("authorization") == "Bearer sk-chat"
        inference = route.request.url.endswith("/v1/models")
        if is_key and inference:
            return route.fallback()
        return route.fulfill(status=403 if is_key else 401, json={"error": {"message": "a key is missing"}})

    tab.expected = [401, 403]
    tab.page.route(re.compile("/v1/(node/|models)"), guard)
    tab.page.reload()
    expect(tab.page.locator("#alarm")).to_have_text("a key is missing")
    tab.sign_in("nothing")
    expect(tab.page.get_by_role("dialog")).to_contain_text("The node does not know this token.")
    tab.page.get_by_label("Token").fill("sk-chat")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#alarm")).to_be_hidden()
    expect(tab.page.locator("#facts")).to_contain_text("with it there is the chat")
    with tab.page.expect_request("**/v1/chat/completions") as sent:
        answer = tab.ask("hello", "tiny", 3)
    assert sent.value.headers["authorization"] == "Bearer sk-chat"
    expect(answer).to_contain_text("3 tokens")
    expect(tab.show("events")).to_contain_text("only operators see")


def test_figures_are_written_as_people_read_them(tab: Tab) -> None:
    shown = tab.page.evaluate(
        """async () => {
            const {bytes, percent, seconds, count, rate} = await import("/page/format.js");
            return [
                [0, 1023, 1536, 25769803776, 5e15].map(bytes), [0.005, 0.994, 1].map(percent),
                [0, 0.999, 0.9996, 9.94, 59.6, 119, 7200, 200000].map(seconds),
                [0, 1234567].map(count), [9.96, 99.6].map(rate),
                [bytes, percent, seconds, count, rate].every(written => written(null) === "\u2013"),
            ];
        }"""
    )
    assert shown == [
        ["0 B", "1023 B", "1.5 KiB", "24 GiB", "4547 TiB"],
        ["1 %", "99 %", "100 %"],
        ["0 ms", "999 ms", "1.0 s", "9.9 s", "60 s", "2 min", "2 h", "2 days"],
        ["0", "1,234,567"],
        ["10.0", "100"],
        True,
    ]


def test_why_a_request_waits_follows_from_the_servers(tab: Tab) -> None:
    reasons = tab.page.evaluate(
        """async () => {
            const {why} = await import("/page/overview.js");
            const server = (model_id, state, slots = 2) => ({model_id, state, slots});
            const running = model_id => ({state: "granted", model_id});
            const of = (servers, all = []) => why({state: "waiting", model_id: "a", device: {servers}, all});
            return [
                of([server("a", "starting")]), of([server("a", "backing_off")]), of([server("a", "failed")]),
                of([server("b", "ready")], [running("b")]), of([server("a", "ready")], [running("a"), running("a")]),
                of([server("b", "starting")]), of([]), of([server("a", "ready")]), of([server("a", "stopping")]),
            ];
        }"""
    )
    assert reasons == [
        "its model is loading",
        "its server ended and starts again",
        "its model has failed here",
        "b is in use",
        "all 2 slots are busy",
        "b is loading",
        "its model is not loaded yet",
        "its turn comes next",
        "its server stops",
    ]
