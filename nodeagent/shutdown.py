"""How the agent stops: the drain, and the last resort if something hangs. `signals` says what begins it.

draining: requests are accepted for drain_grace_s (after SIGTERM only), then refused
    ──> requests in flight get shutdown_timeout_s
    ──> `agent` stops the front, then the servers
"""

import logging
import os
import signal
import threading
from typing import Protocol

import trio

from nodeagent.config import NodeConfig

logger = logging.getLogger(__name__)

# How often the drain looks whether requests are left.
_POLL_S = 0.05

EXIT_HUNG = 70
"""The exit code of a process that did not stop in time (EX_SOFTWARE of BSD's sysexits.h)."""


class Drainable(Protocol):
    """What the shutdown needs of the node (`node.Node`)."""

    @property
    def config(self) -> NodeConfig: ...

    @property
    def admitted(self) -> int: ...

    def begin_shutdown(self) -> None: ...

    def refuse_requests(self) -> None: ...


async def drain(node: Drainable, signum: signal.Signals) -> None:
    """This signal came: return when the node may stop, since its requests have ended or their time is over."""
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


def exit_after(after_s: float, code: int = EXIT_HUNG) -> threading.Timer:
    """End the process after that time with this exit code, unless the timer is cancelled.

    It runs in a thread, so nothing in the event loop can hold it up.
    """

    def end() -> None:
        logger.critical("still not stopped after %g s: exiting now", after_s)
        logging.shutdown()
        os._exit(code)

    timer = threading.Timer(after_s, end)
    timer.name = "last resort"
    timer.daemon = True
    timer.start()
    return timer
