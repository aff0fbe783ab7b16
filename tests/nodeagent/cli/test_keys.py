"""The commands that make, list and remove API keys."""

import json
import stat
from pathlib import Path

import pytest

from nodeagent.access.limits import Sums
from nodeagent.access.sums import encode_sums, sums_file
from nodeagent.cli.main import main
from nodeagent.config import key_file, load_config, read_api_keys, read_key_file
from nodeagent.config.api_keys import digest_of
from nodeagent.whole_files import replace_file


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEY", "a-secret-of-some-length")
    file = tmp_path / "node.yaml"
    file.write_text(
        json.dumps(
            {
                "state_dir": str(tmp_path / "state"),
                "models": [{"model_id": "tiny", "path": "tiny.gguf"}],
                "api_keys": [{"name": "configured", "env": "KEY"}],
            }
        )
    )
    return file


def run(config: Path, *argv: str) -> int:
    return main(["keys", *argv, "--config", str(config)])


def test_a_key_that_was_made_is_printed_alone_and_only_its_hash_is_kept(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--requests-per-minute", "60", "--concurrent-requests", "2", "--tokens-per-day", "1000"]
    assert run(config, "add", "alice", "--role", "inference", "--role", "metrics", "--model", "tiny", *limits) == 0
    out = capsys.readouterr()
    key = out.out.strip()
    assert key.startswith("rmk-")
    assert len(key) > 40
    assert "not shown again" in out.err
    file = key_file(tmp_path / "state")
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    entry = read_api_keys(load_config(config))[digest_of(key)]
    assert (entry.name, entry.roles, entry.models) == ("alice", ("inference", "metrics"), ("tiny",))
    assert (entry.requests_per_minute, entry.concurrent_requests, entry.tokens_per_day) == (60, 2, 1000)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["add", "configured"], "there is a key named 'configured' already"),
        (["add", "two words"], "name: "),
        (["add", "alice", "--model", "missing"], "--model must be the model_id of a model (tiny), found 'missing'"),
        (["add", "alice", "--tokens-per-day", "0"], "tokens_per_day: "),
        (["remove", "nobody"], "there is no key named 'nobody', only: none"),
        (["remove", "configured"], "'configured' is in the configuration (api_keys): remove it there"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_changes(
    argv: list[str], complaint: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, *argv) == 1
    assert complaint in capsys.readouterr().err
    assert read_key_file(tmp_path / "state") == ()


def test_a_name_is_used_once_and_a_removed_key_is_gone(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, "add", "alice") == 0
    assert run(config, "add", "alice") == 1
    assert run(config, "add", "bob") == 0
    assert run(config, "remove", "alice") == 0
    assert capsys.readouterr().out.endswith("Removed the key of alice.\n")
    assert [entry.name for entry in read_key_file(tmp_path / "state")] == ["bob"]


def test_the_list_shows_what_each_key_may_and_has_used(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config, "add", "alice", "--priority", "batch", "--tokens-per-day", "9")
    used = Sums(requests=3, prompt_tokens=4, generated_tokens=5)
    replace_file(sums_file(tmp_path / "state"), encode_sums({"alice": used}))
    capsys.readouterr()
    assert run(config, "list") == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["configured", "inference", "all", "interactive", "none", "0", "0"],
        ["alice", "inference", "all", "batch", "9", "tokens/day", "3", "9"],
    ]
    assert run(config, "list", "--json") == 0
    keys = json.loads(capsys.readouterr().out)["keys"]
    assert [(key["name"], key["used"]["requests"]) for key in keys] == [("configured", 0), ("alice", 3)]
    assert "sha256" not in keys[1]


def test_an_empty_list_says_how_to_make_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(json.dumps({"state_dir": str(tmp_path / "state"), "models": [{"model_id": "a", "path": "a"}]}))
    assert run(file, "list") == 0
    assert "keys add NAME" in capsys.readouterr().out


def test_the_errors_of_a_configuration_are_said(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(json.dumps({"state_dir": str(tmp_path / "state"), "modles": []}))
    assert run(config, "list") == 78
    assert "modles" in capsys.readouterr().err
