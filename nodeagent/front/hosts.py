"""By which names browsers may reach this node: against DNS rebinding.

A page of evil.example can have its own name resolve to this node's address. To the browser the page and the node are
then one origin, so the page may read what it gets; but its requests still name evil.example as their Host, and pages
can't change that. So a browser's request must name the node by an IP address, a name of loopback, or a name of its own.

Programs other than browsers resolve only names that their users gave them: their requests are not checked.
"""

import ipaddress

from nodeagent.errors import HostForbidden
from nodeagent.front.seam import Node


def refuse_foreign_host(node: Node, host: str | None, *, origin: str | None, fetch_site: str | None) -> None:
    """Raise HostForbidden for a browser's request (one with an Origin or Sec-Fetch-Site) to a name of someone else."""
    if host is None or (origin is None and fetch_site is None):
        return
    name = name_of(host)
    if not (_is_address(name) or _is_loopback(name) or name in node.host_names):
        raise HostForbidden(name)


def name_of(host: str) -> str:
    """The name or address in a header Host, without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def _is_loopback(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")  # RFC 6761: browsers look neither up


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
