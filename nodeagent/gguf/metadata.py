"""The metadata of one model file by key, with the types of its values checked."""

from collections.abc import Mapping
from pathlib import Path

from nodeagent.gguf.file import GgufError, Value


class Metadata:
    """Values by key, with their types checked; `{arch}` in a key stands for the name of the architecture."""

    def __init__(self, path: Path, values: Mapping[str, Value]) -> None:
        self._path = path
        self._values = values
        self.architecture = self.text("general.architecture") or ""

    def text(self, key: str) -> str | None:
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._unusable(key)
        return value

    def number(self, key: str, *, least: int = 0, most: int | None = None) -> int | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            raise self._unusable(key)
        return value

    def required(self, key: str, *, most: int | None = None) -> int:
        value = self.number(key, least=1, most=most)
        if value is None:
            raise GgufError(self._path, f"has no {self._full(key)}: not a model that llama.cpp can load")
        return value

    def by_layer(self, key: str, layers: int) -> tuple[int, ...] | None:
        """One number for each layer; the file has either these or a single one for all layers."""
        value = self.value(key)
        if value is None:
            return None
        values = value if isinstance(value, tuple) else (value,) * layers
        numbers = tuple(number for number in values[:layers] if isinstance(number, int) and number >= 0)
        if len(numbers) != layers:
            raise self._unusable(key)
        return numbers

    def value(self, key: str) -> Value:
        return self._values.get(self._full(key))

    def _full(self, key: str) -> str:
        return key.replace("{arch}", self.architecture)

    def _unusable(self, key: str) -> GgufError:
        return GgufError(self._path, f"damaged: invalid value of {self._full(key)}")
