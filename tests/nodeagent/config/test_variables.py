"""References to environment variables, in text and in a configuration."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.config.variables import expand
from nodeagent.config.yaml_source import Source, read_yaml

FILE = Path("/etc/node/agent.yaml")
ENVIRON = {"MODELS": "/srv/models", "PORT": "9000", "EMPTY": "", "NAME": "on"}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("${MODELS}/a.gguf", "/srv/models/a.gguf"),
        ("${MODELS}${PORT}", "/srv/models9000"),
        ("${EMPTY}", ""),
        ("${MISSING:-fallback}", "fallback"),
        ("${MISSING:-}", ""),
        ("${PORT:-1}", "9000"),
        ("$${PORT}", "${PORT}"),
        ("$PORT costs $5", "$PORT costs $5"),
    ],
)
def test_a_reference_is_replaced(text: str, expanded: str) -> None:
    assert expand(text, ENVIRON) == expanded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${MISSING}", "refers to the environment variable MISSING, which is not set"),
        ("${}", "must refer to a variable like"),
        ("${1A}", "must refer to a variable like"),
        ("${PORT", "must refer to a variable like"),
        ("${PORT-1}", "must refer to a variable like"),
    ],
)
def test_a_bad_reference_is_an_error_that_says_what_is_right(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(text, ENVIRON)


@given(st.text())
def test_any_text_is_expanded_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert "${" not in expand(text, ENVIRON) or "$${" in text


def read(text: str) -> Source:
    return read_yaml(text, FILE, ENVIRON)


def test_an_unquoted_value_gets_the_type_of_what_the_variable_holds() -> None:
    source = read("port: ${PORT}\nquoted: '${PORT}'\nword: ${NAME}\nlist: [\"${MODELS}/a\"]\n")

    assert source.value == {"port": 9000, "quoted": "9000", "word": "on", "list": ["/srv/models/a"]}
    assert source.problems == []


def test_an_unset_variable_is_a_problem_with_file_line_and_key() -> None:
    source = read("models:\n  - path: ${NOWHERE}/a.gguf\n")

    assert [str(problem) for problem in source.problems] == [
        f"{FILE}:2: models[0].path: refers to the environment variable NOWHERE, which is not set"
    ]


def test_a_lone_surrogate_is_a_problem_with_file_line_and_key() -> None:
    source = read('models:\n  - server_args: {chat-template: "\\ud800"}\n')

    [problem] = source.problems
    assert (problem.line, problem.where) == (2, "models[0].server_args.chat-template")
    assert "can't be encoded in UTF-8" in problem.message
