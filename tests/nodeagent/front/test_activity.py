"""What is kept of past requests, in memory and in the file, and how it is asked for."""

import json
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from quart import Blueprint
from quart_trio import QuartTrio
from trio.testing import MockClock

from fakes.asgi import Exchange
from nodeagent.errors import Refusal
from nodeagent.front.activity import Activity, Record, as_json, user_agent_of
from nodeagent.front.activity_file import ActivityFile
from nodeagent.front.activity_routes import add_routes
from nodeagent.front.bodies import KeptBodies, Limits
from nodeagent.front.refusals import refusal_response


def add(activity: Activity, count: int = 1, kept: KeptBodies | None = None, **fields: Any) -> None:
    record: dict[str, Any] = {
        "request_id": "r",
        "began_at": 1_700_000_000.5,
        "path": "/v1/x",
        "duration_ms": 1.5,
        "status": 200,
    }
    for _ in range(count):
        activity.add(Record(id=activity.last_id + 1, **(record | fields)), kept)


def ids(activity: Activity, limit: int = 1000, since: int = 0) -> list[int]:
    return [record.id for record in activity.newest(lambda _record: True, limit=limit, since=since)]


async def test_the_newest_records_are_kept_and_their_numbers_go_on() -> None:
    activity = Activity(3)
    add(activity, 5)
    assert (ids(activity), activity.last_id) == ([5, 4, 3], 5)
    assert ids(activity, limit=2) == [5, 4]
    assert ids(activity, since=4) == [5]
    assert ids(activity, since=99) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [(b"curl/8.1", "curl/8.1"), (b"a\x1b[0m\nb", "a?[0m?b"), (b"x" * 999, "x" * 200), (b"\xff", "\xff"), (b"", "")],
)
def test_a_clients_program_is_shortened_and_has_no_control_characters(value: bytes, shown: str) -> None:
    assert user_agent_of([(b"host", b"h"), (b"user-agent", value)]) == shown


def test_a_client_may_not_tell_its_program() -> None:
    assert user_agent_of([(b"host", b"h")]) is None


def app_of(activity: Activity) -> QuartTrio:
    app = QuartTrio(__name__, static_folder=None)
    routes = Blueprint("operators", __name__)
    add_routes(routes, activity)
    app.register_blueprint(routes)

    @app.errorhandler(Refusal)
    async def refuse(refusal: Refusal) -> tuple[bytes, int]:
        status, _headers, body = refusal_response(refusal, "r")
        return body, status

    return app


async def asked(activity: Activity, query: str = "", path: str = "/v1/node/activity") -> Exchange:
    exchange = Exchange(method="GET", path=path)
    exchange.scope["query_string"] = query.encode()
    await exchange.through(app_of(activity))
    return exchange


async def test_records_are_filtered(autojump_clock: MockClock) -> None:
    activity = Activity()
    add(activity, model_id="a", key_name="alice")
    add(activity, model_id="b", status=404)
    add(activity, model_id="a", status=404)
    for query, found in {
        "": [3, 2, 1],
        "model_id=a": [3, 1],
        "status=404": [3, 2],
        "key=alice": [1],
        "model_id=a&status=404": [3],
        "since=2": [3],
        "limit=1": [3],
        "model_id=none": [],
    }.items():
        content = (await asked(activity, query)).content
        assert [record["id"] for record in content["activity"]] == found, query
    first = (await asked(activity, "key=alice")).content["activity"][0]
    assert (first["time"], first["tokens_per_s"]) == ("2023-11-14T22:13:20.500Z", None)


async def test_one_record_is_shown_with_its_bodies_and_the_list_only_says_that_there_are_some(
    autojump_clock: MockClock,
) -> None:
    activity = Activity()
    activity.bodies.limit(Limits(100, 1000))
    kept = KeptBodies(activity.bodies)
    kept.requested([(b"content-type", b"application/json")], '{"a": "ä"}'.encode())
    kept.answered("text/event-stream").add(b"data: secret\n\n")
    add(activity)
    add(activity, kept=kept)
    listed = (await asked(activity)).content["activity"]
    assert [(record["id"], record["has_bodies"]) for record in listed] == [(2, True), (1, False)]
    assert "secret" not in json.dumps(listed)
    shown = (await asked(activity, path="/v1/node/activity/2")).content
    assert shown == {name: value for name, value in listed[0].items() if name != "has_bodies"} | {
        "request_body": {"type": "application/json", "bytes": 11, "cut": False, "text": '{"a": "ä"}'},
        "answer_body": {"type": "text/event-stream", "bytes": 14, "cut": False, "text": "data: secret\n\n"},
    }
    without = (await asked(activity, path="/v1/node/activity/1")).content
    assert (without["id"], without["request_body"], without["answer_body"]) == (1, None, None)


