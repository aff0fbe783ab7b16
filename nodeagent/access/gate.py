"""Who comes in: the API keys that are valid now, each with its limits and its sums.

                    given            not given
    no key exists   ignored          everybody may use the node; operators need the admin token
    keys exist      must be valid    refused

The admin token is valid everywhere, and has no limits.
"""

import hmac
import logging
import time
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec
import trio

from nodeagent.access.limits import Exceeded, Limits, Meter, Sums
from nodeagent.access.sums import encode_sums, read_sums, sums_file
from nodeagent.config import ApiKeyConfig, Role, key_file
from nodeagent.config.api_keys import digest_of
from nodeagent.containment import Containment
from nodeagent.errors import (
    InvalidApiKey,
    KeyLimitReached,
    KeyQuotaUsedUp,
    NodeAgentError,
    RoleForbidden,
    Unauthorized,
)
from nodeagent.releases import Releases
from nodeagent.whole_files import replace_file

__all__ = ["Account", "Gate", "ReadKeys", "Role", "today"]

logger = logging.getLogger(__name__)

# How soon a key that a command made or removed counts, and how much of the sums a crash of the agent loses.
_LOOK_S: Final = 1.0
_WRITE_S: Final = 10.0
_DAY_S: Final = 86_400
_EPOCH: Final = date(1970, 1, 1)

ReadKeys = Callable[[], Mapping[str, ApiKeyConfig]]
"""Reads every key by its SHA-256. Blocks; raises NodeAgentError."""


class Account(msgspec.Struct, frozen=True):
    """One key while the agent runs. `entry` says what it may do. A new entry of the same name gets the same meter and
    sums."""

    entry: ApiKeyConfig
    meter: Meter
    sums: Sums
    today: Callable[[], str]

    @property
    def name(self) -> str:
        return self.entry.name

    def may_use(self, model_id: str) -> bool:
        """Whether the key is for this model."""
        return self.entry.models is None or model_id in self.entry.models

    def count_tokens(self, prompt: int, generated: int) -> None:
        """Count the tokens of one of its requests."""
        self.sums.add_tokens(self.today(), prompt, generated)


