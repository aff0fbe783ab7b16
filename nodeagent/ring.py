"""The last so many of something, each with a number that rises, for readers who come and go."""

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """What a reader gets: `items`, the number of the last one, and how many before them are lost to it."""

    items: list[T]
    last: int
    missed: int


class Ring(Generic[T]):
    """Keeps the last `capacity` items, numbered from 1. A reader remembers a number and nothing is kept for it here,
    so a slow one costs nothing, and learns what it missed.

    What changes: everything, in `append` alone.
    """

    def __init__(self, capacity: int) -> None:
        self.last = 0
        self._items: deque[T] = deque(maxlen=capacity)
        self._more = trio.Event()

    def append(self, item: T) -> None:
        self._items.append(item)
        self.last += 1
        self._more.set()
        self._more = trio.Event()

    def after(self, number: int) -> Page[T]:
        """What came after the item of that number. A number that was never given counts as 0: it is of another life."""
        if not 0 <= number <= self.last:
            number = 0
        wanted = self.last - number
        items = list(self._items)[-wanted:] if wanted else []
        return Page(items, self.last, wanted - len(items))

    async def more_than(self, number: int) -> None:
        """Return once there is an item after the one of that number."""
        while self.last <= number:
            await self._more.wait()
