"""Reloading the configuration of a whole node over fake processes.

The file is read in a thread; no deadline is pending meanwhile, so the virtual clock does not jump.
"""

import logging
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.node_with_fakes import FakeDispatcherClient, NodeWithFakes, loaded, request_in_flight
from nodeagent.config.api_keys import digest_of
from nodeagent.errors import ReloadRefused


async def test_a_reload_adds_changes_and_removes_models(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, device_ids=["cpu:0", "cpu:1"])
    node = await parts.start(nursery)
    node.dispatcher = client = FakeDispatcherClient()
    await node.load("a", "cpu:0")
    await node.load("b", "cpu:1")
    parts.write_config(
        models=[{"model_id": "b", "path": "b.gguf", "ctx_size": 512}, {"model_id": "c", "path": "c.gguf"}],
        listen_port=1,
        queue_timeout_s=7,
    )
    assert [card.model_id for card in node.cards()] == ["a", "b"]
    what = await node.reload()
    assert (what.added, what.changed, what.removed) == (("c",), ("b",), ("a",))
    assert what.needs_restart == ("listen_port",)
    assert (node.config.listen_port, node.config.queue_timeout_s) == (8081, 7)
    assert [card.model_id for card in node.cards()] == ["b", "c"]
    assert client.calls[-1] == "register_again"
    await trio.sleep(1)
    assert loaded(node) == []
    await node.load("b", "cpu:1")
    assert parts.spawner.running == {"cpu:1/b"}


async def test_what_streams_and_browsers_may_expect_is_changed_by_a_reload(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, stream_ping_s=3, allowed_hosts=["old.example"])
    node = await parts.start(nursery)
    assert (node.stream_ping_s, set(node.host_names)) == (3, {"old.example"})
    parts.write_config(stream_ping_s=0, allowed_hosts=["New.example"])
    node.full_host_name = "box.lan"
    await node.reload()
    assert (node.stream_ping_s, set(node.host_names)) == (0, {"new.example", "box.lan"})


async def test_a_reload_changes_the_api_keys(autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path) -> None:
    parts = NodeWithFakes(tmp_path)
    node = await parts.start(nursery)
    assert node.gate.enter("inference", None) is None
    parts.write_config(api_keys=[{"name": "alice", "sha256": digest_of("secret")}])
    await node.reload()
    assert [account.name for account in node.gate.accounts] == ["alice"]
    assert {entry.name for entry in node.read_api_keys().values()} == {"alice"}
    parts.write_config(api_keys=[{"name": "alice", "env": "NOT_SET_ANYWHERE"}])
    with pytest.raises(ReloadRefused, match="NOT_SET_ANYWHERE is not set"):
        await node.reload()
    assert [account.name for account in node.gate.accounts] == ["alice"]


async def test_a_reload_leaves_unchanged_models_alone_and_lets_requests_on_changed_ones_end(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, device_ids=["cpu:0", "cpu:1"])
    node = await parts.start(nursery)
    await node.load("a", "cpu:0")
    await node.load("b", "cpu:1")
    ticket = await request_in_flight(node, "b")
    a = {"model_id": "a", "path": "a.gguf"}
    parts.write_config(models=[a, {"model_id": "b", "path": "b.gguf", "ctx_size": 512}])
    assert (await node.reload()).changed == ("b",)
    await wait_all_tasks_blocked()
    assert loaded(node) == ["cpu:0/a", "cpu:1/b"]
    ticket.close()
    await trio.sleep(1)
    assert loaded(node) == ["cpu:0/a"]
    assert parts.spawner.processes[0].returncode is None


async def test_a_bad_configuration_is_refused_and_the_old_one_stays(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = NodeWithFakes(tmp_path)
    node = await parts.start(nursery)
    before = node.config
    parts.file.write_text('{"queue_timeout_s": "soon"}')
    with pytest.raises(ReloadRefused) as refusal:
        await node.reload()
    assert any("queue_timeout_s" in problem for problem in refusal.value.problems)
    assert node.config is before
    [line] = messages(caplog, "nodeagent.node")
    assert line.startswith("configuration not reloaded, the old one stays in effect: ")


async def test_a_background_reload_that_is_refused_only_logs_it(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    parts = NodeWithFakes(tmp_path)
    node = await parts.start(nursery)
    parts.file.write_text("{}")
    node.reload_soon()
    while not messages(caplog, "nodeagent.node"):
        await wait_all_tasks_blocked(0.01)
    assert "not reloaded" in messages(caplog, "nodeagent.node")[0]
    parts.write_config(queue_timeout_s=9)
    await node.reload()  # the node goes on
    assert node.config.queue_timeout_s == 9


async def test_each_reload_logs_the_warnings_about_the_file(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = NodeWithFakes(tmp_path)
    node = await parts.start(nursery)
    parts.write_config(residency_linger_s=1)
    for count in (1, 2):
        await node.reload()
        warnings = [it for it in caplog.records if it.name == "nodeagent.reload"]
        assert [it.levelname for it in warnings] == ["WARNING"] * count
        assert "residency_linger_s" in warnings[-1].getMessage()


def messages(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == logger]
