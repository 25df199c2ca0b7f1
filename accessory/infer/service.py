"""An engine for many clients at once: it steps in the main thread, and is asked from an event loop in another."""

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
    """As many requests wait as may.

    Attributes:
        retry_after: seconds.
    """

    def __init__(self, retry_after: int):
        super().__init__("too many requests wait already")
        self.retry_after = retry_after


class Closing(Exception):
    """The service ends, and takes nothing new."""


class News(NamedTuple):
    """What a step brought to one of a call's answers, ``number`` counts them; see ``Progress``."""

    number: int
    text: str
    choice: TokenChoice | None
    finish_reason: Reason | None


@dataclass
class Listener:
    """Who waits for a request of the engine's."""

    answers: "Answers"
    number: int
    times: Times


class Answers:
    """The answers to one call: an iterator over what comes, in lists, until all of them have ended."""

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
        """End those that go on: nobody listens any more."""
        self._service.calls.put(lambda: self._service.forget(self.requests))


class Service:
    """``run`` is called by the main thread, ``ask`` and ``problem`` in an event loop.

    Attributes:
        calls: what the main thread has to do between two steps; what goes wrong in it ends ``run``.
        cut_off: answers that were not done when the service had to end.

    Args:
        most_waiting: requests that may wait to be let in; one that comes beyond is refused.
        grace_s: how long answers that were begun may take when the service closes.
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
        """Answer until the service is closed, and what was begun is done or its time is over."""
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
        """Take nothing new and end ``run``; asked for again, at once. Fit to handle a signal."""
        self._closes_at = time.monotonic() + (0 if self.is_closing else self._grace_s)
        self.calls.put(lambda: None)

    @property
    def is_closing(self) -> bool:
        return self._closes_at < math.inf

    @property
    def problem(self) -> str:
        """Why nothing new should be asked here; empty: nothing is wrong."""
        if self.is_closing:
            return "the server is shutting down"
        stands = time.monotonic() - self._stepping_since
        return f"the engine has been in one step for {stands:.0f} s" if stands > STALLED_S else ""

    async def ask(self, prompts: Sequence[tuple[Prompt, Sampling]], adapter: str | None) -> Answers:
        """Ask an adapter (None: the base) for an answer to each of some prompts, which are taken together or not at all.

        Raises:
            UserError: one of them cannot be answered. Busy, Closing.
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
        """Of a text, what ``Means`` has: [D].

        Raises:
            Closing.
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
        """Cancel requests that nobody waits for; for the main thread."""
        for request in requests:
            if listener := self._listeners.pop(request.id, None):
                self.engine.cancel(request)
                self.metrics.ended(request, listener.times)

    def _do_calls(self, wait: bool) -> None:
        """Make the calls that have come; ``wait``: for one, as long as the other ranks can be without a plan."""
        try:
            while True:
                self.calls.get(block=wait, timeout=BEAT_S)()
                wait = False
        except queue.Empty:
            if wait:
                self.engine.beat()

    def _tell(self, step: Sequence[Progress]) -> None:
        """Let each call hear what a step brought: once, whatever the number of its answers."""
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
