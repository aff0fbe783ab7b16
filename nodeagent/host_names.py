"""The names of this host, by which browsers may reach the node."""

import logging
import socket
from urllib.parse import urlsplit

import trio

logger = logging.getLogger(__name__)

# A resolver that is down may take minutes.
_LOOKUP_TIMEOUT_S = 30.0


def known(*urls: str) -> frozenset[str]:
    """The host's own name, whole and short, also as mDNS has it, and the names in the node's URLs; without a lookup."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    in_urls = {urlsplit(url).hostname or "" for url in urls}
    return frozenset({name, short, f"{short}.local", *in_urls} - {""})


async def full_name() -> str:
    """The host's name with its domain, "" if the resolver does not say in time."""
    with trio.move_on_after(_LOOKUP_TIMEOUT_S):
        try:
            return (await trio.to_thread.run_sync(socket.getfqdn, abandon_on_cancel=True)).lower()
        except (OSError, UnicodeError) as error:
            logger.debug("the host's full name is not known: %s", error)
    return ""
