"""HTTP/1.1 on a connection: its requests one after another, and what becomes of them when the client leaves.

A request takes one of two roads: it is an `Exchange` if the server has a handler for its path, else hypercorn's stream
takes it to the ASGI application. A client that has closed its sending side may still read: see `half_close.py`.

All decisions are synchronous, so that the cancellation of a request can't lose a keep-alive timer or a close.
"""

import logging
from typing import TYPE_CHECKING

import trio

from nodeagent.front.asgi import new_request_id
from nodeagent.front.exchange import Exchange
from nodeagent.front.half_close import HalfClose, connection_reset, input_ended
from nodeagent.front.header_text import as_bytes
from nodeagent.front.protocol import BadRequest, EndOfBody, RequestEvent, RequestHead, RequestParser
from nodeagent.front.refusals import error_response
from nodeagent.front.response import Headers, ResponseWriter

if TYPE_CHECKING:
    from nodeagent.front.connection import Connection
    from nodeagent.front.ordinary import OrdinaryRequest

    Request = Exchange | OrdinaryRequest

logger = logging.getLogger(__name__)


class Http1:
    """The requests of one connection, and their tasks.

    The deadline of the connection's `reading` follows, in `_limit`, from `half_closed`, `_policy` and
    `_wrote_after_end`. An incomplete write closes the socket.

    `_answering` is the request that is being answered: `_begin` sets it, `answered` and `_end_request` clear it.
    `_last` is the latest one that was. `_body_ended` is whether all of that request has arrived.
    """

    def __init__(self, connection: "Connection") -> None:
        self.peer = connection.peer
        self.secure = connection.secure
        self.half_closed = trio.Event()
        self._connection = connection
        self._shared = connection.shared
        self._transport = connection.transport
        self._parser = RequestParser()
        self._policy = HalfClose.FINISH
        self._wrote_after_end = False
        self._answering: Request | None = None
        self._last: Request | None = None
        self._body_ended = True
        self._refused = False
        self._turn: trio.Event | None = None  # for which the reading waits
        self._input_ended = False
        self._working = trio.CancelScope()
        self._work: trio.Event | None = None  # for which the worker waits

    # Reading.

    async def read(self) -> bool:
        """Read requests until the connection ends; return whether the client ended it."""
        while True:
            data = await self._transport.receive()
            if data is None:
                return True
            if not data:
                await self._input_has_ended()
                return True
            for event in self._parser.feed(data):
                await self._take(event)

    async def end(self, *, left: bool) -> None:
        """End what is being served, and close the socket; `left` is whether the client has left."""
        await self._end_request()
        if not left and (self._refused or not self._body_ended):
            await self._transport.linger()
        self.close()
        # An ordinary request's application has been told that its client has left, and ends in its own time.
        self._working.cancel()

    def close(self) -> None:
        """Close the socket, so that a truncated answer is seen as that."""
        if self._last is not None and self._last.response.ends_by_closing:
            self._transport.reset()
        self._transport.close()

    def drain(self) -> None:
        """The server drains: the connection ends after this answer anyway (`draining`)."""

    async def _take(self, event: RequestEvent) -> None:
        match event:
            case bytes():
                if isinstance(self._answering, Exchange):
                    self._answering.body(event)
                elif self._answering is not None:
                    await self._answering.body(event)
            case EndOfBody():
                self._body_ended = True
                if isinstance(self._answering, Exchange):
                    self._answering.end_of_body()
                elif self._answering is not None:
                    await self._answering.end_of_body()
            case RequestHead():
                await self._wait_for_its_turn()
                await self._begin(event)
            case BadRequest():
                if self._body_ended:
                    await self._wait_for_its_turn()
                await self._refuse(event)

    async def _wait_for_its_turn(self) -> None:
        """Wait until the request before is answered.

        Nothing reads the socket meanwhile, so a client that leaves would be noticed only after the answer.
        """
        if self._answering is None:
            return
        self._turn = trio.Event()
        async with trio.open_nursery() as nursery:
            name = f"watch for hang-up {self.peer.name}"
            nursery.start_soon(self._end_when_the_client_leaves, name=name)
            await self._turn.wait()
            nursery.cancel_scope.cancel()
        self._turn = None

    async def _begin(self, head: RequestHead) -> None:
        self._connection.become_busy()
        self._policy = HalfClose.FINISH
        if self.half_closed.is_set():
            self._limit()
        self._body_ended = False
        shared = self._shared
        path = head.target.partition(b"?")[0]
        handler = shared.find_handler(head.method, path)
        response = ResponseWriter.to(head)
        if handler is not None:
            self._answering = self._last = Exchange(head, path, handler, self, response)
            self._start_work()
        else:
            ordinary = await shared.ordinary_road.request(head, self, response, self._connection.nursery)
            self._answering = self._last = ordinary
            await ordinary.begin()

    async def _refuse(self, bad: BadRequest) -> None:
        """Answer what is no request, and end the connection. An answer that has begun stays truncated."""
        self._refused = True
        begun = self._answering is not None and self._answering.response.started
        await self._end_request()
        if begun:
            self._connection.reading.cancel()
            return
        await self.write(refusal(bad))
        self._connection.reading.cancel()

    async def _input_has_ended(self) -> None:
        """Return when the client has left. If it stays for its answer, the end of the answer cancels `reading`."""
        if not self._body_ended or self._parser.in_head:
            ended = "The request is malformed: the connection ended before it did."
            await self._refuse(BadRequest(status=400, complaint=ended, answers_head=False))
        elif self._answering is not None:
            self._input_ended = True
            await self._outlast_the_input()

    async def _outlast_the_input(self) -> None:
        self.half_closed.set()
        self._limit()
        await connection_reset(self._transport.socket)

    async def _end_when_the_client_leaves(self) -> None:
        """End the reading when the client has left, while unread bytes may be before the end of its input."""
        await input_ended(self._transport.socket)
        await self._outlast_the_input()
        self._connection.reading.cancel()

    # Requests.

    @property
    def draining(self) -> bool:
        """Whether the server is shutting down, so that each connection ends after its answer."""
        return self._shared.draining.is_set()

    def on_half_close(self, policy: HalfClose) -> None:
        """Set the policy of the request that is being answered."""
        self._policy = policy
        if self.half_closed.is_set():
            self._limit()

    def answered(self, request: "Request") -> None:
        """This request's answer is over, complete or not. Does nothing if the connection has given it up."""
        if self._answering is not request:
            return
        self._answering = None
        reusable = request.response.complete and request.response.keep_alive and self._body_ended
        if not reusable or self._input_ended or self.draining:
            self._connection.reading.cancel()
            return
        self._connection.become_idle()
        if self._turn is not None:
            self._turn.set()

    async def _end_request(self) -> None:
        """Give up the request that is being answered, if there is one."""
        request, self._answering = self._answering, None
        if isinstance(request, Exchange):
            self._working.cancel()
        elif request is not None:
            await request.close()

    def _start_work(self) -> None:
        """Let the worker serve the exchange. One task serves all of a connection, so that none has to be started."""
        if self._work is None:
            self._connection.nursery.start_soon(self._serve_exchanges, name=f"inference {self.peer.name}")
        else:
            self._work.set()

    async def _serve_exchanges(self) -> None:
        with self._working:
            while True:
                self._work = trio.Event()
                # It is gone already if what came with its head was malformed.
                exchange = self._answering
                if isinstance(exchange, Exchange):
                    await exchange.serve()
                    self.answered(exchange)
                await self._work.wait()

    def _limit(self) -> None:
        """Set how long the request may go on after the end of its client's input."""
        goes_on = self._wrote_after_end and self._policy is HalfClose.STREAM
        left_s = float("inf") if goes_on else self._policy.bound_s
        self._connection.reading.deadline = trio.current_time() + left_s

    # Writing.

    async def write(self, data: bytes) -> None:
        """Write all of it, or end the connection: nothing can follow an incomplete write.

        So it needs no shield, and a client that does not read delays neither the daemon nor its shutdown. Waits only if
        the client does not keep up.
        """
        if not data:
            return
        transport = self._transport
        complete = False
        try:
            transport.put(data)
            if transport.unsent_bytes:
                await transport.flush()
            complete = True
            self._note_write()
        except trio.TooSlowError:
            logger.warning(
                "%s: client read too little for %g s; closing the connection",
                self.peer.name,
                self._shared.send_timeout_s,
            )
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("%s: client left: %s", self.peer.name, error)
        finally:
            if not complete:
                self._connection.reading.cancel()
                transport.reset()

    def _note_write(self) -> None:
        if self.half_closed.is_set() and not self._wrote_after_end:
            self._wrote_after_end = True
            if self._policy is HalfClose.STREAM:
                self._limit()


def refusal(bad: BadRequest) -> bytes:
    """The answer to what is no request; the connection ends with it."""
    status, fields, body = refusal_of(bad)
    response = ResponseWriter(is_head=bad.answers_head)
    return response.head(status, fields, close=True) + response.body(body) + response.end()


def refusal_of(bad: BadRequest) -> tuple[int, Headers, bytes]:
    """The status, the headers and the body of that answer."""
    status, headers, body = error_response(bad.status, bad.complaint, new_request_id())
    return status, [*as_bytes(headers), (b"content-length", b"%d" % len(body))], body
