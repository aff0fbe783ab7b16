"""Keeps a dispatcher told about this node. Serving never depends on it.

register ──accepted──> heartbeat, each interval or soon after a change
    ▲                      │
    └──the node is unknown─┘      refused, or no answer: back off, and try the same again
"""

import ipaddress
import logging
import math
import random
from typing import Protocol
from urllib.parse import urlsplit

import httpx
import trio

from nodeagent.dispatcher.responses import Accepted, DispatcherResponse, Refused, Unknown, Verdict, backoff_s, interpret
from nodeagent.dispatcher.wire import Heartbeat, Payload, Register, as_json

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
FAREWELL_TIMEOUT_S = 1.0
ANSWER_MAX_BYTES = 64 * 1024
# Changes that come together are told together, and a node that changes all the time tells it 5 times a second.
COALESCE_S = 0.1
CHANGE_INTERVAL_S = 0.2


class NodeSource(Protocol):
    """The node, as it is told about."""

    def register_payload(self) -> Register: ...

    def heartbeat_payload(self, sequence: int) -> Heartbeat: ...


class DispatcherClient:
    """One node's registration and heartbeats. What changes is written by `run`, and at the end by `farewell`.

    `registered` says that the dispatcher took the last registration and has not forgotten it; `trouble` what is wrong
    with it now, None if nothing is.
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
        self.trouble: str | None = None
        self._base_url = base_url.rstrip("/")
        self._node = node
        self._interval_s = heartbeat_interval_s
        self._random = rng or random.Random()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._transport = transport
        # Made once: loading the certificates takes 40 ms.
        self._tls = httpx.create_ssl_context()
        self._sequence = 0
        self._failures = 0
        self._registered_at = -math.inf
        self._changed = trio.Event()
        self._loop = trio.CancelScope()
        self._loop_ended = trio.Event()
        self._loop_ended.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Register and send heartbeats until cancelled, or until `farewell`. Raises nothing of its own."""
        self._loop_ended = trio.Event()
        task_status.started()
        try:
            with self._loop:
                while True:
                    await self._one_call()
        finally:
            self._loop_ended.set()

    def notice(self) -> None:
        """Something about the node changed that the dispatcher should hear of soon."""
        self._changed.set()

    def register_again(self) -> None:
        """What registration tells has changed, or an operator wants it: register at the next turn, which is soon."""
        self.registered = False
        self._changed.set()

    async def farewell(self) -> None:
        """End the loop and send one last heartbeat, if the dispatcher knows this node; bounded, never raises."""
        self._loop.cancel()
        await self._loop_ended.wait()
        if self.registered:
            response = await self._post("heartbeat", self._next_heartbeat(), FAREWELL_TIMEOUT_S)
            logger.debug("the last heartbeat: %s", interpret(response))

    async def _one_call(self) -> None:
        """Register or send a heartbeat, whichever is due, and wait until the next one is."""
        self._changed = trio.Event()
        began = trio.current_time()
        if self.registered:
            verdict = interpret(await self._post("heartbeat", self._next_heartbeat(), CALL_TIMEOUT_S))
        else:
            self._registered_at = began
            verdict = interpret(await self._post("register", self._node.register_payload(), CALL_TIMEOUT_S))
        was_registered = self.registered
        self._take_in(verdict)
        match verdict:
            case Accepted() if was_registered:
                await self._until_due(began)
            case Accepted():
                pass  # the first heartbeat follows at once
            case Unknown():
                # At once, but not in step with all the other nodes that a restarted dispatcher forgot, and not over
                # and over where it forgets them at once.
                soonest = self._registered_at + self._interval_s
                await trio.sleep_until(max(began + self._random.uniform(0, 1), soonest))
            case Refused(wait_s=wait_s):
                await trio.sleep(wait_s if wait_s is not None else backoff_s(self._failures, self._random))

    async def _until_due(self, began: float) -> None:
        with trio.move_on_at(began + self._interval_s):
            await self._changed.wait()
            await trio.sleep(COALESCE_S)
            await trio.sleep_until(began + CHANGE_INTERVAL_S)

    def _take_in(self, verdict: Verdict) -> None:
        """Bring the state up to date; log what changed, not what goes on."""
        match verdict:
            case Accepted(interval_s):
                if self.trouble is not None or not self.registered:
                    logger.info("dispatcher %s: %s", self._base_url, "back" if self.registered else "registered")
                self.registered, self.trouble, self._failures = True, None, 0
                self._interval_s = interval_s or self._interval_s
            case Unknown(reason):
                self._complain(reason, logging.WARNING)
                self.registered = False
            case Refused(reason, error=error):
                self._complain(reason, logging.ERROR if error else logging.WARNING)
                self._failures += 1

    def _complain(self, reason: str, level: int) -> None:
        if reason != self.trouble:
            logger.log(level, "dispatcher %s: %s; serving goes on", self._base_url, reason)
        self.trouble = reason

    def _next_heartbeat(self) -> Heartbeat:
        self._sequence += 1
        return self._node.heartbeat_payload(self._sequence)

    async def _post(self, what: str, payload: Payload, timeout_s: float) -> DispatcherResponse:
        """One call with a deadline for all of it. Never raises; the answer is read up to a bound."""
        with trio.move_on_after(timeout_s):
            try:
                # A client for each call: calls are seconds apart, and there is no pool to be wedged by a cancelled
                # one. The environment's proxies are for the world outside, and a dispatcher is on the mesh's network.
                async with (
                    httpx.AsyncClient(
                        transport=self._transport,
                        verify=self._tls,
                        timeout=None,
                        trust_env=False,
                        headers=self._headers,
                    ) as http,
                    http.stream("POST", f"{self._base_url}/v1/nodes/{what}", json=as_json(payload)) as answer,
                ):
                    return await _read(answer)
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                return DispatcherResponse(fault=f"it can't be reached: {error!r}")
        return DispatcherResponse(fault=f"no whole answer within {timeout_s:g} s")


async def _read(answer: httpx.Response) -> DispatcherResponse:
    body = b""
    async for chunk in answer.aiter_bytes():
        # Read to the end and not kept: to leave the iteration would leave httpx's generators unfinished.
        body = (body + chunk)[: ANSWER_MAX_BYTES + 1]
    if len(body) > ANSWER_MAX_BYTES:
        return DispatcherResponse(fault=f"its answer is longer than {ANSWER_MAX_BYTES} bytes")
    return DispatcherResponse(answer.status_code, answer.headers, body)


def loopback_warning(base_url: str, dispatcher_base_url: str) -> str | None:
    """What is odd about telling a dispatcher elsewhere that this node is on loopback, None if nothing is."""
    if not _is_loopback(base_url) or _is_loopback(dispatcher_base_url):
        return None
    return (
        f"the dispatcher at {dispatcher_base_url} is told that this node is at {base_url}, which only this host can "
        "reach; set listen_host or advertise_url"
    )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
