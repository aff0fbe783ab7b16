"""Schemathesis makes requests of the OpenAPI document, good and bad ones, to the agent and the real llama-server."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    positive_data_acceptance,
    response_schema_conformance,
)

from fakes.agent_process import AgentProcess, running_agent, write_config
from nodeagent.front.endpoints import ENDPOINTS

# They never end by themselves.
_ENDLESS = ["/v1/node/events", "/v1/node/devices/{device_id}/logs"]
# After it every request would get the same answer.
_DRAIN = "/v1/node/drain"


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, embedder_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "default": True, "ctx_size": 256},
        {"model_id": "embedder", "path": str(embedder_model)},
    ]
    folder = tmp_path_factory.mktemp("agent")
    with running_agent(write_config(folder, llama_server, models, max_models_per_device=2)) as agent:
        yield agent


@pytest.fixture(scope="module")
def described(agent: AgentProcess) -> Any:
    schema = schemathesis.openapi.from_url(f"{agent.base_url}/openapi.json")
    return schema.exclude(path=[*_ENDLESS, _DRAIN])


def each(described: Any, check: Callable[[Any], None], examples: int) -> int:
    """Check some cases of every operation; how many operations there are."""
    few = settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    operations = [found.ok() for found in described.get_all_operations()]
    for operation in operations:

        def tried(case: Any) -> None:
            check(case)

        given(case=operation.as_strategy())(few(tried))()
    return len(operations)


def test_good_and_bad_requests_are_answered_as_described(described: Any, agent: AgentProcess) -> None:
    headers = agent.operator_headers()

    def check(case: Any) -> None:
        if isinstance(case.body, dict) and case.path in ENDPOINTS:  # else an answer is as long as the context
            case.body |= {"max_tokens": 2, "n_predict": 2, "max_output_tokens": 2, "options": {"num_predict": 2}}
        answer = case.call(headers=headers, timeout=30)
        # What is more than the node reads is for the server to judge, which also says that it can't do something.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance, not_a_server_error])
        assert answer.status_code < 500 or answer.status_code == 501, answer.text

    assert each(described, check, examples=2) > 40


def test_without_the_token_operators_paths_answer_that_it_is_missing(described: Any) -> None:
    def check(case: Any) -> None:
        if case.operation.definition.raw.get("security") == [{"operator": []}]:
            answer = case.call(timeout=30)
            assert answer.status_code in (401, 404), answer.text
            case.validate_response(answer, checks=[response_schema_conformance, content_type_conformance])

    assert each(described, check, examples=2) > 40
