"""What loads took outlasts the agent, in a file that may be damaged, large, or impossible to write."""

import os
from pathlib import Path

import pytest

from nodeagent.llama_server.measured_loads import Load, MeasuredLoads, Shortage


def load(key: str = "k", load_s: float = 4.0, memory_bytes: int | None = 1000) -> Load:
    return Load(key=key, model_id="m", device_id="gpu:0", load_s=load_s, memory_bytes=memory_bytes)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    loads = MeasuredLoads(file)
    assert (loads.get("k"), loads.changes) == (None, 0)
    loads.put(load())
    loads.put(load("other", memory_bytes=None))
    assert loads.changes == 2
    loads.write(loads.encoded())
    again = MeasuredLoads(file)
    assert again.get("k") == load()
    assert again.get("other") == load("other", memory_bytes=None)
    assert [path.name for path in tmp_path.iterdir()] == ["loads.json"]


def test_the_time_is_an_average_and_the_memory_the_last_that_is_known(tmp_path: Path) -> None:
    loads = MeasuredLoads(tmp_path / "loads.json")
    for one in (load(), load(load_s=8.0, memory_bytes=2000), load(load_s=5.0, memory_bytes=None)):
        loads.put(one)
    assert loads.get("k") == load(load_s=5.0, memory_bytes=2000)


def test_the_oldest_go_first(tmp_path: Path) -> None:
    loads = MeasuredLoads(tmp_path / "loads.json")
    for number in range(256):
        loads.put(load(str(number)))
    loads.put(load("0"))  # used again
    loads.put(load("new"))
    assert loads.get("1") is None
    assert loads.get("0") == load("0")
    loads.write(loads.encoded())
    assert MeasuredLoads(tmp_path / "loads.json").get("2") == load("2")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"loads": [{"key": "k"}]}',
        b'{"loads": [{"key": "k", "model_id": "m", "device_id": "d", "load_s": -1}]}',
        b'{"loads": [{"key": "k", "model_id": "m", "device_id": "d", "load_s": 1, "memory_bytes": -1}]}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"loads": ' + b" " * 2**21 + b"[]}",
    ],
    ids=["empty", "cut", "list", "keys", "negative time", "negative memory", "binary", "deep", "large"],
)
def test_a_damaged_file_is_ignored_with_one_line_in_the_log(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "loads.json"
    file.write_bytes(content)
    loads = MeasuredLoads(file)
    assert loads.get("k") is None
    [line] = caplog.messages
    assert line.startswith(f"{file} can't be read, so loads are measured anew: ")
    loads.put(load())
    loads.write(loads.encoded())
    assert MeasuredLoads(file).get("k") == load()


def test_a_file_that_can_not_be_written_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    loads = MeasuredLoads(folder / "loads.json")
    loads.put(load())
    for _ in range(2):
        loads.write(loads.encoded())
    assert caplog.messages == [
        f"{folder / 'loads.json'} can't be written, so measured loads are not kept: {os.strerror(2)}"
    ]
    folder.mkdir()
    loads.write(loads.encoded())
    assert MeasuredLoads(folder / "loads.json").get("k") == load()


def test_what_ran_out_of_memory_is_kept_until_it_is_loaded_or_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    loads = MeasuredLoads(file)
    for key in ("k", "other"):
        loads.put_shortage(Shortage(key=key, model_id="m", device_id="gpu:0", least_bytes=5000))
    loads.write(loads.encoded())
    again = MeasuredLoads(file)
    assert again.shortage("k") == Shortage(key="k", model_id="m", device_id="gpu:0", least_bytes=5000)
    again.put(load(memory_bytes=None))
    assert again.shortage("k") is not None, "nobody knows what it took"
    again.put(load())
    assert again.shortage("k") is None
    assert (again.drop_shortage("other"), again.drop_shortage("other"), again.changes) == (True, False, 3)
    for number in range(300):
        again.put_shortage(Shortage(key=str(number), model_id="m", device_id="gpu:0", least_bytes=1))
    assert (again.shortage("43"), again.shortage("44") is None) == (None, False)
