"""Which model a request gets: by role, with a fallback, within its own limits."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.inference_node import REQUEST, InferenceNode
from fakes.upstream import Act, UpstreamServers
from nodeagent.access.gate import Account, today
from nodeagent.access.limits import Limits, Meter, Sums
from nodeagent.config import ApiKeyConfig
from nodeagent.errors import BackendUnavailable, BodyTooLarge, ModelNotFound, QueueFull, RemoteMediaForbidden, WrongTask
from nodeagent.front.accounts import account_var
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.front.openai import read_request
from nodeagent.front.parameters import Parameters
from nodeagent.front.seam import ModelCard, ModelDetails, Node, find_card
from nodeagent.releases import Releases
from nodeagent.scheduling.seam import Obstacle

CARDS = [
    ModelCard("a", (), 0, "chat", roles=("planner",), fallback=("b", "e", "c")),
    ModelCard("b", ("bee",), 0, "chat", roles=("planner", "coder"), parameters=Parameters.of({"seed": 1}, {})),
    ModelCard("c", (), 0, None, roles=("coder",), max_request_bytes=90),
    ModelCard("e", (), 0, "embedding", roles=("embedder",)),
]


class FourModels:
    """What `read_request` needs of a node with these models, whose states are given."""

    default_model_id = None
    stream_ping_s = 0.0
    scheduler = SimpleNamespace(lanes={"cpu:0": None})

    def __init__(self, states: dict[str, str] | None = None, *, allow_remote_media: bool = False) -> None:
        self.allow_remote_media = allow_remote_media
        self._states = states or {}

    def cards(self) -> list[ModelCard]:
        return CARDS

    def details(self, model_id: str) -> ModelDetails:
        return ModelDetails(state=self._states.get(model_id, "unloaded"), failed=False)


def found(role: str, **states: str) -> str:
    return find_card(cast(Node, FourModels(states)), f"role:{role}").model_id


@pytest.mark.parametrize(
    ("role", "states", "model_id"),
    [
        ("planner", {}, "a"),
        ("planner", {"b": "loading"}, "b"),
        ("planner", {"a": "loading", "b": "loaded"}, "b"),
        ("planner", {"a": "loaded", "b": "loaded"}, "a"),
        ("coder", {}, "b"),
        ("embedder", {"a": "loaded"}, "e"),
    ],
)
def test_a_role_is_the_first_of_its_models_that_is_loaded_or_loading(
    role: str, states: dict[str, str], model_id: str
) -> None:
    assert found(role, **states) == model_id


def test_an_unknown_role_is_told_with_those_there_are() -> None:
    with pytest.raises(ModelNotFound) as refused:
        found("painter")
    assert refused.value.known == ["role:planner", "role:coder", "role:embedder"]


def read(node: FourModels | None = None, **fields: Any) -> InferenceRequest:
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()
    path = "/v1/chat/completions"
    return read_request(cast(Node, node or FourModels()), request_id="r", path=path, headers=[], body=body)


def test_a_request_has_its_models_parameters_and_those_of_each_fallback_and_only_able_ones_are_fallbacks() -> None:
    request = read(model="a")
    assert [instead.model_id for instead in request.fallbacks] == ["b", "c"]
    assert "seed" not in json.loads(request.body)
    assert json.loads(request.fallbacks[0].body)["seed"] == 1
    assert json.loads(read(model="bee", seed=7).body)["seed"] == 7
    assert json.loads(read(model="role:coder").body)["seed"] == 1


def test_a_fallback_is_for_those_who_may_use_it() -> None:
    entry = ApiKeyConfig(name="alice", sha256="0" * 64, models=("a", "c"))
    token = account_var.set(Account(entry, Meter(Limits(), 0.0), Sums(), today))
    try:
        assert [instead.model_id for instead in read(model="a").fallbacks] == ["c"]
        assert found("coder") == "c"
    finally:
        account_var.reset(token)


def test_a_model_for_another_task_is_told_with_those_for_the_path_that_the_key_may_use() -> None:
    with pytest.raises(WrongTask) as refused:
        read(model="e")
    assert refused.value.able == ["a", "b"]
    entry = ApiKeyConfig(name="alice", sha256="0" * 64, models=("b", "e"))
    token = account_var.set(Account(entry, Meter(Limits(), 0.0), Sums(), today))
    try:
        with pytest.raises(WrongTask) as refused:
            read(model="e")
        assert refused.value.able == ["b"]
    finally:
        account_var.reset(token)


def test_a_model_may_have_a_smaller_limit_of_its_own() -> None:
    assert read(model="b", user="y" * 90).model_id == "b"
    with pytest.raises(BodyTooLarge) as refused:
        read(model="c", user="y" * 90)
    assert (refused.value.limit_bytes, refused.value.model_id) == (90, "c")


def test_media_by_url_are_refused_unless_they_are_allowed() -> None:
    messages = [{"role": "user", "content": [{"image_url": {"url": "http://x"}}]}]
    with pytest.raises(RemoteMediaForbidden):
        read(model="a", messages=messages)
    assert read(FourModels(allow_remote_media=True), model="a", messages=messages).model_id == "a"


FIRST = replace(REQUEST, fallbacks=(replace(REQUEST, model_id="b"), replace(REQUEST, model_id="c")))


@pytest.fixture
async def node(nursery: trio.Nursery) -> InferenceNode:
    node = InferenceNode(UpstreamServers(nursery))
    await nursery.start(node.lane.run)
    return node


async def test_a_model_that_cant_be_served_is_replaced_by_the_first_of_its_fallbacks_that_can(
    node: InferenceNode, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.servers.fake.obstacles["a"] = Obstacle("it does not fit", None)
    node.servers.fake.broken.add("b")
    node.servers.acts.append(Act())
    answer = await node.serve(FIRST)
    node.assert_nothing_is_held()
    assert dict(answer.headers)[b"x-node-model"] == b"c"
    assert "c serves it instead: " in caplog.text
    activity = node.inference.tallies.activity.newest(lambda _: True, limit=9)
    assert [(record.model_id, record.status) for record in activity] == [("c", 200), ("b", 503), ("a", 503)]


async def test_if_no_fallback_can_be_served_either_the_models_own_reason_is_told(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.obstacles |= {name: Obstacle(f"no {name}", None) for name in "abc"}
    with pytest.raises(BackendUnavailable, match="no a"):
        await node.serve(FIRST)
    node.assert_nothing_is_held()


async def test_a_full_queue_is_no_reason_for_another_model(node: InferenceNode, autojump_clock: MockClock) -> None:
    with Releases() as held:
        for number in range(4):
            held.add(node.scheduler.admit(f"q{number}", "a").close)
        with pytest.raises(QueueFull):
            await node.serve(FIRST)
