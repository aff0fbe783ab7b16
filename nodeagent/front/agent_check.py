"""HAProxy's agent check: how the node is and how much it can take, in one line for each connection.

The words are those of `agent-check` in HAProxy's configuration manual. The weight is the share of places that are free;
`maxconn` is how many there are, since HAProxy counts its own connections itself.
"""

import logging
from functools import partial
from typing import Final

import trio

from nodeagent.containment import Containment
from nodeagent.front.seam import Node
from nodeagent.status import NodeStatus

logger = logging.getLogger(__name__)

# The line is sent when the connection is accepted, whatever the client does. Then the client gets this long to read it
# and close, as long as there are not too many such clients: closing at once what it has sent us would reset it.
_LINGER_S: Final = 1.0
_LINGERING_MAX: Final = 32
_READ_BYTES: Final = 1024
_REASON_MAX_CHARS: Final = 200


async def serve(
    node: Node, listeners: list[trio.SocketListener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer each connection with a line and close it, until cancelled. The listeners are closed then."""
    async with trio.open_nursery() as nursery:
        serve_all = partial(trio.serve_listeners, _AgentCheck(node).handle, listeners)
        await nursery.start(serve_all, name="agent check's listeners")
        task_status.started()


def line(node: Node) -> str:
    """What HAProxy is to do with the node, without the end of the line."""
    state = node.state()
    if state.status in (NodeStatus.DRAINING, NodeStatus.STOPPING):
        return "drain"
    reason = _one_line("; ".join(state.reasons))
    if state.status is NodeStatus.STARTING:
        return f"down #{reason or 'models are being preloaded'}"
    if not state.can_serve:
        return f"down #{reason or 'no model can be served'}"
    lanes = [lane.view() for lane in node.scheduler.device_lanes]
    limit, free = sum(lane.limit for lane in lanes), sum(lane.free for lane in lanes)
    # With 0 % HAProxy would send nothing, and have no queue for the node.
    return f"ready up {max(1, 100 * free // limit)}% maxconn:{limit}"


def _one_line(text: str) -> str:
    printable = "".join(one if " " <= one <= "~" else " " for one in text)
    return " ".join(printable.split())[:_REASON_MAX_CHARS]


class _AgentCheck:
    """What changes: `_lingering`, how many clients are waited for, in `handle`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lingering = 0
        self._containment = Containment("answering HAProxy's agent check")

    async def handle(self, stream: trio.SocketStream) -> None:
        with self._containment:
            try:
                await self._answer(stream)
            except (OSError, trio.BrokenResourceError) as error:
                logger.debug("a client of the agent check left: %s", error)
            finally:
                await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        # A new socket's buffer takes it whole.
        await stream.socket.send(f"{line(self._node)}\n".encode("ascii"))
        await stream.send_eof()
        if self._lingering >= _LINGERING_MAX:
            return
        self._lingering += 1
        try:
            with trio.move_on_after(_LINGER_S):
                while await stream.receive_some(_READ_BYTES):
                    pass
        finally:
            self._lingering -= 1
