"""The limit of file descriptors: raised at start, and what of it clients may use.

Each connection takes one descriptor, and the request on it may need another to the server. The agent's own probes,
spawns, files and its dispatcher must still find some when clients hold all the rest.
"""

import logging
import resource

logger = logging.getLogger(__name__)

# Listeners, log, event loop, locks, the dispatcher's connection, model headers; per device a server's pipe, its pidfd,
# probes and a spawn.
_RESERVE = 64
_RESERVE_PER_DEVICE = 16
# A connection and the request's own connection to a server.
_PER_CONNECTION = 2
_LEAST_CONNECTIONS = 8
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


def connections_allowed(limit: int, devices: int) -> int:
    """How many client connections fit below this limit of descriptors, with the reserve for the agent's own needs."""
    left = limit - _RESERVE - _RESERVE_PER_DEVICE * devices
    return max(_LEAST_CONNECTIONS, left // _PER_CONNECTION)