def today() -> str:
    """The day by UTC, `2026-03-02`."""
    return _day(int(time.time()) // _DAY_S)


@lru_cache(maxsize=1)
def _day(number: int) -> str:
    return (_EPOCH + timedelta(number)).isoformat()


class Gate:
    """`settle` is called before the sums of all keys are looked at: it adds to them what has not been added yet.

    What changes: `_accounts` (by SHA-256) and `_must_have_key` in `replace`; the meters and sums in the requests;
    `settle`, once, by its owner.
    """

    def __init__(
        self, admin_token: str, state_dir: Path, keys: Mapping[str, ApiKeyConfig], *, clock: Callable[[], str] = today
    ) -> None:
        self._admin_token = admin_token.encode()
        self._state_dir = state_dir
        self._today = clock
        self._sums = read_sums(sums_file(state_dir))
        self._written = encode_sums(self._sums)
        self._meters: dict[str, Meter] = {}
        self._accounts: dict[str, Account] = {}
        self._must_have_key = False
        self._can_write = True
        self.settle: Callable[[], None] = lambda: None
        self._containment = Containment("looking after the API keys")
        operator = ApiKeyConfig(name="operator", sha256="0" * 64, roles=("admin",))
        self._operator = Account(operator, Meter(Limits(), 0.0), Sums(), clock)
        self.replace(keys)

    @property
    def accounts(self) -> list[Account]:
        """Every key, in the order of the configuration."""
        self.settle()
        return list(self._accounts.values())

    def replace(self, keys: Mapping[str, ApiKeyConfig]) -> None:
        """These keys are valid from now on. Once there was one, a request needs one until the agent is restarted."""
        self._must_have_key = self._must_have_key or bool(keys)
        if self._accounts and not keys:
            logger.warning("there is no API key any more: until a restart, only the admin token lets requests in")
        now = trio.current_time() if keys else 0.0
        meters, sums, accounts = {}, {}, {}
        for digest, entry in keys.items():
            limits = Limits(
                requests_per_minute=entry.requests_per_minute,
                concurrent_requests=entry.concurrent_requests,
                tokens_per_day=entry.tokens_per_day,
            )
            meter = self._meters.get(entry.name) or Meter(limits, now)
            meter.change(limits, now)
            meters[entry.name] = meter
            sums[entry.name] = self._sums.get(entry.name) or Sums()
            accounts[digest] = Account(entry, meter, sums[entry.name], self._today)
        self._meters, self._sums, self._accounts = meters, sums, accounts

    def is_operator(self, given: bytes | None) -> bool:
        """Whether this is the admin token, or a key with the role admin."""
        account = self._find(given)
        return account is not None and "admin" in account.entry.roles

    def enter(self, role: Role, given: bytes | None) -> Account | None:
        """The account of a request that needs that role; None if there are no keys. `given` is the key that it has.

        Raises Unauthorized, InvalidApiKey and RoleForbidden.
        """
        account = self._find(given)
        if account is None:
            if role == "admin":
                raise Unauthorized
            if self._must_have_key:
                raise InvalidApiKey(is_missing=given is None)
            return None
        if role not in account.entry.roles and "admin" not in account.entry.roles:
            raise RoleForbidden(account.name, role)
        return account

    def begin(self, account: Account, held: Releases) -> None:
        """Count a request for inference, until `held` closes. Raises KeyLimitReached and KeyQuotaUsedUp."""
        exceeded = account.meter.begin(trio.current_time(), account.sums.tokens_on(self._today()))
        if exceeded is not None:
            raise _refusal(account.name, exceeded)
        account.sums.requests += 1
        held.add(account.meter.end)

    def _find(self, given: bytes | None) -> Account | None:
        if given is None:
            return None
        if hmac.compare_digest(given, self._admin_token):
            return self._operator
        # Whoever tries keys can't choose their digests, so the time that the search takes tells nothing of a key.
        return self._accounts.get(digest_of(given))

    async def run(
        self,
        read_keys: ReadKeys,
        *,
        look_s: float = _LOOK_S,
        write_s: float = _WRITE_S,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Read the keys again when their file has changed, and write the sums, until cancelled; then a last time."""
        task_status.started()
        seen = _stamp(key_file(self._state_dir))
        write_at = trio.current_time() + write_s
        try:
            while True:
                await trio.sleep(look_s)
                with self._containment:
                    stamp = _stamp(key_file(self._state_dir))
                    if stamp != seen:
                        seen = stamp
                        await self._read_again(read_keys)
                    if trio.current_time() >= write_at:
                        write_at = trio.current_time() + write_s
                        await self._write()
        finally:
            self.write_sums(self._encoded_sums())

    async def _read_again(self, read_keys: ReadKeys) -> None:
        try:
            keys = await trio.to_thread.run_sync(read_keys)
        except NodeAgentError as error:
            logger.error("API keys can't be read again, so those from before stay valid: %s", error)
            return
        self.replace(keys)
        logger.info("API keys are read again: there are %d", len(keys))

    async def _write(self) -> None:
        content = self._encoded_sums()
        if content != self._written:
            await trio.to_thread.run_sync(self.write_sums, content)

    def _encoded_sums(self) -> bytes:
        self.settle()
        return encode_sums(self._sums)

    def write_sums(self, content: bytes) -> None:
        """Write the file of sums if they have changed. Blocks; if that fails, logs so once."""
        if content == self._written:
            return
        try:
            replace_file(sums_file(self._state_dir), content, private=True)
        except OSError as error:
            if self._can_write:
                logger.warning("%s can't be written: %s", sums_file(self._state_dir), error.strerror)
            self._can_write = False
        else:
            self._written, self._can_write = content, True


def _refusal(name: str, exceeded: Exceeded) -> KeyLimitReached | KeyQuotaUsedUp:
    if exceeded.what == "tokens_per_day":
        return KeyQuotaUsedUp(name, exceeded.limit)
    return KeyLimitReached(name, exceeded.what, exceeded.limit, exceeded.retry_after_s)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size
