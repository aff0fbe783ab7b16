"""The tokens that answers of llama-server tell, in each of its formats."""

import pytest

from nodeagent.front.usage import Usage, usage_of

NONE = Usage()


@pytest.mark.parametrize(
    ("head", "tail", "usage"),
    [
        (
            b"",
            b'"timings":{"cache_n":3,"prompt_n":5,"predicted_n":7,"predicted_per_token_ms":20.5}',
            Usage(5, 3, 7, 0.0205),
        ),
        (b"", b'"timings":{"prompt_n":5,"predicted_n":1,"predicted_per_token_ms":null,"draft_n":2}}', Usage(5, 0, 1)),
        (b'"prompt_tokens":8', b'"timings":{"prompt_n":-1},"usage":{"completion_tokens":7}', Usage(8, 0, 7)),
        (b"", b'"timings":{"prompt_n":5', NONE),
        (b"", b'"timings":{"prompt_n":1e300}', NONE),
        (b"", b'"usage":{"completion_tokens":7,"prompt_tokens":8,"total_tokens":15}', Usage(8, 0, 7)),
        (
            b"",
            b'"usage":{"completion_tokens":7,"prompt_tokens":8,"prompt_tokens_details":{"cached_tokens":3}}',
            Usage(5, 3, 7),
        ),
        (b'{"model":"e","object":"list","usage":{"prompt_tokens":4,"total_tokens":4},"data":[', b"0.1]}]}", Usage(4)),
        (
            b'data: {"message":{"usage":{"cache_read_input_tokens":2,"input_tokens":9,"output_tokens":0}}}',
            b'data: {"type":"message_delta","usage":{"output_tokens":6}}\n\nevent: message_stop\n\n',
            Usage(9, 2, 6),
        ),
        (
            b"",
            b'"usage": {"input_tokens": 9, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 9}}',
            Usage(0, 9, 6),
        ),
        (b'{"content":"\\"prompt_tokens\\":99"}', b'{"content":"\\"predicted_n\\":99"}', NONE),
        (b'{"prompt_tokens":1.2.3}', b'{"completion_tokens":null}', NONE),
        (b"\xff" * 10, b"", NONE),
    ],
)
def test_the_tokens_are_read(head: bytes, tail: bytes, usage: Usage) -> None:
    assert usage_of(head, tail) == usage
