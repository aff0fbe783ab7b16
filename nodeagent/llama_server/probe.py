"""Readiness and liveness of one llama-server."""

import logging

import msgspec
import trio

from nodeagent.llama_server.control import ControlError, Reply, ask
from supervisor.listening import Listener, listeners_of
from supervisor.output import printable
from supervisor.probe import NotReady, ProcessView

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
# llama-server's own answers have less than 1 KB.
_MAX_BYTES = 64 * 1024
# A server that listens and is not ready yet is asked at that address; where else it listens is looked up this rarely.
# A look takes 0.1 ms, but up to 5 ms where the child has sockets that don't listen: the kernel then walks its table of
# connections.
_LOOK_AGAIN_S = 1.0


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    """The part of `/v1/models` that counts."""

    data: list[_Model]


class LlamaServerProbe:
    """Asks a child for its health at the address where it listens; implements `supervisor.probe.Probe`.

    A child is ready if `/health` returns 200 and `/v1/models` lists the alias that it was given. `--port 0` picked its
    port, and the operating system says which one that is: a child prints what its model file says too, so its output
    only tells when to look (see `supervisor.probe.wait_ready`). If a child listens at several addresses, the first that
    is ready counts. What changes, in `check`: `_known`, the address that was ready, and `_found`, the addresses and
    when they were looked up, each with its generation; `_warned_of`, a generation.
    """

    def __init__(self, alias: str, api_key: str) -> None:
        self._alias = alias
        self._api_key = api_key
        self._known: tuple[int, str] | None = None
        self._found: tuple[int, float, list[str]] = (0, 0.0, [])
        self._warned_of: int | None = None

    def __eq__(self, other: object) -> bool:
        """Probes that ask the same are equal, so that a reload restarts no child because of a new one."""
        return isinstance(other, LlamaServerProbe) and (self._alias, self._api_key) == (other._alias, other._api_key)

    def __hash__(self) -> int:
        return hash(self._alias)

    async def check(self, process: ProcessView) -> str:
        """Return the child's address, IP:port; raise NotReady. The alias is checked once per generation."""
        if self._known is not None and self._known[0] == process.generation:
            address = self._known[1]
            await self._check_health(address)
            return address
        fault = NotReady("it listens nowhere yet")
        for address in await self._addresses(process):
            try:
                await self._check_health(address)
                await self._check_alias(address)
            except NotReady as error:
                fault = error
            else:
                self._known = (process.generation, address)
                return address
        raise fault

    async def _addresses(self, process: ProcessView) -> list[str]:
        """Where the child listens on IPv4's loopback, as it was told to."""
        generation, looked_at, addresses = self._found
        if generation != process.generation or not addresses or trio.current_time() >= looked_at + _LOOK_AGAIN_S:
            addresses = await self._look(process)
            self._found = (process.generation, trio.current_time(), addresses)
        return addresses

    async def _look(self, process: ProcessView) -> list[str]:
        try:
            listeners = await _listeners(process)
        except PermissionError as error:
            problem = f"where it listens can't be seen: {error}; it needs the same user as the agent and no more rights"
            if self._warned_of != process.generation:
                self._warned_of = process.generation
                logger.warning("%s: %s", self._alias, problem)
            raise NotReady(problem) from error
        addresses = [str(it) for it in listeners if it.ip.version == 4 and it.ip.is_loopback]
        if listeners and not addresses:
            raise NotReady(f"it listens at {', '.join(map(str, listeners))}, and not on 127.0.0.1")
        return addresses

    async def _check_health(self, address: str) -> None:
        reply = await self._ask(address, "/health")
        if reply.status != 200:
            raise NotReady(f"/health returned {reply.status}")

    async def _check_alias(self, address: str) -> None:
        reply = await self._ask(address, "/v1/models")
        try:
            names = [model.id for model in reply.read_as(_Models).data]
        except ControlError as error:
            raise NotReady(f"/v1/models returned {reply.status} and no list of models: {error}") from None
        if self._alias not in names:
            raise NotReady(f"the server at {address} serves {printable(str(names))[:200]}, not {self._alias!r}")

    async def _ask(self, address: str, path: str) -> Reply:
        try:
            return await ask(address, self._api_key, path, timeout_s=_TIMEOUT_S, max_bytes=_MAX_BYTES)
        except ControlError as error:
            raise NotReady(f"{path}: {error}") from error


async def _listeners(process: ProcessView) -> list[Listener]:
    """Where the child listens; if it is a wrapper, where the processes of its process group do."""
    return await listeners_of([process.pid]) or await listeners_of(process.group_pids())
