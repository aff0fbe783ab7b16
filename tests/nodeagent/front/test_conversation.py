from typing import Any

from nodeagent.front.conversation import conversation_of
from nodeagent.scheduling.affinity import Conversations

SYSTEM = {"role": "system", "content": "You are kind."}


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    said = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return {"messages": [SYSTEM, *said]}


def test_a_conversation_is_known_by_its_beginning_from_turn_to_turn() -> None:
    first = conversation_of(None, turns("hello"))
    assert first is not None
    assert conversation_of(None, turns("hello", "hi", "how are you?")) == first
    assert conversation_of(None, turns("good morning")) != first


def test_the_clients_own_word_comes_first() -> None:
    body = turns("hello") | {"prompt_cache_key": "k"}
    assert conversation_of("s", body) == conversation_of("s", turns("other"))
    assert conversation_of(None, body) == conversation_of(None, turns("other") | {"prompt_cache_key": "k"})
    assert len({conversation_of("k", {}), conversation_of(None, body), conversation_of(None, turns("hello"))}) == 3


def test_where_there_is_nothing_to_tell_it_by_there_is_no_conversation() -> None:
    assert conversation_of(None, {"prompt": "once"}) is None
    assert conversation_of("", {"messages": []}) is None
    assert conversation_of(None, {"messages": [SYSTEM], "prompt_cache_key": 7}) is None


def test_the_last_device_of_a_conversation_is_remembered_and_old_ones_are_forgotten() -> None:
    conversations = Conversations()
    conversations.served("a", "gpu:0")
    conversations.served("a", "gpu:1")
    conversations.served(None, "gpu:0")
    assert conversations.device_of("a") == "gpu:1"
    assert conversations.device_of(None) is None
    for number in range(5000):
        conversations.served(str(number), "gpu:0")
    assert conversations.device_of("a") is None
    assert conversations.device_of("4999") == "gpu:0"
