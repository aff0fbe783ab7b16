"""The README of the protocol has the fields, states and codes of the code."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import nodeagent.dispatcher
from nodeagent.dispatcher import wire
from nodeagent.dispatcher.client import (
    CALL_TIMEOUT_S,
    CHANGE_INTERVAL_S,
    COALESCE_S,
    LAST_HEARTBEAT_TIMEOUT_S,
    RESPONSE_MAX_BYTES,
)
from nodeagent.dispatcher.responses import BACKOFF_FIRST_S, BACKOFF_LONGEST_S
from nodeagent.llama_server.reason_codes import ReasonCode
from nodeagent.scheduling.seam import ServerState
from nodeagent.status import NodeReason, NodeStatus
from supervisor.lifecycle import Cause

README = (Path(nodeagent.dispatcher.__file__).parent / "README.md").read_text(encoding="utf-8")
EXAMPLES: dict[str, Any] = {
    name: json.loads(text) for name, text in re.findall(r"<!-- (\w+) -->\n```json\n(.*?)```", README, re.DOTALL)
}


def model_of(name: str) -> type[wire.Payload]:
    model: type[wire.Payload] = getattr(wire, name)
    return model


def test_every_message_has_an_example() -> None:
    assert set(EXAMPLES) == {"Register", "Heartbeat", "HeartbeatResponse", "Inventory"}
    assert README.count("```json") == len(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_what_the_node_would_send(name: str) -> None:
    parsed = model_of(name).model_validate_json(json.dumps(EXAMPLES[name]))
    assert wire.as_json(parsed) == EXAMPLES[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_exactly_the_fields_of_its_model(name: str) -> None:
    found = list(objects(model_of(name), EXAMPLES[name]))
    assert len(found) >= 1
    for model, example in found:
        assert example.keys() == model.model_fields.keys(), model.__name__


def objects(model: type[BaseModel], example: dict[str, Any]) -> Iterator[tuple[type[BaseModel], dict[str, Any]]]:
    """Each object of the example, the parts of parts included, with its model."""
    yield model, example
    for name, field in model.model_fields.items():
        parts = example[name] if isinstance(example[name], list) else [example[name]]
        for part_model in (field.annotation, *get_args(field.annotation)):
            if isinstance(part_model, type) and issubclass(part_model, BaseModel):
                for part in parts:
                    yield from objects(part_model, part)


def test_the_examples_are_walked_to_the_last_part() -> None:
    walked = {model.__name__ for name in EXAMPLES for model, _ in objects(model_of(name), EXAMPLES[name])}
    payloads = {it.__name__ for it in vars(wire).values() if isinstance(it, type) and issubclass(it, wire.Payload)}
    assert walked == payloads - {"Payload"}


def test_statuses_and_reasons_belong_together_in_the_examples() -> None:
    for name in ("Heartbeat", "Inventory"):
        assert EXAMPLES[name]["status"] in {status.value for status in NodeStatus}
        assert len(EXAMPLES[name]["reasons"]) == len(EXAMPLES[name]["reason_codes"]) == 1
        assert set(EXAMPLES[name]["reason_codes"]) <= set(NodeReason)


@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("`status`", {status.value for status in NodeStatus}),
        ("`state`", {state.value for state in ServerState}),
        ("code of the node", set(NodeReason)),
        ("code of a server", set(ReasonCode)),
    ],
)
def test_a_table_has_exactly_the_words_of_its_closed_set(heading: str, words: set[str]) -> None:
    [table] = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == words


def test_the_causes_of_the_supervisor_are_codes_of_a_server() -> None:
    assert set(Cause) <= set(ReasonCode)


def test_the_numbers_are_those_of_the_code() -> None:
    assert f"bounded to {wire.INTERVAL_MIN_S:g} to {wire.INTERVAL_MAX_S:g} s" in README
    assert f"up to {BACKOFF_FIRST_S:g} s, doubling with each failure to {BACKOFF_LONGEST_S:g} s" in README
    assert f"takes {CALL_TIMEOUT_S:g} s at most" in README
    assert f"waits {LAST_HEARTBEAT_TIMEOUT_S:g} s for its response" in README
    assert f"{RESPONSE_MAX_BYTES // 1024} KiB" in README
    assert f"{COALESCE_S:g} s, but at most five in a second" in README
    assert CHANGE_INTERVAL_S == 1 / 5
