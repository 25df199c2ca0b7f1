"""An engine for many clients: it steps in the main thread, and an event loop in another thread asks it."""

import asyncio
import math
import queue
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from accessory.infer.engine import BEAT_S, Engine
from accessory.infer.metrics import Metrics, Times
from accessory.infer.prompts import Prompt
from accessory.infer.request import Progress, Reason, Running
from accessory.infer.sampling import Sampling, TokenChoice
from accessory.infer.scoring import ScorePlan
from accessory.parallel.watchdog import progressed

STALLED_S = 60.0


class Busy(Exception):
    """The queue is full.

    Attributes:
        retry_after: seconds after which to try again.
    """

    def __init__(self, retry_after: int):
        super().__init__("too many requests wait already")
        self.retry_after = retry_after


class Closing(Exception):
    """The service is shutting down and takes no new requests."""


class News(NamedTuple):
    """What a step added to answer ``number`` of a call (see ``Progress``)."""

    number: int
    text: str
    choice: TokenChoice | None
    finish_reason: Reason | None


@dataclass
class Listener:
    """Which answer of which call a request of the engine belongs to."""

    answers: "Answers"
    number: int
    times: Times


class Answers:
    """The answers to one call: an asynchronous iterator over lists of news, until all answers have ended."""

    def __init__(self, service: "Service") -> None:
        self.requests: list[Running] = []
        self.loop = asyncio.get_running_loop()
        self._service, self._news, self._heard = service, list[News](), asyncio.Event()

    def hear(self, news: Sequence[News]) -> None:
        self._news += news
        self._heard.set()

    async def __aiter__(self) -> AsyncIterator[list[News]]:
        left = len(self.requests)
        while left:
            await self._heard.wait()
            self._heard.clear()
            news, self._news = self._news, []
            left -= sum(one.finish_reason is not None for one in news)
            yield news

    def cancel(self) -> None:
        """End the answers that are not done yet: nobody listens any more."""
        self._service.calls.put(lambda: self._service.forget(self.requests))


class Service:
    """Carries requests from an event loop to the engine, and results back. ``run`` and ``forget`` are for the main thread,
    ``ask``, ``embed`` and ``problem`` for the event loop.

    Attributes:
        calls: functions that the main thread calls between two steps; an exception in one ends ``run``.
        cut_off: how many answers were not done when the service ended.

    Args:
        most_waiting: requests that may wait to join the batch; further ones are refused.
        grace_s: seconds that running answers get to end when the service closes.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, most_waiting: int, grace_s: float):
        self.engine, self.metrics = engine, metrics
        self._most_waiting, self._grace_s = most_waiting, grace_s
        self._closes_at = math.inf  # by time.monotonic
        self._stepping_since = math.inf
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}  # by the number of the engine's request
        self.cut_off = 0

    def run(self) -> None:
        """Answer requests until the service is closed and all answers are done, or the grace period is over."""
        engine = self.engine
        while not (self.is_closing and (engine.is_idle or time.monotonic() > self._closes_at)):
            self._do_calls(wait=engine.is_idle)
            progressed()
            if not engine.is_idle:
                self._stepping_since = time.monotonic()
                self._tell(engine.step())
                self._stepping_since = math.inf
        for request in [*engine.running, *engine.waiting]:
            self.cut_off += 1
            self._tell([Progress(request, engine.cancel(request), None)])

    def close(self, *_: Any) -> None:
        """Take no new requests and end ``run``; a second call ends it at once. Can be used as a signal handler."""
        self._closes_at = time.monotonic() + (0 if self.is_closing else self._grace_s)
        self.calls.put(lambda: None)

    @property
    def is_closing(self) -> bool:
        return self._closes_at < math.inf

    @property
    def problem(self) -> str:
        """Why the service is not healthy; empty: it is."""
        if self.is_closing:
            return "the server is shutting down"
        stands = time.monotonic() - self._stepping_since
        return f"the engine has been in one step for {stands:.0f} s" if stands > STALLED_S else ""

    async def ask(self, prompts: Sequence[tuple[Prompt, Sampling]], adapter: str | None) -> Answers:
        """Ask an adapter (None: the base) for an answer to each of some prompts, which are taken together or not at all.

        Raises:
            UserError: one of them cannot be answered.
            Busy: too many requests wait already. Closing: the service is shutting down.
        """
        answers, asked = Answers(self), time.monotonic()

        def submit() -> None:
            if self.is_closing:
                raise Closing
            waiting = self.engine.waiting
            if waiting and len(waiting) + len(prompts) > self._most_waiting:
                raise Busy(math.ceil(time.monotonic() - self._listeners[waiting[0].id].times.asked))
            for number, (prompt, sampling) in enumerate(prompts):
                request = self.engine.submit(prompt.tokens, sampling, adapter, prompt.images)
                answers.requests.append(request)
                self._listeners[request.id] = Listener(answers, number, Times(asked))

        def tell() -> None:
            if submitted.set_running_or_notify_cancel():
                try:
                    submit()
                    submitted.set_result(None)
                except Exception as error:  # the client hears of it, or those who run the server
                    self.forget(answers.requests)
                    submitted.set_exception(error)

        submitted: Future[None] = Future()
        self.calls.put(tell)
        try:
            await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:  # the client is gone
            answers.cancel()
            raise
        return answers

    async def embed(self, tokens: Sequence[int]) -> Tensor:
        """The mean of a text's last hidden states, [D] (see ``Means``).

        Raises:
            Closing: the service is shutting down.
        """
        done: Future[Tensor] = Future()

        def embed() -> None:
            if self.is_closing:
                done.set_exception(Closing())
            elif done.set_running_or_notify_cancel():
                done.set_result(self.engine.score(ScorePlan([len(tokens)], list(tokens), [], []))[0])

        self.calls.put(embed)
        return await asyncio.wrap_future(done)

    def forget(self, requests: Sequence[Running]) -> None:
        """Cancel requests that nobody waits for any more; called by the main thread."""
        for request in requests:
            if listener := self._listeners.pop(request.id, None):
                self.engine.cancel(request)
                self.metrics.ended(request, listener.times)

    def _do_calls(self, wait: bool) -> None:
        """Make the calls that have come; ``wait``: first wait for one, at most as long as the other ranks can wait."""
        try:
            while True:
                self.calls.get(block=wait, timeout=BEAT_S)()
                wait = False
        except queue.Empty:
            if wait:
                self.engine.beat()

    def _tell(self, step: Sequence[Progress]) -> None:
        """Tell each call what the step added to its answers, in one message."""
        told: dict[Answers, list[News]] = {}
        for request, text, choice in step:
            listener = self._listeners[request.id]
            if choice:
                self.metrics.token(request, listener.times)
            if request.finish_reason:
                self.metrics.ended(request, listener.times)
                del self._listeners[request.id]
            told.setdefault(listener.answers, []).append(News(listener.number, text, choice, request.finish_reason))
        for answers, news in told.items():
            answers.loop.call_soon_threadsafe(answers.hear, news)
