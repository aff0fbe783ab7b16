"""How the agent stops: the signals, the drain, and the last resort if something hangs.

SIGTERM, SIGINT ──> draining: requests are accepted for drain_grace_s (SIGTERM only), then refused
                ──> requests in flight get shutdown_timeout_s; a second signal ends the waiting
                ──> `agent` stops the front, then the servers
SIGHUP          ──> the configuration is reloaded, before and during the drain
"""

import logging
import os
import signal
import threading
from collections.abc import AsyncIterator
from typing import Protocol

import trio

from nodeagent.config import NodeConfig

logger = logging.getLogger(__name__)

# How often the drain looks whether requests are left.
_POLL_S = 0.05


class Drainable(Protocol):
    """What the shutdown needs of the node (`node.Node`)."""

    @property
    def config(self) -> NodeConfig: ...

    @property
    def admitted(self) -> int: ...

    def begin_shutdown(self) -> None: ...

    def refuse_requests(self) -> None: ...

    def reload_soon(self) -> None: ...


async def receive_signals(*, task_status: trio.TaskStatus[AsyncIterator[int]]) -> None:
    """Catch the signals that the agent handles; `started` gets the iterator that yields them."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started(signals)
        await trio.sleep_forever()


async def until_drained(node: Drainable, signals: AsyncIterator[int]) -> None:
    """Return when the node may stop: SIGTERM or SIGINT came, and then the requests in flight ended, or their time did,
    or a second signal came."""
    signum = await _next_stop_signal(node, signals)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_drain, node, signal.Signals(signum), nursery.cancel_scope, name="drain")
        signum = await _next_stop_signal(node, signals)
        logger.warning("%s again: not waiting for %d requests", signal.Signals(signum).name, node.admitted)
        nursery.cancel_scope.cancel()


async def _next_stop_signal(node: Drainable, signals: AsyncIterator[int]) -> int:
    """Wait for the next SIGTERM or SIGINT; reload the configuration on each SIGHUP before it."""
    while (signum := await anext(signals)) == signal.SIGHUP:
        logger.info("SIGHUP: reloading the configuration")
        node.reload_soon()
    return signum


async def _drain(node: Drainable, signum: signal.Signals, done: trio.CancelScope) -> None:
    # Load balancers need time to notice; a person at a terminal does not want to wait for them.
    grace_s = node.config.drain_grace_s if signum is signal.SIGTERM else 0.0
    logger.info("%s: draining, accepting requests for %g s more", signum.name, grace_s)
    node.begin_shutdown()
    await trio.sleep(grace_s)
    node.refuse_requests()
    with trio.move_on_after(node.config.shutdown_timeout_s):
        while node.admitted:  # noqa: ASYNC110  (an event just for this would cost every release of a lease)
            await trio.sleep(_POLL_S)
    if node.admitted:
        logger.warning("shutdown_timeout_s is over: cutting off %d requests", node.admitted)
    done.cancel()


def exit_after(after_s: float) -> threading.Timer:
    """End the process after that time with exit code 70, unless the timer is cancelled.

    It runs in a thread, so nothing in the event loop can hold it up.
    """

    def end() -> None:
        logger.critical("still not stopped after %g s: exiting now", after_s)
        os._exit(70)

    timer = threading.Timer(after_s, end)
    timer.name = "last resort"
    timer.daemon = True
    timer.start()
    return timer
