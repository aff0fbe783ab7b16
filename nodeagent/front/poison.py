"""Quarantine for poison requests: after two crashes on the same body, that body is rejected for 60 s. Pure.

Without it one request, sent again and again, could crash every server of the node. Only after a crash is anything
hashed, so that ordinary requests pay nothing. A body that is answered after all is forgiven: the crash had another
cause.
"""

import hashlib

import msgspec

BLOCKED_S = 60.0
_CRASHES_TO_BLOCK = 2


class _Record(msgspec.Struct, frozen=True):
    crashes: int
    expires_at: float


class PoisonGuard:
    """The bodies that servers crashed on, by their SHA-256. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._records: dict[bytes, _Record] = {}

    def __bool__(self) -> bool:
        """Whether it remembers any crash."""
        return bool(self._records)

    def record_crash(self, body: bytes, now: float) -> None:
        """A server crashed while it handled this body."""
        digest = _digest(body)
        before = self._records.get(digest)
        crashes = 1 + (before.crashes if before is not None and before.expires_at > now else 0)
        self._records[digest] = _Record(crashes, now + BLOCKED_S)

    def record_success(self, body: bytes) -> None:
        """This body was answered completely."""
        if self._records:
            self._records.pop(_digest(body), None)

    def blocked_s(self, body: bytes, now: float) -> float:
        """For how many more seconds this body is rejected; 0 if it is not."""
        if not self._records:
            return 0.0
        self._records = {digest: record for digest, record in self._records.items() if record.expires_at > now}
        record = self._records.get(_digest(body)) if self._records else None
        return record.expires_at - now if record is not None and record.crashes >= _CRASHES_TO_BLOCK else 0.0


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()
