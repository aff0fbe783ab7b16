"""What was served, in sums, for `/metrics`: the requests for inference, how long they took, and their tokens.

They are counted as the answers pass, without a look into more than the first and the last bytes of each: llama-server
says there how many tokens there were (`usage.py`).
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Final

import trio

from nodeagent.errors import Refusal
from nodeagent.front.accounts import account_var
from nodeagent.front.refusals import code_of
from nodeagent.front.usage import HEAD_BYTES, TAIL_BYTES, usage_of

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


class Histogram:
    """Observations by bucket. `counts` has one more than `bounds`: those above all of them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Tallies:
    """The sums since the start, by model id; those of `requests` by model id, status and reason ("" if complete).

    Only requests that were admitted, or refused for want of a place, count: until then they may name any model.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int, str]] = Counter()
        self.duration_s = defaultdict[str, Histogram](partial(Histogram, DURATIONS_S))
        self.first_token_s = defaultdict[str, Histogram](partial(Histogram, FIRST_TOKENS_S))
        self.per_token_s = defaultdict[str, Histogram](partial(Histogram, PER_TOKEN_S))
        self.queue_wait_s = defaultdict[str, Histogram](partial(Histogram, WAITS_S))
        self.prompt_tokens: Counter[str] = Counter()
        self.cached_tokens: Counter[str] = Counter()
        self.generated_tokens: Counter[str] = Counter()


class RequestTally:
    """What is noted of one request until `close` adds it to the sums. What changes: everything, in each method."""

    def __init__(self, tallies: Tallies, model_id: str) -> None:
        self._tallies = tallies
        self._model_id = model_id
        self._account = account_var.get()
        self._began_at = trio.current_time()
        self._status = CLIENT_CLOSED
        self._reason = CLIENT_LEFT
        # The last pieces of the answer. The very last one may only say that the stream is over.
        self._last = b""
        self._before = b""
        self._first = b""
        self._pieces = 0

    def granted(self, queued_s: float) -> None:
        """It has its turn, for which it waited that long, the load of its model not counted."""
        self._tallies.queue_wait_s[self._model_id].observe(queued_s)

    def answered(self, status: int) -> None:
        """The first bytes of its answer are here."""
        self._status = status
        self._tallies.first_token_s[self._model_id].observe(trio.current_time() - self._began_at)

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

    def lost(self) -> None:
        """Its server is lost in mid-answer."""
        self._reason = SERVER_LOST

    def completed(self) -> None:
        """Its answer is complete."""
        self._reason = ""

    def close(self) -> None:
        """Add it to the sums."""
        tallies, model_id = self._tallies, self._model_id
        tallies.requests[model_id, self._status, self._reason] += 1
        tallies.duration_s[model_id].observe(trio.current_time() - self._began_at)
        usage = usage_of(self._first, (self._before[-TAIL_BYTES:] + self._last)[-TAIL_BYTES:])
        tallies.prompt_tokens[model_id] += usage.prompt
        tallies.cached_tokens[model_id] += usage.cached
        tallies.generated_tokens[model_id] += usage.generated
        if usage.generated > 1 and usage.per_token_s is not None:
            tallies.per_token_s[model_id].observe(usage.per_token_s)
        if self._account is not None:
            # An answer that was cut short does not tell its tokens. Each piece of it had one at least.
            generated = usage.generated or (self._pieces if self._reason else 0)
            self._account.count_tokens(usage.prompt + usage.cached, generated)
