"""What was served, in sums, for `/metrics`: the requests for inference, how long they took, and their tokens.

They are counted as the answers pass, without a look into more than the first and the last bytes of each: llama-server
says there how many tokens there were (`usage.py`).

Requests that have ended are added up several at a time, or as soon as somebody looks. One by one, figures cost a
quarter more (33 instead of 25 us of a request's 250): what is done in between has taken over the processor's caches.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from nodeagent.errors import InvalidApiKey, Refusal
from nodeagent.front.accounts import account_var
from nodeagent.front.activity import Activity, Record, user_agent_of
from nodeagent.front.bodies import KeptBodies
from nodeagent.front.refusals import code_of
from nodeagent.front.usage import HEAD_BYTES, TAIL_BYTES, Usage, usage_of
from nodeagent.histogram import Histogram

if TYPE_CHECKING:
    from nodeagent.front.first_bytes import InferenceRequest

# Upper bounds of the buckets, in seconds. Of vLLM's, which dashboards for model servers know.
DURATIONS_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
FIRST_TOKENS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
PER_TOKEN_S: Final = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2.0)
WAITS_S: Final = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)

# nginx's status for a client that has closed the connection before its answer began.
CLIENT_CLOSED: Final = 499
# Why a request ended that is neither complete nor refused.
CLIENT_LEFT: Final = "client_left"
SERVER_LOST: Final = "server_lost"

# How many requests that have ended are added up at once, at most. That takes some 0.3 ms.
_AT_ONCE: Final = 32


OnEnd = Callable[[Record, Iterable[tuple[bytes, bytes]]], None]


class RequestSums:
    """Sums over the requests that have ended since the start, by model id; those of `requests` by model id, status and
    reason ("" if complete). What changes: everything, in `RequestTally.settle`."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int, str]] = Counter()
        self.duration_s = defaultdict[str, Histogram](partial(Histogram, DURATIONS_S))
        self.per_token_s = defaultdict[str, Histogram](partial(Histogram, PER_TOKEN_S))
        self.prompt_tokens: Counter[str] = Counter()
        self.cached_tokens: Counter[str] = Counter()
        self.generated_tokens: Counter[str] = Counter()


class Tallies:
    """The sums since the start, by model id: `settled`, and those that requests in flight count in as well.

    Only requests that were admitted, or refused for want of a place, count: until then they may name any model.
    `whole_in_flight` are the requests in flight whose answers are not streamed, by model. `on_end` gets the record of
    each request that has ended, with its headers, at once; it may not wait.

    What changes: the sums, in `settle` and in the tallies of requests in flight; `_ended`, the requests that are not
    added up yet, in `ended` and `settle`.
    """

    def __init__(self, activity: Activity | None = None) -> None:
        self.first_token_s = defaultdict[str, Histogram](partial(Histogram, FIRST_TOKENS_S))
        self.queue_wait_s = defaultdict[str, Histogram](partial(Histogram, WAITS_S))
        self.whole_in_flight: Counter[str] = Counter()
        self.activity = Activity() if activity is None else activity
        self.activity.settle = self.settle
        self.on_end: OnEnd | None = None
        self._sums = RequestSums()
        self._ended: list[RequestTally] = []

    @property
    def settled(self) -> RequestSums:
        """The sums over the requests that have ended, all of them."""
        self.settle()
        return self._sums

    def ended(self, tally: "RequestTally", *, at_once: bool) -> None:
        """A request has ended. It is added up later unless somebody waits for that."""
        self._ended.append(tally)
        if at_once or len(self._ended) >= _AT_ONCE or self.on_end is not None or self.activity.is_watched:
            self.settle()

    def settle(self) -> None:
        """Add up the requests that have ended."""
        ended, self._ended = self._ended, []
        for tally in ended:
            tally.settle(self._sums)

    def refused_early(
        self, path: str, request_id: str, headers: Iterable[tuple[bytes, bytes]], refusal: Refusal
    ) -> None:
        """Note a request for inference in the activity that was refused before it was known which model it is for.

        Those without a valid key are not: whoever sends many would leave no room for the others.
        """
        if refusal.is_counted or isinstance(refusal, InvalidApiKey):
            return
        status, code = code_of(refusal)
        account = account_var.get()
        record = Record(
            id=self.activity.last_id + 1,
            request_id=request_id,
            began_at=time.time(),
            path=path,
            key_name=None if account is None else account.name,
            duration_ms=0.0,
            status=status,
            error=code,
            user_agent=user_agent_of(headers),
        )
        self.note(record, headers)

    def note(self, record: Record, headers: Iterable[tuple[bytes, bytes]], bodies: KeptBodies | None = None) -> None:
        """Add the record of a request that has ended to the activity, and give it to `on_end`."""
        self.activity.add(record, bodies)
        if self.on_end is not None:
            self.on_end(record, headers)


