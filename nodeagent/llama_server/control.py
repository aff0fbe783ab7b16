"""The client for what the agent itself asks a child; requests of others go by `connection`."""

import httpx


def control_client(api_key: str, timeout_s: float) -> httpx.AsyncClient:
    """A client that shows the child its key, for one question or a few.

    A new one for each: no pool that a cancelled question could wedge, and no connection left to time out. The
    environment's proxies are not asked for what is on this host.
    """
    # No `verify`: to load certificates that plain HTTP does not need takes 40 ms.
    headers = {"Authorization": f"Bearer {api_key}"}
    return httpx.AsyncClient(timeout=timeout_s, trust_env=False, verify=False, headers=headers)
