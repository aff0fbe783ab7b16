"""What the simulated clients do, made from a seed: the same for every policy."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from nodeagent.scheduling.queueing import Priority


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; `at` is the earliest time that it comes, in seconds from the start."""

    model_id: str
    service_s: float
    at: float = 0.0
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a node: each of `clients` asks its requests one after another, and pauses for `think_s` between.

    `feeds` are requests that whichever of their `workers` is free asks next, as a program does that keeps so many
    under way.
    """

    name: str
    clients: tuple[tuple[Ask, ...], ...] = ()
    feeds: tuple[tuple[int, tuple[Ask, ...]], ...] = ()
    think_s: float = 0.02
    devices: int = 1
    slots: int = 1
    load_s: float = 5.0
    max_models: int = 1
    concurrent_models: bool = False


def workloads(seed: int) -> list[Workload]:
    """All of them."""
    return [make(random.Random(seed)) for make in _MAKERS]


def _service_s(rng: random.Random, mean_s: float) -> float:
    """Answers differ in length by their nature: a log-normal with a long tail."""
    return min(20 * mean_s, rng.lognormvariate(-0.32, 0.8) * mean_s)


def _alternating(rng: random.Random) -> Workload:
    asks = tuple(Ask("ab"[number % 2], _service_s(rng, 1.0)) for number in range(200))
    return Workload("alternating", feeds=((16, asks),))


def _alternating_quick(rng: random.Random) -> Workload:
    asks = tuple(Ask("ab"[number % 2], _service_s(rng, 0.1)) for number in range(400))
    return Workload("alternating, quick loads", feeds=((16, asks),), load_s=0.25, think_s=0.005)


def _two_camps(rng: random.Random) -> Workload:
    clients = tuple(tuple(Ask("ab"[number % 2], _service_s(rng, 1.0)) for _ask in range(15)) for number in range(12))
    return Workload("two camps of closed-loop clients", clients=clients)


def _zipf(rng: random.Random) -> Workload:
    weights = [1 / rank for rank in range(1, 9)]
    models = rng.choices("abcdefgh", weights, k=400)
    return Workload(
        "zipf, 8 models, 2 devices", feeds=((24, tuple(Ask(it, _service_s(rng, 1.0)) for it in models)),), devices=2
    )


def _zipf_side_by_side(rng: random.Random) -> Workload:
    return replace(_zipf(rng), name="zipf, 8 models, 2 devices of 3 models each", max_models=3, concurrent_models=True)


def _bursts(rng: random.Random) -> Workload:
    asks, at = [], 0.0
    for _burst in range(20):
        at += rng.expovariate(1 / 12)
        model_id = rng.choice("abc")
        asks += [(Ask(model_id, _service_s(rng, 1.0), at + rng.random()),) for _ask in range(8)]
    return Workload("bursts, 3 models", clients=tuple(asks))


def _batch_and_interactive(rng: random.Random) -> Workload:
    batch = tuple(Ask("a", _service_s(rng, 3.0), priority=Priority.BATCH) for _ask in range(80))
    at, interactive = 0.0, []
    for _ask in range(20):
        at += rng.expovariate(1 / 15)
        interactive.append((Ask("b", _service_s(rng, 1.0), at, Priority.INTERACTIVE),))
    return Workload("a long batch and interactive traffic", clients=tuple(interactive), feeds=((12, batch),))


def _sparse(rng: random.Random) -> Workload:
    clients, at = [], 0.0
    for number in range(60):
        at += rng.expovariate(1 / 12)
        clients.append((Ask("ab"[number % 2], _service_s(rng, 1.0), at),))
    return Workload("sparse, alternating", clients=tuple(clients))


def _one_by_one(rng: random.Random) -> Workload:
    asks = tuple(Ask("ab"[number % 2], _service_s(rng, 0.05)) for number in range(200))
    return Workload("one client, alternating, quick", clients=(asks,), load_s=0.2, think_s=0.005)


def _two_clients(rng: random.Random) -> Workload:
    clients = tuple(tuple(Ask(model, _service_s(rng, 0.2)) for _ask in range(100)) for model in "ab")
    return Workload("two clients, a model each, slow to come back", clients=clients, think_s=0.3, load_s=0.25)


def _slots(rng: random.Random) -> Workload:
    asks = tuple(Ask("ab"[number % 2], _service_s(rng, 2.0)) for number in range(200))
    return Workload("alternating, 4 slots", feeds=((16, asks),), slots=4)


def _one_model(rng: random.Random) -> Workload:
    asks = tuple(Ask("a", _service_s(rng, 1.0)) for _ask in range(200))
    return Workload("one model, 2 devices", feeds=((16, asks),), devices=2)


def _uneven(rng: random.Random) -> Workload:
    """One model that is wanted eight times as often as the other, by clients who each keep to theirs."""
    often = tuple(Ask("a", _service_s(rng, 2.0)) for _ask in range(120))
    seldom = tuple(Ask("b", _service_s(rng, 2.0)) for _ask in range(15))
    return Workload("uneven", feeds=((10, often), (4, seldom)), devices=2)


def _open_loop(rng: random.Random) -> Workload:
    """Requests that come whether or not those before them were answered."""
    clients, at = [], 0.0
    for _ask in range(150):
        at += rng.expovariate(1 / 1.3)
        model_id = rng.choices("ab", (0.7, 0.3))[0]
        clients.append((Ask(model_id, _service_s(rng, 2.0), at),))
    return Workload("open loop, 2 devices", clients=tuple(clients), devices=2)


_MAKERS: list[Callable[[random.Random], Workload]] = [
    _alternating,
    _alternating_quick,
    _two_camps,
    _zipf,
    _zipf_side_by_side,
    _bursts,
    _batch_and_interactive,
    _sparse,
    _one_by_one,
    _two_clients,
    _slots,
    _one_model,
    _uneven,
    _open_loop,
]
