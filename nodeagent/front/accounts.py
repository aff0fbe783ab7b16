"""The account of the request that a task serves, and the models that it may use."""

from contextvars import ContextVar
from typing import Final

from nodeagent.access.gate import Account

# None while the node has no API keys, and on paths that need none.
account_var: Final = ContextVar[Account | None]("account", default=None)


def may_use(model_id: str) -> bool:
    """Whether this request's key is for the model."""
    account = account_var.get()
    return account is None or account.may_use(model_id)
