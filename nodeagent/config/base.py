"""What all keys of the configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Keys(BaseModel):
    """Strict, closed and frozen."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
