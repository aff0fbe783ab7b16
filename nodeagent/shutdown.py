"""How the agent ends: the signals, the drain, and the last resort if something hangs.

SIGTERM, SIGINT ──> draining: requests are accepted for drain_grace_s (SIGTERM only), then refused
              ──> requests in flight have shutdown_timeout_s; a second signal ends the waiting
              ──> `agent` stops the front, then the servers
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

_IDLE_LOOK_S = 0.05


class Drainable(Protocol):
    """The node, as its shutdown sees it (`node.Node`)."""

    @property
    def config(self) -> NodeConfig: ...

    @property
    def admitted(self) -> int: ...

    def begin_shutdown(self) -> None: ...

    def refuse_requests(self) -> None: ...

    def reload_soon(self) -> None: ...


async def receive_signals(*, task_status: trio.TaskStatus[AsyncIterator[int]]) -> None:
    """Catch the signals that the agent obeys, and hand over the iterator that yields them."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started(signals)
        await trio.sleep_forever()


async def until_drained(node: Drainable, signals: AsyncIterator[int]) -> None:
    """Return once a signal has asked for the end, and the requests in flight are done, out of time, or cut off by a
    second signal."""
    signum = await _next_end(node, signals)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_drain, node, signal.Signals(signum), nursery.cancel_scope, name="drain")
        signum = await _next_end(node, signals)
        logger.warning("%s again: not waiting for %d requests", signal.Signals(signum).name, node.admitted)
        nursery.cancel_scope.cancel()


async def _next_end(node: Drainable, signals: AsyncIterator[int]) -> int:
    """The next signal that asks for the end; those that ask for a reload are obeyed on the way."""
    while (signum := await anext(signals)) == signal.SIGHUP:
        logger.info("SIGHUP: reloading the configuration")
        node.reload_soon()
    return signum


async def _drain(node: Drainable, asked_by: signal.Signals, done: trio.CancelScope) -> None:
    # Load balancers need time to notice; a person at a terminal does not want to wait for it.
    grace_s = node.config.drain_grace_s if asked_by is signal.SIGTERM else 0.0
    logger.info("%s: draining, accepting requests for %g s more", asked_by.name, grace_s)
    node.begin_shutdown()
    await trio.sleep(grace_s)
    node.refuse_requests()
    with trio.move_on_after(node.config.shutdown_timeout_s):
        while node.admitted:  # noqa: ASYNC110  (an event for this alone would burden each release)
            await trio.sleep(_IDLE_LOOK_S)
    if node.admitted:
        logger.warning("shutdown_timeout_s is over: ending %d requests", node.admitted)
    done.cancel()


def exit_after(after_s: float) -> threading.Timer:
    """End the process after that time in any case: a thread's timer, which nothing in the event loop can hold up."""

    def end() -> None:
        logger.critical("still not stopped after %g s; exiting now", after_s)
        os._exit(70)

    timer = threading.Timer(after_s, end)
    timer.daemon = True
    timer.start()
    return timer
