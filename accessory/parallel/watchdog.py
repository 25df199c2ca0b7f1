"""No job hangs: if a rank does not come, dies or nothing moves, that is said, and all end with exit code 1.

Each rank has two threads. One exchanges heartbeats through the job's key-value store, once a second: every rank posts its
own, rank 0 reads all of them, the others read rank 0's, so a beat costs the store O(world). The other thread judges what
was heard, and never touches the store, whose calls may block for ever when it is the store's process that stands still:

- a rank has not been heard of at all for ``parallel.stall_timeout_s``: it died at start-up, or was never started;
- a rank whose heartbeat stays out is gone (killed, out of memory, stopped; its node down). When a rank has lost a
  connection, as gloo tells at once, that is seen in seconds; otherwise, as with NCCL, in ``SILENT_S``;
- no rank has made progress for the run's ``parallel.stall_timeout_s``: a stall. Progress is what any main thread reports
  by ``progressed``, so that one rank may save or tokenise for hours while the others wait;
- a rank has failed and has said so: the others end without a word.

No step pays for it: there is no collective and no device synchronisation, and a report is an addition.
"""

import dataclasses
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from accessory.console import complain, listed, say

BEAT_S = 1.0
SILENT_S = 60.0  # a live rank's thread can starve behind a call that keeps Python's lock: wait long before it counts as dead
GONE_S = 5.0  # the same, once some rank has lost a connection
AWAITED_S = 10.0  # rank 0 says who has not come yet after so long, and each time that it has waited twice as long again
FAREWELL_S = 5.0  # how long rank 0, which may hold the store, stays for the others to read its verdict

PACKAGE = Path(__file__).parents[1]
TORCH_DISTRIBUTED = str(Path(dist.__file__).parent)


@dataclasses.dataclass
class Activity:
    """What this process's main thread does."""

    doing: str = "start-up"
    ticks: int = 0
    stall_timeout_s: float = math.inf
    needs: str = ""


_activity = Activity()


def progressed(doing: str | None = None) -> None:
    """Note that the main thread has come further, and what it does now if that is something else."""
    _activity.ticks += 1
    _activity.doing = doing or _activity.doing


def doing() -> str:
    """What the main thread does, in the words of ``progressed``."""
    return _activity.doing


def note_memory(needs: str) -> None:
    """Say what memory this process needs, as far as that is known: it is told if there is none left."""
    _activity.needs = needs


def memory_note() -> str:
    return f" (a process needs {_activity.needs})" if _activity.needs else ""


def end_stalls_after(seconds: float) -> None:
    """From now on, end the job if no rank reports progress for so long."""
    progressed()
    _activity.stall_timeout_s = seconds


@dataclasses.dataclass
class Heartbeat:
    """What a rank posts.

    Attributes:
        host: the name of its machine. beat: counts the posts; -1: none has been seen.
        state: running; trouble (lost a connection); failing (about to say why it ends); failed (has said it); done.
        verdict: rank 0's, why the job ends; empty if that has been said.
    """

    host: str = ""
    beat: int = -1
    ticks: int = 0
    state: str = "running"
    verdict: str | None = None

    @property
    def absent(self) -> bool:
        """Whether the rank has not come yet."""
        return self.beat < 0

    @property
    def out(self) -> bool:
        """Whether the rank needs nothing more of the others."""
        return self.state in ("failed", "done")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> "Heartbeat":
        return cls(**json.loads(text))


