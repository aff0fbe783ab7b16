"""The account of the request that a task serves, and the models that it may use."""

from contextvars import ContextVar
from typing import Final

from nodeagent.access.gate import Account
from nodeagent.errors import ModelForbidden

# None while the node has no API keys, and on paths that need none.
account_var: Final = ContextVar[Account | None]("account", default=None)


def may_use(model_id: str) -> bool:
    """Whether this request's key is for the model."""
    account = account_var.get()
    return account is None or account.may_use(model_id)


def check_model(model_id: str, known: list[str]) -> None:
    """Refuse a model that this request's key is not for; `known` are all models. Raises ModelForbidden."""
    account = account_var.get()
    if account is not None and not account.may_use(model_id):
        raise ModelForbidden(account.name, model_id, [other for other in known if account.may_use(other)])
