"""Registers the node with a dispatcher and sends heartbeats. Serving never depends on it.

register ──accepted──> heartbeat, each interval and soon after a change
    ▲                      │
    └──the node is unknown─┘      refused, or no response: back off, then repeat the call
"""

import ipaddress
import logging
import math
import random
from typing import Protocol
from urllib.parse import urlsplit

import httpx
import trio

from nodeagent.containment import Containment
from nodeagent.dispatcher.responses import (
    BACKOFF_LONGEST_S,
    Accepted,
    DispatcherResponse,
    Refused,
    Unknown,
    Verdict,
    backoff_s,
    interpret,
)
from nodeagent.dispatcher.wire import Heartbeat, Payload, Register, as_json

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
LAST_HEARTBEAT_TIMEOUT_S = 1.0
RESPONSE_MAX_BYTES = 64 * 1024
# Changes within 0.1 s share one heartbeat, and a node that changes all the time sends 5 a second.
COALESCE_S = 0.1
CHANGE_INTERVAL_S = 0.2


class NodeSource(Protocol):
    """What the client needs of the node: the payloads that it sends."""

    def register_payload(self) -> Register: ...

    def heartbeat_payload(self, sequence: int) -> Heartbeat: ...


class DispatcherClient:
    """One node's registration and heartbeats.

    `registered` is True while the dispatcher knows this node, as far as its responses say. `problem` is what is wrong
    with the dispatcher now, None if nothing is. `accepted_at` is when it last accepted a call, None if it never did.
    Only `run` changes them, and `register_again`.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None,
        node: NodeSource,
        heartbeat_interval_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.registered = False
        self.problem: str | None = None
        self.accepted_at: float | None = None
        self._base_url = base_url.rstrip("/")
        self._node = node
        self._interval_s = heartbeat_interval_s
        self._random = rng or random.Random()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._transport = transport
        # Created once: loading the certificates takes 40 ms.
        self._tls = httpx.create_ssl_context()
        self._sequence = 0
        self._failures = 0
        self._registered_at = -math.inf
        self._changed = trio.Event()
        self._loop = trio.CancelScope()
        self._loop_ended = trio.Event()
        self._loop_ended.set()
        self._containment = Containment("calling the dispatcher")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Register and send heartbeats until cancelled, or until `stop`. Raises no errors of the dispatcher's."""
        self._loop_ended = trio.Event()
        task_status.started()
        try:
            with self._loop:
                while True:
                    with self._containment:
                        await self._call_once()
                        continue
                    await trio.sleep(BACKOFF_LONGEST_S)
        finally:
            self._loop_ended.set()

    def heartbeat_soon(self) -> None:
        """The node has changed: don't wait for the end of the interval."""
        self._changed.set()

    def register_again(self) -> None:
        """The registration has changed, or an operator asks for one: register soon instead of sending a heartbeat."""
        self.registered = False
        self._changed.set()

    async def stop(self) -> None:
        """End `run`, and send a last heartbeat if the dispatcher knows this node. Takes 1 s at most, never raises."""
        self._loop.cancel()
        await self._loop_ended.wait()
        if self.registered:
            with self._containment:
                response = await self._post("heartbeat", self._next_heartbeat(), LAST_HEARTBEAT_TIMEOUT_S)
                logger.debug("dispatcher %s: last heartbeat: %s", self._base_url, interpret(response))

    async def _call_once(self) -> None:
        """Register or send a heartbeat, whichever is due, and wait until the next call is due."""
        self._changed = trio.Event()
        began = trio.current_time()
        if self.registered:
            verdict = interpret(await self._post("heartbeat", self._next_heartbeat(), CALL_TIMEOUT_S))
        else:
            self._registered_at = began
            verdict = interpret(await self._post("register", self._node.register_payload(), CALL_TIMEOUT_S))
        was_registered = self.registered
        self._update(verdict)
        match verdict:
            case Accepted() if was_registered:
                await self._until_due(began)
            case Accepted():
                pass  # the first heartbeat follows at once
            case Unknown():
                # With jitter, because a restarted dispatcher has forgotten all its nodes at the same time. And at most
                # once an interval, in case it forgets this node again at once.
                soonest = self._registered_at + self._interval_s
                await trio.sleep_until(max(began + self._random.uniform(0, 1), soonest))
            case Refused(wait_s=wait_s):
                await trio.sleep(wait_s if wait_s is not None else backoff_s(self._failures, self._random))

    async def _until_due(self, began: float) -> None:
        with trio.move_on_at(began + self._interval_s):
            await self._changed.wait()
            await trio.sleep(COALESCE_S)
            await trio.sleep_until(began + CHANGE_INTERVAL_S)

    def _update(self, verdict: Verdict) -> None:
        """Follow a response. Only changes are logged, not each call."""
        match verdict:
            case Accepted(interval_s):
                if self.problem is not None or not self.registered:
                    logger.info("dispatcher %s: %s", self._base_url, "back" if self.registered else "registered")
                self.registered, self.problem, self._failures = True, None, 0
                self.accepted_at = trio.current_time()
                self._interval_s = interval_s or self._interval_s
            case Unknown(reason):
                self._report(reason, logging.WARNING)
                self.registered = False
            case Refused(reason, error=error):
                self._report(reason, logging.ERROR if error else logging.WARNING)
                self._failures += 1

    def _report(self, reason: str, level: int) -> None:
        if reason != self.problem:
            logger.log(level, "dispatcher %s: %s; requests are still served", self._base_url, reason)
        self.problem = reason

    def _next_heartbeat(self) -> Heartbeat:
        self._sequence += 1
        return self._node.heartbeat_payload(self._sequence)

    async def _post(self, what: str, payload: Payload, timeout_s: float) -> DispatcherResponse:
        """Make one call within `timeout_s`, the reading of the response included. Never raises."""
        with trio.move_on_after(timeout_s):
            try:
                # One client per call: calls are seconds apart, and a cancelled call can't leave a broken pool behind.
                # The environment's proxies are for other networks than the dispatcher's.
                async with (
                    httpx.AsyncClient(
                        transport=self._transport,
                        verify=self._tls,
                        timeout=None,
                        trust_env=False,
                        headers=self._headers,
                    ) as http,
                    http.stream("POST", f"{self._base_url}/v1/nodes/{what}", json=as_json(payload)) as response,
                ):
                    return await _read(response)
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                return DispatcherResponse(failure=f"call failed: {error!r}")
        return DispatcherResponse(failure=f"no complete response within {timeout_s:g} s")


async def _read(response: httpx.Response) -> DispatcherResponse:
    body = b""
    async for chunk in response.aiter_bytes():
        # The rest is read but not kept: leaving the iteration early would leave httpx's generators unfinished.
        body = (body + chunk)[: RESPONSE_MAX_BYTES + 1]
    if len(body) > RESPONSE_MAX_BYTES:
        return DispatcherResponse(failure=f"response is longer than {RESPONSE_MAX_BYTES} bytes")
    return DispatcherResponse(response.status_code, response.headers, body)


def loopback_warning(base_url: str, dispatcher_base_url: str) -> str | None:
    """A warning if a dispatcher on another host is to reach this node on its loopback address, else None."""
    if not _is_loopback(base_url) or _is_loopback(dispatcher_base_url):
        return None
    return (
        f"the dispatcher at {dispatcher_base_url} can't reach this node at {base_url}, a loopback address; "
        "set listen_host or advertise_url"
    )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
