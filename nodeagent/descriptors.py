"""The limit of file descriptors: it is raised at start, and a part of it is kept from clients.

Each connection takes one descriptor, and the request on it may need another to the server. Many systems start a process
with a soft limit of 1024 and a much higher hard one.
"""

import logging
import os
import resource

logger = logging.getLogger(__name__)

# macOS reports no limit, but refuses more than this (OPEN_MAX in sys/syslimits.h).
_UNLIMITED = 10240


def raise_limit() -> int:
    """Raise the soft limit to the hard one, as any daemon with many connections does; return the limit in effect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _UNLIMITED if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError) as error:
            logger.warning("the limit of file descriptors stays at %d: %s", soft, error)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def limit() -> int:
    """The limit in effect now: an administrator may change it while the agent runs."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def in_use() -> int:
    """How many descriptors are open. Takes about a millisecond for 2,000. Raises OSError if not even one is free."""
    return len(os.listdir("/dev/fd")) - 1  # without the one that lists them
