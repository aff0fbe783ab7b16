"""Waiting for what another process does."""

import time
from collections.abc import Callable


def wait_until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    """Return once it is true; fail if that takes longer than `within_s`."""
    until = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until, f"not within {within_s} s"
        time.sleep(0.02)