@pytest.mark.parametrize("number", [0, 3, 10**30])
async def test_a_record_that_is_not_kept_is_not_found(number: int, autojump_clock: MockClock) -> None:
    activity = Activity(1)
    add(activity, 2)
    error = await asked(activity, path=f"/v1/node/activity/{number}")
    assert error.error() == (404, "record_not_found")
    assert (await asked(activity, path="/v1/node/activity/1")).error() == (404, "record_not_found")
    assert (await asked(activity, path="/v1/node/activity/2")).content["id"] == 2


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("since=-1", "since"),
        ("since=" + "9" * 50, "since"),
        ("status=99", "status"),
        ("status=%C2%B2", "status"),
    ],
)
async def test_a_wrong_number_is_named(query: str, name: str, autojump_clock: MockClock) -> None:
    error = (await asked(Activity(), query)).content["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", name)


async def test_a_follower_gets_each_new_record_once_and_comments_meanwhile(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    activity = Activity()
    add(activity, 2)
    exchange = Exchange((b"last-event-id", b"1"), method="GET", path="/v1/node/activity")
    exchange.scope["query_string"] = b"follow=true&model_id=a"
    nursery.start_soon(partial(exchange.through, app_of(activity)), name="follower")
    await trio.sleep(1)
    add(activity, model_id="a")
    add(activity, model_id="b")
    await trio.sleep(20)
    add(activity, model_id="a")
    await trio.sleep(1)
    text = b"".join(message.get("body", b"") for message in exchange.sent[1:]).decode()
    events = [line for line in text.splitlines() if line.startswith("id: ")]
    assert events == ["id: 3", "id: 5"]
    assert text.startswith(": nothing new\n\n")
    assert text.count(": nothing new") >= 2
    assert json.loads(text.split("data: ")[1].splitlines()[0])["model_id"] == "a"
    nursery.cancel_scope.cancel()


async def recording(path: Path, activity: Activity, count: int, *, max_rows: int = 100) -> None:
    """Add records while the file is written, to its end."""
    file = ActivityFile(path, activity, max_rows=max_rows)
    file.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(file.run, write_s=0.01))
        add(activity, count - 1, model_id="a", tokens_per_s=1.5, streamed=True)
        await trio.sleep(0.1)
        add(activity, user_agent="last")
        nursery.cancel_scope.cancel()


async def test_records_outlast_the_agent_and_their_numbers_go_on(tmp_path: Path) -> None:
    path = tmp_path / "new" / "activity.sqlite"
    first = Activity(10)
    await recording(path, first, 4)
    again = Activity(3)
    await recording(path, again, 2)
    assert ids(again) == [6, 5, 4]
    everything = Activity(10)
    ActivityFile(path, everything).open()
    assert ids(everything) == [6, 5, 4, 3, 2, 1]
    old = first.newest(lambda _: True, limit=9)
    assert [as_json(record) for record in everything.newest(lambda _: True, limit=9)][2:] == list(map(as_json, old))


async def test_the_file_keeps_no_more_than_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "activity.sqlite"
    await recording(path, Activity(), 30, max_rows=7)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*), max(id) FROM activity").fetchone() == (7, 30)
    database.close()


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
async def test_a_damaged_file_is_set_aside(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "activity.sqlite"
    path.write_bytes(content)
    await recording(path, Activity(), 2)
    assert (tmp_path / "activity.sqlite.damaged").read_bytes() == content
    assert "is damaged" in caplog.text
    again = Activity()
    ActivityFile(path, again).open()
    assert ids(again) == [2, 1]


async def test_a_file_of_other_values_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "activity.sqlite"
    await recording(path, Activity(), 2)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE activity SET status = 'no number'")
    database.close()
    activity = Activity()
    ActivityFile(path, activity).open()
    assert ids(activity) == []
    assert "it holds other values" in caplog.text


async def test_a_file_that_cant_be_used_leaves_the_activity_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    activity = Activity()
    await recording(tmp_path / "file" / "activity.sqlite", activity, 3)
    assert ids(activity) == [3, 2, 1]
    assert "in memory only" in caplog.text


async def test_a_file_that_cant_be_written_any_more_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "folder" / "activity.sqlite"
    activity = Activity()
    file = ActivityFile(path, activity)
    file.open()
    for left in path.parent.iterdir():
        left.unlink()
    path.parent.rmdir()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(file.run, write_s=0.01))
        for _ in range(3):
            add(activity)
            await trio.sleep(0.1)
        assert caplog.text.count("can't be written") == 1
        path.parent.mkdir()
        add(activity)
        await trio.sleep(0.2)
        nursery.cancel_scope.cancel()
    again = Activity()
    ActivityFile(path, again).open()
    assert ids(again) == [4]
