"""Where API keys come from, and what is said of those that can't be used."""

from pathlib import Path

import pytest

from nodeagent.config import ApiKeyConfig, guarding_keys, parse_config, read_api_keys, read_key_file
from nodeagent.config.api_keys import digest_of
from nodeagent.config.key_file import changing, key_file, write_key_file
from nodeagent.errors import ConfigError, StartupError

MINIMAL = "models: [{model_id: a, path: a.gguf}]\nstate_dir: state\n"
SECRET = "a-secret-of-some-length"


def keys_of(text: str, folder: Path) -> dict[str, str]:
    keys = read_api_keys(parse_config(MINIMAL + text, folder / "n.yaml"))
    return {digest: entry.name for digest, entry in keys.items()}


def complaints(text: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        guarding_keys(parse_config(MINIMAL + text, folder / "n.yaml"))
    return str(caught.value)


def test_a_key_comes_from_its_hash_a_file_the_environment_or_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("the-key-of-a-file\n")
    (tmp_path / "credential").write_text("the-key-of-systemd")
    monkeypatch.setenv("KEY", "the-key-of-the-environment")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    text = f"""api_keys:
  - {{name: hash, sha256: {digest_of(SECRET)}}}
  - {{name: file, file: key}}
  - {{name: env, env: KEY}}
  - {{name: systemd, credential: credential}}
"""
    assert keys_of(text, tmp_path) == {
        digest_of(SECRET): "hash",
        digest_of("the-key-of-a-file"): "file",
        digest_of("the-key-of-the-environment"): "env",
        digest_of("the-key-of-systemd"): "systemd",
    }


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("{name: a}", "api_keys[0]: must have exactly one of sha256, file, env and credential, found none"),
        ("{name: a, env: A, file: b}", "exactly one of sha256, file, env and credential, found file and env"),
        ("{name: a b, env: A}", "api_keys[0].name: must be a name of letters, digits"),
        ("{name: a, sha256: ABC}", "api_keys[0].sha256: must be 64 hexadecimal digits in lower case, found 'ABC'"),
        ("{name: a, env: A, roles: [root]}", "api_keys[0].roles[0]: must be"),
        ("{name: a, env: A, roles: []}", "api_keys[0].roles: must not be empty"),
        ("{name: a, env: A, models: [b]}", "api_keys[0].models[0]: must be the model_id of a model (a), found 'b'"),
        ("{name: a, env: A, tokens_per_day: 0}", "api_keys[0].tokens_per_day: must be at least 1, found 0"),
        ("{name: a, env: A, priorty: batch}", "api_keys[0].priorty: is not a known key; did you mean priority?"),
        ("{name: a, env: NOT_SET}", "api_keys[0].env: the environment variable NOT_SET is not set"),
        ("{name: a, file: missing}", "api_keys[0].file: can't be read:"),
        ("{name: a, credential: c}", "api_keys[0].credential: there is no credential 'c'"),
        ("{name: a, env: SHORT}", "api_keys[0].env: the environment variable SHORT must hold a key of 16 to 512"),
    ],
)
def test_what_is_wrong_with_a_key_is_said(
    entry: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORT", "too short")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert complaint in complaints(f"api_keys: [{entry}]\n", tmp_path)


def test_no_two_keys_have_the_same_name_or_the_same_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", SECRET)
    same_name = "api_keys: [{name: a, env: KEY}, {name: a, env: KEY}]\n"
    assert "api_keys[1].name: 'a' is already the name of api_keys[0]" in complaints(same_name, tmp_path)
    same_key = "api_keys: [{name: a, env: KEY}, {name: b, env: KEY}]\n"
    assert "api_keys[1].env: is the same key as that of 'a'" in complaints(same_key, tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "'::'", "192.0.2.1", "node.example"])
def test_an_address_that_others_reach_needs_a_key_or_an_explicit_choice(host: str, tmp_path: Path) -> None:
    text = f"listen_host: {host}\n"
    said = complaints(text, tmp_path)
    assert "n.yaml:3: listen_host: others can reach" in said
    assert f"`rolemesh-node-agent keys add NAME --config {tmp_path / 'n.yaml'}`" in said
    assert "allow_unauthenticated: true" in said
    assert guarding_keys(parse_config(f"{MINIMAL}{text}allow_unauthenticated: true\n", tmp_path / "n.yaml")) == {}
    entry = ApiKeyConfig(name="a", sha256=digest_of(SECRET))
    (tmp_path / "state").mkdir()
    write_key_file(tmp_path / "state", [entry])
    assert guarding_keys(parse_config(MINIMAL + text, tmp_path / "n.yaml")) == {digest_of(SECRET): entry}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "'::1'", "localhost"])
def test_loopback_needs_no_key(host: str, tmp_path: Path) -> None:
    assert guarding_keys(parse_config(f"{MINIMAL}listen_host: {host}\n", tmp_path / "n.yaml")) == {}


def test_the_file_of_keys_comes_back_as_it_was_written_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    entries = (
        ApiKeyConfig(name="a", sha256=digest_of("a"), roles=("metrics",), models=("m",), priority="batch"),
        ApiKeyConfig(name="b", sha256=digest_of("b"), tokens_per_day=7),
    )
    assert read_key_file(tmp_path) == ()
    with changing(tmp_path):
        write_key_file(tmp_path, entries)
    assert read_key_file(tmp_path) == entries
    assert key_file(tmp_path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "{", "{}", '[{"name": "a"}]', '[{"name": "a", "sha256": "x"}]', "\x00"])
def test_a_damaged_file_of_keys_is_an_error_and_lets_nobody_in(content: str, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    key_file(tmp_path / "state").write_text(content)
    with pytest.raises(StartupError, match="is damaged"):
        read_key_file(tmp_path / "state")
    assert "state_dir: " in complaints("", tmp_path)


def test_a_name_is_not_both_in_the_configuration_and_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", SECRET)
    (tmp_path / "state").mkdir()
    write_key_file(tmp_path / "state", [ApiKeyConfig(name="a", sha256=digest_of("other"))])
    assert "api_keys: 'a' was made by command too" in complaints("api_keys: [{name: a, env: KEY}]\n", tmp_path)


def test_a_file_of_keys_that_cant_be_used_is_an_error(tmp_path: Path) -> None:
    key_file(tmp_path).mkdir()
    with pytest.raises(StartupError, match="can't be read"):
        read_key_file(tmp_path)
    with pytest.raises(StartupError, match="can't be written"):
        write_key_file(tmp_path / "missing", [])
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="can't be used"), changing(tmp_path / "file" / "below"):
        pytest.fail("it can't be locked")
