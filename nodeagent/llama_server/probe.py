"""Readiness and liveness of one llama-server."""

import re

import httpx

from nodeagent.llama_server.control import control_client
from supervisor.probe import NotReady, ProcessView

# What the server prints once it listens, and in this build once its model is loaded: `--port 0` picked the port.
_LISTENING = re.compile(r"listening on (?:http://)?(127\.0\.0\.1:\d+)")
_TIMEOUT_S = 5.0


class LlamaServerProbe:
    """Asks a child for its health at the address that it printed; implements `supervisor.probe.Probe`.

    A child is ready if `/health` returns 200 and `/v1/models` lists the alias that it was given. The port comes from
    the child's own output, so another program's port is never probed. What changes: `_known`, in `check`.
    """

    def __init__(self, alias: str, api_key: str) -> None:
        self._alias = alias
        self._api_key = api_key
        self._known: tuple[int, str] | None = None

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
        address = _printed_address(process)
        await self._check_health(address)
        await self._check_alias(address)
        self._known = (process.generation, address)
        return address

    async def _check_health(self, address: str) -> None:
        response = await self._get(address, "/health")
        if response.status_code != 200:
            raise NotReady(f"/health returned {response.status_code}")

    async def _check_alias(self, address: str) -> None:
        response = await self._get(address, "/v1/models")
        try:
            names = [entry["id"] for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise NotReady(f"/v1/models returned {response.status_code} and no list of models") from None
        if self._alias not in names:
            raise NotReady(f"the server at {address} serves {names}, not {self._alias!r}")

    async def _get(self, address: str, path: str) -> httpx.Response:
        try:
            async with control_client(self._api_key, _TIMEOUT_S) as client:
                return await client.get(f"http://{address}{path}")
        except httpx.HTTPError as error:
            # The text of a protocol error quotes what the server sent, and a reason is shown to everybody.
            what = type(error).__name__ if isinstance(error, httpx.RemoteProtocolError) else repr(error)
            raise NotReady(f"{path} failed: {what}") from error


def _printed_address(process: ProcessView) -> str:
    for line in process.output.lines():
        if (found := _LISTENING.search(line)) is not None:
            return found[1]
    raise NotReady("it has not printed its address yet")
