"""What the front asks of the rest of the node."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Final, Protocol

import msgspec

from nodeagent.access.gate import Gate
from nodeagent.errors import ModelForbidden, ModelNotFound
from nodeagent.events import NodeEvent, Ring
from nodeagent.front.accounts import account_var, may_use
from nodeagent.front.parameters import Parameters
from nodeagent.histogram import Histogram
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.status import NodeSnapshot, NodeState

_DEFAULT_TAG: Final = ":latest"
_ROLE: Final = "role:"
_STATES: Final = ("loaded", "loading")


class ModelCard(msgspec.Struct, frozen=True):
    """A model as `/v1/models` lists it. `created` is in seconds since the epoch, as OpenAI has it.
    `task` is what the model is for (chat, embedding or rerank), None if that is not known. `fallback` are the ids of
    models that serve its requests if it can't. `parameters` are put into the body of each of its requests."""

    model_id: str
    aliases: tuple[str, ...]
    created: int
    task: str | None = None
    roles: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    parameters: Parameters | None = None
    max_request_bytes: int | None = None


class ModelDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model now. `state` is in llama-server's words: unloaded, loading or loaded; `failed` is
    whether its last start failed. `server` is a server that is ready, None if there is none. The sizes are those of its
    file and its configuration, None if unknown. `size_label` is the number of parameters in words, such as 8B; it
    and `architecture` are "" if unknown."""

    state: str
    failed: bool
    server: Upstream | None = None
    ctx_size: int | None = None
    ctx_train: int | None = None
    embedding_length: int | None = None
    size_bytes: int | None = None
    architecture: str = ""
    size_label: str = ""
    takes_images: bool = False


class Reloaded(msgspec.Struct, frozen=True):
    """What a new configuration changed: the models, and the keys that need a restart to take effect."""

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
    def default_model_id(self) -> str | None:
        """The model for requests that name none: the only one, or the one marked `default`."""

    @property
    def stream_ping_s(self) -> float:
        """How long a stream may be silent before its first byte; 0 for ever."""

    @property
    def allow_remote_media(self) -> bool:
        """Whether requests may name images, sounds and files by URL."""

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """The origins of web pages that may use the API."""

    @property
    def host_names(self) -> Collection[str]:
        """The names by which browsers may reach the node, in lower case, besides those of loopback."""

    @property
    def has_page(self) -> bool:
        """Whether browsers get the page at `/`."""

    @property
    def scheduler(self) -> Scheduler[Upstream]: ...

    def cards(self) -> list[ModelCard]:
        """Every configured model, in the configuration's order."""

    def details(self, model_id: str) -> ModelDetails:
        """What is known of a configured model now."""

    def state(self) -> NodeState:
        """The node's status, with the reasons for it."""

    def snapshot(self) -> NodeSnapshot:
        """Everything about the node now, but for how each model fits on each device."""

    def inventory_json(self, *, for_operators: bool = False) -> bytes:
        """The inventory: what registration and heartbeat contain, and what is configured; for operators with what
        servers printed before they ended."""

    @property
    def backend_exits(self) -> Mapping[tuple[str, str, str], int]:
        """How many servers have ended, by device, model and cause."""

    @property
    def backend_load_s(self) -> Mapping[tuple[str, str], Histogram]:
        """How long servers took from their spawn to being ready, in seconds, by device and model."""

    @property
    def dispatcher_state(self) -> tuple[bool, float | None] | None:
        """Whether the dispatcher knows this node, and how many seconds ago it last accepted a call; None if there is
        no dispatcher."""

    @property
    def loop_lag_s(self) -> Histogram:
        """How late the event loop was, in seconds."""

    @property
    def connections(self) -> Mapping[str, int]:
        """How many connections of clients are open, by whether they are "busy" or "idle"."""

    @property
    def gate(self) -> Gate:
        """Who may use the node."""

    @property
    def events(self) -> Ring[NodeEvent]:
        """The last thousand state changes."""

    def log_of(self, device_id: str) -> Ring[str]:
        """The last lines that the servers of a device printed. Raises NoSuchDevice."""

    async def load(self, model_id: str, device_id: str | None) -> str:
        """Load the model; return the device on which it is ready. Raises what a request raises, NoSuchDevice, and
        ShuttingDown."""

    def load_soon(self, model_id: str, device_id: str | None) -> None:
        """Begin a load without waiting for it. Its outcome is an event. Raises ShuttingDown."""

    async def unload(self, model_id: str, *, force: bool) -> list[str]:
        """Stop the model's servers after their requests, at once with `force`; return the devices that had one."""

    def drain(self) -> None:
        """Say at once that the node drains, and accept no new requests from `drain_grace_s` later until `undrain`."""

    def undrain(self) -> None:
        """Accept requests again. Raises ShuttingDown if the agent was asked to end."""

    async def reload(self) -> Reloaded:
        """Apply the configuration file as it is now. Raises ReloadRefused if it is bad."""

    def register(self) -> bool:
        """Register with the dispatcher again; False if none is configured."""


def visible_cards(node: Node) -> list[ModelCard]:
    """The models that this request's key is for, in the configuration's order."""
    return [card for card in node.cards() if may_use(card.model_id)]


def find_card(node: Node, model: str) -> ModelCard:
    """The model of that id or alias, also with the tag that Ollama's clients add, or with that role (`role:planner`).
    Raises ModelNotFound, and ModelForbidden if this request's key is not for it."""
    cards = node.cards()
    if model.startswith(_ROLE):
        return _find_by_role(node, model)
    for card in cards:
        if model == card.model_id or model in card.aliases:
            account = account_var.get()
            if account is not None and not account.may_use(card.model_id):
                raise ModelForbidden(account.name, card.model_id, [one.model_id for one in visible_cards(node)])
            return card
    if model.endswith(_DEFAULT_TAG):
        with suppress(ModelNotFound):
            return find_card(node, model.removesuffix(_DEFAULT_TAG))
    raise ModelNotFound(model, [card.model_id for card in visible_cards(node)])


def _find_by_role(node: Node, name: str) -> ModelCard:
    """The first model with the role that is loaded, else that is loading, else that is configured."""
    role = name.removeprefix(_ROLE)
    cards = visible_cards(node)
    able = [card for card in cards if role in card.roles]
    if not able:
        roles = dict.fromkeys(f"{_ROLE}{one}" for card in cards for one in card.roles)
        raise ModelNotFound(name, list(roles) or [card.model_id for card in cards])
    if len(able) == 1:
        return able[0]
    states = [node.details(card.model_id).state for card in able]
    return able[min(range(len(able)), key=lambda index: _rank(states[index]))]


def _rank(state: str) -> int:
    return _STATES.index(state) if state in _STATES else len(_STATES)
