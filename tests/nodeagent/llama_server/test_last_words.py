"""Which lines of a server that exited tell why."""

import pytest

from nodeagent.llama_server.last_words import last_error, last_words

# Recorded from build b10068.
WRONG_NUMBER = """\
error while handling argument "--ctx-size": stoi

usage:
-c,    --ctx-size N                     size of the prompt context (default: 0, 0 = loaded from model)
                                        (env: LLAMA_ARG_CTX_SIZE)


to show complete usage, run with -h
""".splitlines()


def test_of_a_wrong_value_the_error_is_told_with_the_value_and_the_help_left_out() -> None:
    argv = ["llama-server", "--ctx-size", "abc", "--port", "0"]
    told = ['error while handling argument "--ctx-size": stoi (given: --ctx-size abc)']
    assert last_words(WRONG_NUMBER, argv) == told
    assert last_words(["loading", *WRONG_NUMBER, "0.00 I bye"], argv) == [*told, "loading", "0.00 I bye"]


@pytest.mark.parametrize(
    ("argv", "added"),
    [
        ([], ""),
        (["--ctx-size"], ""),
        (["--ctx-size", ""], " (given: --ctx-size '')"),
        (["--ctx-size", "a b", "--ctx-size", "2"], " (given: --ctx-size 'a b' 2)"),
        (["--ctx-size", "stoi"], ""),
        (["--ctx-size", "o"], " (given: --ctx-size o)"),
        (["-c", "abc"], ""),
    ],
    ids=["no argv", "no value", "empty", "twice", "named", "a letter of it", "another flag"],
)
def test_a_value_that_the_line_does_not_name_is_added(argv: list[str], added: str) -> None:
    assert last_words(WRONG_NUMBER, argv) == [f'error while handling argument "--ctx-size": stoi{added}']


@pytest.mark.parametrize(
    "line",
    [
        "0.00.1 E llama_model_load: the file is odd",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "ggml.c:12: GGML_ASSERT(a == b) failed",
        "cudaMalloc failed: out of memory",
        "open: No such file or directory",
        "error: invalid argument: --foo",
    ],
)
def test_a_line_that_says_error_comes_before_the_last_lines(line: str) -> None:
    assert last_words([line, *"abcdefg"]) == [line, "d", "e", "f", "g"]


@pytest.mark.parametrize("line", ["errors: 0 terrors", "unfailing", "I n_failures_total"])
def test_a_word_that_only_contains_such_a_word_says_nothing(line: str) -> None:
    assert last_words([line, *"abcdef"]) == list("bcdef")


def test_the_last_five_errors_are_told_and_each_line_once() -> None:
    errors = [f"error {number}" for number in range(7)]
    assert last_words([*errors, "end"]) == errors[-5:]
    assert last_words(["error 1", "same", "same", "error 1", "", "   "]) == ["error 1", "same"]


def test_an_error_after_a_usage_text_is_told() -> None:
    assert last_words(["usage: x [options]", "  -h  help about every error", "-v", "", "fatal: no model"]) == [
        "fatal: no model"
    ]


@pytest.mark.parametrize("lines", [[], ["", " "], ["usage:", "  -h"], ["to show complete usage, run with -h"]])
def test_nothing_is_told_where_nothing_was_said(lines: list[str]) -> None:
    assert last_words(lines) == []


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (["loading", *WRONG_NUMBER], WRONG_NUMBER[0]),
        (["error 1", "error 2", "end"], "error 2"),
        (["one", "two", "usage:", "  -h"], "two"),
        (["usage:", "  -h"], None),
    ],
    ids=["before a usage text", "the last of two", "no error", "nothing said"],
)
def test_the_log_shows_the_last_error(lines: list[str], shown: str | None) -> None:
    assert last_error(lines) == shown
