"""What the front asks of the rest of the node."""

from dataclasses import dataclass
from typing import Protocol

from nodeagent.errors import ModelNotFound
from nodeagent.events import NodeEvent, Ring
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.status import NodeState


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model as `/v1/models` lists it. `created` is in seconds since the epoch, as OpenAI has it."""

    model_id: str
    aliases: tuple[str, ...]
    created: int


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a new configuration changed: models by what became of them, and keys that only a restart takes over."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    needs_restart: tuple[str, ...]


class Node(Protocol):
    """The node behind the front."""

    @property
    def node_id(self) -> str: ...

    @property
    def max_request_bytes(self) -> int: ...

    @property
    def scheduler(self) -> Scheduler[Upstream]: ...

    def cards(self) -> list[ModelCard]:
        """Every configured model, in the configuration's order."""

    def state(self) -> NodeState:
        """The node's word of state, with its reasons."""

    def inventory_json(self) -> bytes:
        """The inventory: what registration and heartbeat say, with the facts of the configuration."""

    @property
    def admin_token(self) -> str:
        """What operators show that they are."""

    @property
    def events(self) -> Ring[NodeEvent]:
        """Every transition, the last thousand."""

    def log_of(self, device_id: str) -> Ring[str]:
        """The last lines that the servers of a device printed; NoSuchDevice."""

    async def load(self, model_id: str, device_id: str | None) -> str:
        """Return the device on which the model is ready; the refusals of a request, or NoSuchDevice."""

    def load_soon(self, model_id: str, device_id: str | None) -> None:
        """Begin a load without waiting for it; what becomes of it is an event."""

    async def unload(self, model_id: str, *, force: bool) -> list[str]:
        """Stop the model's servers, after their requests or at once; return the devices that had one."""

    def drain(self) -> None:
        """Take no new requests until `undrain`."""

    def undrain(self) -> None:
        """Take requests again; nothing if the node is on its way out."""

    async def reload(self) -> Reloaded:
        """Take over the configuration file as it is now; ReloadRefused where it is bad."""

    def register(self) -> bool:
        """Register anew with the dispatcher; False where there is none."""


def find_card(node: Node, model: str) -> ModelCard:
    """The model of that id or alias; ModelNotFound."""
    cards = node.cards()
    for card in cards:
        if model == card.model_id or model in card.aliases:
            return card
    raise ModelNotFound(model, [card.model_id for card in cards])
