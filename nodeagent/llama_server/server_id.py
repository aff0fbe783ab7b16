"""The name of a server among the supervisor's children: its device and its model."""

import msgspec


class ServerId(msgspec.Struct, frozen=True):
    """`str()` is the id of the child, `cpu:0/planner`; a device id has no slash, a model id may have one."""

    device_id: str
    model_id: str

    @classmethod
    def parse(cls, child_id: str) -> "ServerId":
        """The reverse of `str()`."""
        device_id, _, model_id = child_id.partition("/")
        return cls(device_id, model_id)

    def __str__(self) -> str:
        return f"{self.device_id}/{self.model_id}"
