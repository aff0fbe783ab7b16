"""The HTTP client for what the agent itself asks a child; requests of clients go through `relay`."""

import httpx


def control_client(api_key: str, timeout_s: float) -> httpx.AsyncClient:
    """A client that sends the child its key, for one request or a few.

    A new one each time: no pool that a cancelled request could block, and no idle connection. The proxies in the
    environment are ignored, since the child is on this host.
    """
    # Without `verify`: loading certificates, which plain HTTP does not need, takes 40 ms.
    headers = {"Authorization": f"Bearer {api_key}"}
    return httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=False, headers=headers)
