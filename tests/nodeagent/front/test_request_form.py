"""The model's name in a multipart form."""

import tracemalloc

import httpx
import pytest

from nodeagent.errors import InvalidRequest
from nodeagent.front.request_form import read_form

FILE = {"file": ("speech.wav", b"RIFF\r\n--x\r\n" * 1000, "audio/wav")}
TYPE = "multipart/form-data; boundary=b"


def form(data: dict[str, str], files: object = FILE) -> tuple[bytes, str]:
    """As a real client encodes it: the fields before the file."""
    request = httpx.Request("POST", "http://node/", data=data, files=files)  # type: ignore[arg-type]
    return request.read(), request.headers["content-type"]


def part(name: str, content: str, more: str = "") -> str:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{content}\r\n'


def test_the_model_is_found_before_the_file() -> None:
    body, content_type = form({"model": "whisper", "language": "en"})
    fields = read_form(body, content_type, needs="file")
    assert (fields.model, fields.stream, fields.completions) == ("whisper", False, 1)


def test_the_model_is_found_after_a_long_file() -> None:
    body = part("file", "x" * 300_000, '; filename="a.wav"') + part("model", "whisper") + "--b--\r\n"
    assert read_form(body.encode(), TYPE, needs="file").model == "whisper"


def test_a_form_may_name_no_model() -> None:
    assert read_form(*form({}), needs="file").model is None


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        ("{}", "application/json", "must be a form"),
        ("{}", None, "must be a form"),
        ("--b--", "multipart/form-data", "must be a form"),
        ("", TYPE, "not a valid form"),
        (part("file", "x"), TYPE, "not a valid form"),
        (part("model", "m") + "--b--\r\n", TYPE, "'file' is missing"),
        ("--b\r\n\r\nx\r\n--b--\r\n", TYPE, "not a valid form"),
        (part("model", "m" * 2000) + "--b--\r\n", TYPE, "not a long text"),
        (part("x", "y") * 101 + "--b--\r\n", TYPE, "not a valid form"),
        ("--b\r\nContent-Disposition: " + "x" * 10**6, TYPE, "not a valid form"),
    ],
)
def test_what_is_no_form_is_refused(body: str, content_type: str | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_form(body.encode(), content_type, needs="file")


def test_a_long_file_is_not_copied() -> None:
    body = (part("file", "x\r\n--" * 2**20) + part("model", "whisper") + "--b--\r\n").encode()
    tracemalloc.start()
    try:
        assert read_form(body, TYPE, needs="file").model == "whisper"
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