class RequestTally:
    """What is noted of one request, until `settle` adds it to the sums and to the activity after `close`. `bodies` are
    its own, None if they are not to be kept. What changes: everything else, in each method."""

    def __init__(self, tallies: Tallies, request: "InferenceRequest") -> None:
        self._tallies = tallies
        # Not the request itself: this may outlast it, and its body may be large.
        self._request_id = request.request_id
        self._path = request.client_path or request.path
        self._headers = request.headers
        self._streamed = request.streamed
        self._model_id = request.model_id
        self._account = account_var.get()
        self._began_at = trio.current_time()
        self._began_on = time.time()
        self._status = CLIENT_CLOSED
        self._reason = CLIENT_LEFT
        self._device_id: str | None = None
        self._queued_s: float | None = None
        self._load_s: float | None = None
        self._first_token_s: float | None = None
        self._duration_s = 0.0
        # The last pieces of the answer. The very last one may only say that the stream is over.
        self._last = b""
        self._before = b""
        self._first = b""
        self._pieces = 0
        self._is_whole = False
        self.bodies = None if tallies.activity.bodies.limits is None else self._keep_bodies(request)

    def granted(self, device_id: str, queued_s: float, load_s: float) -> None:
        """It has its turn there, for which it waited that long, and then for the load of its model."""
        self._device_id, self._queued_s, self._load_s = device_id, queued_s, load_s
        if not self._streamed and not self._is_whole:
            self._is_whole = True
            self._tallies.whole_in_flight[self._model_id] += 1
        self._tallies.queue_wait_s[self._model_id].observe(queued_s)

    def answered(self, status: int) -> None:
        """The first bytes of its answer are here."""
        self._status = status
        self._first_token_s = trio.current_time() - self._began_at
        self._tallies.first_token_s[self._model_id].observe(self._first_token_s)

    def passed(self, chunk: bytes) -> None:
        """These bytes of its answer are passed on."""
        if chunk:
            self._before, self._last = self._last, chunk
            self._pieces += 1
            if self._pieces == 1:
                self._first = chunk[:HEAD_BYTES]

    def refused(self, refusal: Refusal) -> None:
        """It is refused."""
        self._status, self._reason = code_of(refusal)
        refusal.is_counted = True

    def lost(self) -> None:
        """Its server is lost in mid-answer."""
        self._reason = SERVER_LOST

    def completed(self) -> None:
        """Its answer is complete."""
        self._reason = ""

    def close(self) -> None:
        """It has ended."""
        tallies = self._tallies
        if self._is_whole:
            tallies.whole_in_flight[self._model_id] -= 1
        self._duration_s = trio.current_time() - self._began_at
        # A long answer may have come in one piece.
        self._last = (self._before[-TAIL_BYTES:] + self._last)[-TAIL_BYTES:]
        self._before = b""
        # What a key has used of its quota is known before its next request.
        has_quota = self._account is not None and self._account.entry.tokens_per_day is not None
        tallies.ended(self, at_once=has_quota or self.bodies is not None)

    def settle(self, sums: RequestSums) -> None:
        """Add it to the sums, and to the activity."""
        model_id, duration_s = self._model_id, self._duration_s
        usage = usage_of(self._first, self._last)
        sums.requests[model_id, self._status, self._reason] += 1
        sums.duration_s[model_id].observe(duration_s)
        sums.prompt_tokens[model_id] += usage.prompt
        sums.cached_tokens[model_id] += usage.cached
        sums.generated_tokens[model_id] += usage.generated
        if usage.generated > 1 and usage.per_token_s is not None:
            sums.per_token_s[model_id].observe(usage.per_token_s)
        if self._account is not None:
            # An answer that was cut short does not tell its tokens. Each piece of it had one at least.
            generated = usage.generated or (self._pieces if self._reason else 0)
            self._account.count_tokens(usage.prompt + usage.cached, generated)
        self._record(duration_s, usage)

    def _keep_bodies(self, request: "InferenceRequest") -> KeptBodies:
        kept = KeptBodies(self._tallies.activity.bodies)
        kept.requested(request.headers, request.body)
        return kept

    def _record(self, duration_s: float, usage: Usage) -> None:
        has_usage = bool(usage.prompt or usage.cached or usage.generated)
        record = Record(
            id=self._tallies.activity.last_id + 1,
            request_id=self._request_id,
            began_at=self._began_on,
            path=self._path,
            key_name=None if self._account is None else self._account.name,
            model_id=self._model_id,
            device_id=self._device_id,
            queue_ms=_as_ms(self._queued_s),
            load_ms=_as_ms(self._load_s),
            first_token_ms=_as_ms(self._first_token_s),
            duration_ms=duration_s * 1000,
            prompt_tokens=usage.prompt + usage.cached if has_usage else None,
            completion_tokens=usage.generated if has_usage else None,
            cached_tokens=usage.cached if has_usage else None,
            tokens_per_s=self._tokens_per_s(duration_s, usage),
            status=CLIENT_CLOSED if self._reason == CLIENT_LEFT else self._status,
            error=self._reason or None,
            streamed=self._streamed,
            user_agent=user_agent_of(self._headers),
        )
        self._tallies.note(record, self._headers, self.bodies)

    def _tokens_per_s(self, duration_s: float, usage: Usage) -> float | None:
        """How fast its tokens came: by what the server says, else by when they came."""
        if usage.per_token_s:
            return 1 / usage.per_token_s
        took_s = duration_s - (self._first_token_s or 0.0)
        return usage.generated / took_s if usage.generated > 1 and took_s > 0 and self._pieces > 1 else None


def _as_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
