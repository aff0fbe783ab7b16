"""Which keys a reload applies, and which need a restart. Reading the file again."""

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from nodeagent.config import NodeConfig, load_config, parse_config
from nodeagent.errors import ConfigError
from nodeagent.reload import FIXED_KEYS, compare, log_warnings, merge, read_again

A: dict[str, Any] = {"model_id": "a", "path": "/a.gguf"}
B: dict[str, Any] = {"model_id": "b", "path": "/b.gguf"}


def config_of(*models: dict[str, Any], **keys: Any) -> NodeConfig:
    return parse_config(json.dumps({"node_id": "box", "models": models} | keys), Path("/node.yaml"))


@pytest.mark.parametrize(
    ("after", "added", "changed", "removed"),
    [
        ((A, B), (), (), ()),
        ((B, A), (), (), ()),
        ((A,), (), (), ("b",)),
        ((B, {**A, "model_id": "c"}), ("c",), (), ("a",)),
        (({**A, "ctx_size": 512}, B), (), ("a",), ()),
        (({**A, "idle_unload_s": 5}, {**B, "alias": "x"}), (), ("a", "b"), ()),
    ],
)
def test_models_are_compared_by_id_and_by_all_their_keys(
    after: tuple[dict[str, Any], ...], added: tuple[str, ...], changed: tuple[str, ...], removed: tuple[str, ...]
) -> None:
    what = compare(config_of(A, B), config_of(*after))
    assert (what.added, what.changed, what.removed) == (added, changed, removed)
    assert what.needs_restart == ()


CHANGES: dict[str, Any] = {
    "listen_host": "127.0.0.2",
    "listen_port": 1,
    "agent_check_port": 2,
    "node_id": "other",
    "node_name": "Other",
    "state_dir": "/elsewhere",
    "dispatcher_base_url": "http://127.0.0.1:9000",
    "dispatcher_token_file": "/token",
    "advertise_url": "http://10.0.0.5:8081",
    "heartbeat_interval_s": 20,
    "llama_server_bin": "/other/llama-server",
    "memory_settle_timeout_s": 9,
    "memory_reserve_bytes": 1000,
    "max_request_bytes": 1000,
    "activity.max_records": 5,
    "activity.path": "/activity.sqlite",
    "otlp_endpoint": "http://127.0.0.1:4318",
    "backend": "cpu",
    "devices": [{"device_id": "cpu:0"}],
}


def test_every_fixed_key_has_a_change_here() -> None:
    assert CHANGES.keys() == set(FIXED_KEYS)


@pytest.mark.parametrize("key", FIXED_KEYS)
def test_a_key_that_only_a_restart_changes_keeps_its_old_value_and_is_named(key: str) -> None:
    keys = {"state_dir": "/state", "node_name": "Box"}
    whole, _, part = key.partition(".")
    change = {whole: {part: CHANGES[key]} if part else CHANGES[key]}
    before, after = config_of(A, **keys), config_of(A, **(keys | change), queue_timeout_s=7)
    assert compare(before, after).needs_restart == (key,)
    merged = merge(before, after)
    assert attrgetter(key)(merged) == attrgetter(key)(before)
    assert merged.queue_timeout_s == 7
    assert merged.source is after.source


def test_a_reload_may_turn_the_bodies_in_the_activity_on_and_off() -> None:
    before = config_of(A, activity={"max_records": 5})
    after = config_of(A, activity={"max_records": 6, "bodies": True, "max_body_bytes": 7, "max_bodies_bytes": 8})
    assert compare(before, after).needs_restart == ("activity.max_records",)
    activity = merge(before, after).activity
    assert (activity.max_records, activity.bodies) == (5, True)
    assert (activity.max_body_bytes, activity.max_bodies_bytes) == (7, 8)
    assert merge(after, before).activity.bodies is False


TLS = {"tls_cert": "/cert", "tls_key": "/key"}


@pytest.mark.parametrize(("old", "new"), [({}, TLS), (TLS, {})])
def test_whether_the_address_speaks_tls_only_a_restart_changes(old: dict[str, str], new: dict[str, str]) -> None:
    before, after = config_of(A, **old), config_of(A, **new)
    assert compare(before, after).needs_restart == ("tls_cert", "tls_key")
    assert merge(before, after).tls_cert == before.tls_cert


def test_a_reload_may_change_the_certificate() -> None:
    before, after = config_of(A, **TLS), config_of(A, **(TLS | {"tls_cert": "/new"}))
    assert compare(before, after).needs_restart == ()
    assert merge(before, after).tls_cert == Path("/new")


def write(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({"models": [A], "llama_server_bin": "./llama-server"} | keys))


def test_the_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "llama-server").touch(mode=0o755)
    file = tmp_path / "node.yaml"
    write(file)
    before = load_config(file)
    write(file, queue_timeout_s=7)
    assert read_again(before).config.queue_timeout_s == 7


def test_reading_again_fails_if_the_file_is_bad_or_the_server_is_missing(tmp_path: Path) -> None:
    (tmp_path / "llama-server").touch(mode=0o755)
    file = tmp_path / "node.yaml"
    write(file)
    before = load_config(file)
    write(file, llama_server_bin="./missing")
    with pytest.raises(ConfigError, match="llama_server_bin"):
        read_again(before)
    write(file, queue_timeout_s="soon")
    with pytest.raises(ConfigError, match="queue_timeout_s"):
        read_again(before)
    file.unlink()
    with pytest.raises(ConfigError, match="can't be read"):
        read_again(before)


def test_a_configuration_made_in_code_can_not_be_read_again() -> None:
    with pytest.raises(ConfigError, match="did not come from a file"):
        read_again(NodeConfig.model_validate({"models": (A,)}, strict=False))


def test_each_warning_is_one_line_of_the_log_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    log_warnings(config_of(A))
    assert caplog.records == []
    log_warnings(config_of(A, residency_linger_s=1))
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("/node.yaml:1: residency_linger_s: ")
    caplog.clear()
    log_warnings(config_of(A, activity={"bodies": True}))
    [record] = caplog.records
    assert record.getMessage().startswith("/node.yaml:1: activity.bodies: the bodies of requests and answers are kept")
