"""Keeps one request from felling every server: a body that two servers died under is refused for a while. Pure.

Only after a crash is anything hashed, so that ordinary requests pay nothing. A body that was answered after all is
forgiven: its server died of something else.
"""

import hashlib
from dataclasses import dataclass

BLOCKED_S = 60.0
_FALLS = 2


@dataclass(frozen=True, slots=True)
class _Record:
    falls: int
    until: float


class PoisonGuard:
    """The bodies that servers died under, by their SHA-256. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._records: dict[bytes, _Record] = {}

    def felled(self, body: bytes, now: float) -> None:
        """A server died under this body."""
        digest = hashlib.sha256(body).digest()
        before = self._records.get(digest)
        falls = 1 + (before.falls if before is not None and before.until > now else 0)
        self._records[digest] = _Record(falls, now + BLOCKED_S)

    def survived(self, body: bytes) -> None:
        """This body was answered."""
        if self._records:
            self._records.pop(hashlib.sha256(body).digest(), None)

    def blocked_s(self, body: bytes, now: float) -> float:
        """For how long this body is still refused; 0 where it is not."""
        self._records = {digest: record for digest, record in self._records.items() if record.until > now}
        if not self._records:
            return 0.0
        record = self._records.get(hashlib.sha256(body).digest())
        return record.until - now if record is not None and record.falls >= _FALLS else 0.0
