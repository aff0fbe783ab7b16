"""Which keys are let in, and what the gate remembers, in virtual time and with its real files."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from nodeagent.access.gate import Account, Gate, today
from nodeagent.access.sums import sums_file
from nodeagent.config import ApiKeyConfig, key_file, read_key_file
from nodeagent.config.api_keys import digest_of
from nodeagent.config.key_file import write_key_file
from nodeagent.errors import (
    ConfigError,
    InvalidApiKey,
    KeyLimitReached,
    KeyQuotaUsedUp,
    Problem,
    RoleForbidden,
    StartupError,
    Unauthorized,
)
from nodeagent.releases import Releases

ALICE, BOB = "alice's long secret", "bob's long secret"


def entry(name: str, secret: str, **fields: object) -> ApiKeyConfig:
    return ApiKeyConfig.model_validate({"name": name, "sha256": digest_of(secret), **fields})


def keyed(*entries: ApiKeyConfig) -> dict[str, ApiKeyConfig]:
    return {entry.sha256 or "": entry for entry in entries}


def let_in(gate: Gate, secret: str = ALICE) -> Account:
    account = gate.enter("inference", secret.encode())
    assert account is not None
    return account


async def test_without_keys_everybody_is_let_in_but_to_operators_paths(tmp_path: Path) -> None:
    gate = Gate("token", tmp_path, {})
    assert gate.enter("inference", None) is None
    assert gate.enter("metrics", b"any") is None
    for given in (None, b"any", b"", b"\xff", b"token "):
        with pytest.raises(Unauthorized):
            gate.enter("admin", given)
    assert gate.enter("admin", b"token") is not None


async def test_with_keys_a_request_needs_a_valid_one(tmp_path: Path) -> None:
    gate = Gate("token", tmp_path, keyed(entry("alice", ALICE)))
    assert let_in(gate).name == "alice"
    for given, is_missing in ((None, True), (b"", False), (b"wrong", False), (ALICE[:-1].encode(), False)):
        with pytest.raises(InvalidApiKey) as refused:
            gate.enter("inference", given)
        assert refused.value.is_missing is is_missing
    assert gate.enter("inference", b"token") is not None


@pytest.mark.parametrize(
    ("roles", "allowed"),
    [
        (["inference"], {"inference"}),
        (["metrics"], {"metrics"}),
        (["inference", "metrics"], {"inference", "metrics"}),
        (["admin"], {"inference", "metrics", "admin"}),
    ],
)
async def test_a_key_is_for_its_roles(roles: list[str], allowed: set[str], tmp_path: Path) -> None:
    gate = Gate("token", tmp_path, keyed(entry("alice", ALICE, roles=roles)))
    for role in ("inference", "metrics", "admin"):
        if role in allowed:
            assert gate.enter(role, ALICE.encode()) is not None
        else:
            with pytest.raises(RoleForbidden):
                gate.enter(role, ALICE.encode())
    assert gate.is_operator(ALICE.encode()) is ("admin" in allowed)


async def test_limits_hold_while_requests_are_in_flight_and_over_a_change_of_the_keys(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    gate = Gate("token", tmp_path, keyed(entry("alice", ALICE, concurrent_requests=1)))
    with Releases() as stack:
        gate.begin(let_in(gate), stack)
        with pytest.raises(KeyLimitReached):
            gate.begin(let_in(gate), stack)
        gate.replace(keyed(entry("alice", ALICE, concurrent_requests=2)))
        gate.begin(let_in(gate), stack)
        with pytest.raises(KeyLimitReached):
            gate.begin(let_in(gate), stack)
    with Releases() as stack:
        gate.begin(let_in(gate), stack)
        gate.replace(keyed(entry("alice", ALICE, concurrent_requests=2, requests_per_minute=9)))
    assert let_in(gate).meter.in_flight == 0
    assert let_in(gate).sums.requests == 3


async def test_the_tokens_of_a_day_are_counted_by_its_date(tmp_path: Path) -> None:
    day = "2026-03-02"
    gate = Gate("token", tmp_path, keyed(entry("alice", ALICE, tokens_per_day=10)), clock=lambda: day)
    let_in(gate).count_tokens(8, 2)
    with pytest.raises(KeyQuotaUsedUp):
        gate.begin(let_in(gate), Releases())
    day = "2026-03-03"
    gate.begin(let_in(gate), Releases())


@pytest.mark.parametrize(
    ("seconds", "day"),
    [
        (0.0, "1970-01-01"),
        (1772495999.9, "2026-03-02"),
        (1772496000.0, "2026-03-03"),
        (1709164800.0, "2024-02-29"),
    ],
)
def test_a_day_is_that_of_utc(seconds: float, day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: seconds)
    assert today() == day


async def test_a_removed_key_is_not_valid_any_more_and_without_any_nobody_is_let_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate("token", tmp_path, keyed(entry("alice", ALICE), entry("bob", BOB)))
    gate.replace(keyed(entry("bob", BOB)))
    with pytest.raises(InvalidApiKey):
        gate.enter("inference", ALICE.encode())
    gate.replace({})
    for given in (None, ALICE.encode(), BOB.encode()):
        with pytest.raises(InvalidApiKey):
            gate.enter("inference", given)
    assert "only the admin token" in caplog.text


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - what it waits for is in files and logs
            await trio.sleep(0.01)


async def test_a_change_of_the_file_counts_soon_and_a_bad_one_changes_nothing(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> Mapping[str, ApiKeyConfig]:
        try:
            return keyed(*read_key_file(tmp_path))
        except StartupError as error:
            raise ConfigError([Problem(str(error))]) from error

    write_key_file(tmp_path, [entry("alice", ALICE)])
    gate = Gate("token", tmp_path, read())
    await nursery.start(partial(gate.run, read, look_s=0.01))
    write_key_file(tmp_path, [entry("bob", BOB)])
    await until(lambda: [account.name for account in gate.accounts] == ["bob"])
    key_file(tmp_path).write_text("{")
    await until(lambda: "those from before stay valid" in caplog.text)
    assert let_in(gate, BOB).name == "bob"
    key_file(tmp_path).unlink()
    await until(lambda: gate.accounts == [])


async def test_the_sums_outlast_the_agent(tmp_path: Path) -> None:
    keys = keyed(entry("alice", ALICE), entry("bob", BOB))
    gate = Gate("token", tmp_path, keys)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(gate.run, lambda: keys, look_s=0.01, write_s=0.01))
        gate.begin(let_in(gate), Releases())
        let_in(gate).count_tokens(5, 7)
        await until(lambda: sums_file(tmp_path).exists() and '"generated_tokens": 7' in sums_file(tmp_path).read_text())
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(gate.run, lambda: keys))
        let_in(gate, BOB).count_tokens(1, 1)
        nursery.cancel_scope.cancel()
    again = Gate("token", tmp_path, keys)
    used = {account.name: account.sums.prompt_tokens + account.sums.generated_tokens for account in again.accounts}
    assert used == {"alice": 12, "bob": 2}
    assert let_in(again).sums.tokens_on(let_in(again).today()) == 12
    assert (sums_file(tmp_path).stat().st_mode & 0o077) == 0


@pytest.mark.parametrize("content", ["", "[]", "{", '{"alice": {"requests": -1}}', "[" * 100_000, "\x00"])
async def test_damaged_sums_are_a_warning(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sums_file(tmp_path).write_text(content)
    gate = Gate("token", tmp_path, keyed(entry("alice", ALICE)))
    assert let_in(gate).sums.requests == 0
    assert "the sums of API keys begin anew" in caplog.text


async def test_sums_that_cant_be_written_are_one_warning(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = tmp_path / "state"
    gate = Gate("token", state_dir, keyed(entry("alice", ALICE)))
    await nursery.start(partial(gate.run, dict, look_s=0.01, write_s=0.01))
    let_in(gate).count_tokens(1, 1)
    await until(lambda: "can't be written" in caplog.text)
    await trio.sleep(0.1)
    assert caplog.text.count("can't be written") == 1
    state_dir.mkdir()
    await until(lambda: sums_file(state_dir).exists())