class Watchdog:
    """Watches this rank and its peers, in a job of several. Every rank makes one when it has reached the job's store."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._own = Heartbeat(socket.gethostname(), beat=0)
        self._where: str | None = None
        self._peers = {rank: Heartbeat() for rank in (range(1, self.world) if self.rank == 0 else [0])}
        now = time.monotonic()
        self._heard = dict.fromkeys(self._peers, now)  # of one that is absent: since when it is awaited
        self._contact, self._moved = now, now  # the last exchange; the last progress of any rank
        self._awaited_s = AWAITED_S
        self._lost_store = False
        self._judging = threading.Lock()  # held while a verdict is found and carried out, or this rank's own failure told
        self._wake = threading.Event()
        self._job_store = store  # its server ends with the last reference
        connection = store.clone()  # type: ignore[attr-defined]  # its own: the main thread's may block
        self._store = dist.PrefixStore("accessory/watchdog", connection)
        self._store.set(str(rank), self._own.to_json())
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._line = socket.create_connection(address)  # says nothing; it is closed when the store's process is gone
        self._line.setblocking(False)
        self._threads = [threading.Thread(target=body, daemon=True) for body in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()

    def meet(self) -> None:
        """Wait until all ranks are here. If one does not come, the other threads end the job."""
        self._job_store.add("accessory/joined", 1)
        while self._job_store.add("accessory/joined", 0) < self.world:
            time.sleep(0.05)
        posted = dist.PrefixStore("accessory/watchdog", self._job_store)
        for rank in self._absent():  # from here on nobody is, and all have a name
            self._heard[rank] = time.monotonic()
            self._peers[rank] = Heartbeat.from_json(posted.get(str(rank)))
        progressed()

    def failing(self, error: BaseException) -> None:
        """This rank's main thread ends by ``error``. Does not return if that only follows from another rank's end."""
        if is_lost_connection(error):
            self._where = describe(traceback.extract_tb(error.__traceback__))
            self._post("trouble")
            time.sleep(2 * GONE_S)  # the verdict comes sooner, if a rank has failed or is gone
        with self._judging:
            self._own.state = "failing"

    def farewell(self, code: int) -> None:
        """This rank's last words are said; it returns when the others have heard, and rank 0 when they are out as well."""
        self._post("failed" if code else "done")
        deadline = time.monotonic() + (FAREWELL_S if code else SILENT_S)
        posted = self._own.beat + 2  # an exchange may be under way
        while time.monotonic() < deadline and self._threads[0].is_alive():
            if self.rank == 0 and self._own.beat >= posted and self._others_are_out():
                break
            self._wake.set()
            time.sleep(0.02)

    def _post(self, state: str) -> None:
        self._own.state = state
        self._wake.set()

    def _others_are_out(self) -> bool:
        silent = self._silent(GONE_S)
        return all(peer.out or peer.absent or rank in silent for rank, peer in self._peers.items())

    def _silent(self, seconds: float) -> list[int]:
        """The ranks that have come, should have been heard of for so long, and were not."""
        here = [rank for rank, peer in self._peers.items() if not peer.absent and not peer.out]
        return [rank for rank in here if self._contact - self._heard[rank] > seconds]

    def _absent(self) -> list[int]:
        return [rank for rank, peer in self._peers.items() if peer.absent]

    def _exchange(self) -> None:
        """The first thread."""
        try:
            while self._store_lives():
                # what has not been posted yet must not be asked for, which would block
                absent = [rank for rank in self._absent() if not self._store.check([str(rank)])]
                present = [rank for rank in self._peers if rank not in absent]
                posted = self._store.multi_get([str(rank) for rank in present]) if present else []
                now = time.monotonic()
                for rank, text in zip(present, posted, strict=True):
                    heartbeat = Heartbeat.from_json(text)
                    if heartbeat.beat > self._peers[rank].beat:
                        self._heard[rank] = now
                    if heartbeat.ticks != self._peers[rank].ticks:
                        self._moved = now
                    self._peers[rank] = heartbeat
                self._contact = now
                post = dataclasses.replace(self._own, ticks=_activity.ticks)
                self._store.set(str(self.rank), post.to_json())
                self._own.beat += 1
                if post.out and self.rank != 0:  # from here on rank 0, which may hold the store, is free to leave
                    return
                self._wake.wait(BEAT_S)
                self._wake.clear()
        except RuntimeError:  # lost in the middle of a call
            pass
        self._lost_store = True

    def _store_lives(self) -> bool:
        """Asked before the store is, which would say so with a page of C++ frames."""
        try:
            return self._line.recv(1) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _watch(self) -> None:
        """The second thread."""
        last, ticks = time.monotonic(), 0
        while True:
            time.sleep(BEAT_S / 4)
            now = time.monotonic()
            if _activity.ticks != ticks:
                self._moved, ticks = now, _activity.ticks
            if now - last > GONE_S:  # this process stood still itself, as a suspended job does: nobody is to blame yet
                self._contact, self._moved = now, now
                self._heard = dict.fromkeys(self._heard, now)
            last = now
            self._say_who_is_awaited(now)
            with self._judging:
                verdict = self._judge(now)
                if verdict is not None:
                    self._end(verdict)

    def _say_who_is_awaited(self, now: float) -> None:
        absent = self._absent()
        if self.rank == 0 and absent and now - self._heard[absent[0]] > self._awaited_s:
            say(
                f"waiting for {self._names(absent)} of {self.world}, {self._awaited_s:g} s so far; "
                f"the job ends after {_activity.stall_timeout_s:g} s"
            )
            self._awaited_s *= 2

    def _judge(self, now: float) -> str | None:
        """Why the job ends here; None: it does not."""
        silence = min(SILENT_S, _activity.stall_timeout_s)
        if self._own.state == "failed" or (self._own.state == "done" and self.rank != 0):
            return None
        if now - self._contact > silence:
            return f"{self._holder()}, where the job's key-value store is, has not answered for {silence:.0f} s"
        if self._own.state == "failing":  # the main thread will say why
            return None
        if self._lost_store:
            return f"{self._holder()} is gone, and with it the job's key-value store"
        if self.rank != 0 and self._peers[0].verdict is not None:
            return self._peers[0].verdict
        if any(peer.state == "failed" for peer in self._peers.values()):
            return ""
        if absent := [rank for rank in self._absent() if now - self._heard[rank] > _activity.stall_timeout_s]:
            has, it, was, its = ("has", "it", "was", "its") if len(absent) == 1 else ("have", "they", "were", "their")
            return (
                f"{self._names(absent)} of {self.world} {has} not joined within {_activity.stall_timeout_s:g} s: {it} died "
                f"at start-up, or {was} never started; {its} own log may say why"
            )
        stalled = self.rank == 0 and now - self._moved > _activity.stall_timeout_s
        trouble = any(heartbeat.state == "trouble" for heartbeat in (self._own, *self._peers.values()))
        patience = 3 * BEAT_S if stalled else min(GONE_S, silence) if trouble else silence
        if gone := self._silent(patience):
            return (
                f"no sign of life for {patience:.0f} s from {self._names(gone)}: killed, out of memory or stopped, "
                "or the node is down; its own log or the node's may say why"
            )
        if stalled:
            return (
                f"no rank has made progress for {_activity.stall_timeout_s:g} s: below is where each of them is. "
                "If what they do takes so long, raise parallel.stall_timeout_s"
            )
        return None

    def _end(self, verdict: str) -> NoReturn:
        """Tell the verdict, and where this rank is; then end the process, whatever its main thread does.

        While a rank is absent, where the others are is no news: they wait for it, and end without a word.
        """
        alone = bool(self._absent())
        where = self._where or describe(_frames(self._threads))
        if verdict and verdict != self._peers.get(0, self._own).verdict:  # else rank 0 says why
            complain(verdict)
        if verdict and not alone:
            print(f"accessory: {self._name(self.rank)}: {_activity.doing}, {where}", file=sys.stderr)
        self._own.verdict = "" if alone else verdict
        self.farewell(1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _name(self, rank: int) -> str:
        host = self._peers.get(rank, self._own).host
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def _names(self, ranks: list[int]) -> str:
        return listed([*map(self._name, ranks)])

    def _holder(self) -> str:
        return store_holder(self._peers.get(0, self._own).host)


def torchrun_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_holder(host: str = "") -> str:
    """Whose process the job's key-value store is in; ``host``: rank 0's, if that is known."""
    address = os.environ["MASTER_ADDR"]
    return f"torchrun on {address}" if torchrun_holds_store() else f"rank 0 on {host or address}"


def is_lost_connection(error: BaseException) -> bool:
    """Whether ``error`` is what gloo or NCCL raise when a peer does not answer any more."""
    words = ("gloo", "NCCL", "onnection")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _frames(without: list[threading.Thread]) -> traceback.StackSummary:
    """The main thread's stack and below it, if there is one, that of an autograd thread: backward runs in those on GPUs."""
    frames = sys._current_frames()
    main: FrameType = frames.pop(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(main)
    for ident, frame in frames.items():
        other = traceback.extract_stack(frame)
        if ident not in [thread.ident for thread in without] and any(_own_file(f.filename) for f in other):
            stack.extend(other)
    return stack


def describe(stack: traceback.StackSummary) -> str:
    """Where a stack, which begins in this package, stands: the collective it waits in, and who called that."""
    innermost_first = list(reversed(stack))
    own = [f for f in innermost_first if _own_file(f.filename)]
    places = [f"{f.name} ({Path(f.filename).relative_to(PACKAGE.parent)}:{f.lineno})" for f in own]
    called = " < ".join(places[:3])
    inside = [f for f in innermost_first[: innermost_first.index(own[0])] if f.filename.startswith(TORCH_DISTRIBUTED)]
    collectives = [f.name for f in inside if f.name in dist.distributed_c10d.__all__] or [f.name for f in inside]
    return f"waits in {collectives[0]} called by {called}" if collectives else f"at {called}: {own[0].line}"


def _own_file(name: str) -> bool:
    return name.startswith(str(PACKAGE)) and name != __file__
