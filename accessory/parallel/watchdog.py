"""No job hangs: if a rank dies or nothing moves, every rank says where it is, and all end with exit code 1.

Each rank has two threads. One exchanges heartbeats through the job's key-value store, once a second: every rank posts its
own, rank 0 reads all of them, the others read rank 0's, so a beat costs the store O(world). The other thread judges what
was heard, and never touches the store, whose calls may block for ever when it is the store's process that stands still:

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

BEAT_S = 1.0
SILENT_S = 60.0  # a live rank's thread can starve behind a call that keeps Python's lock: wait long before it counts as dead
GONE_S = 5.0  # the same, once some rank has lost a connection
LONGEST_COLLECTIVE_S = 1800  # then it fails, if the watchdog has not ended the job before
FAREWELL_S = 5.0  # how long rank 0, which may hold the store, stays for the others to read its verdict

PACKAGE = Path(__file__).parents[1]
TORCH_DISTRIBUTED = str(Path(dist.__file__).parent)


@dataclasses.dataclass
class Activity:
    """What this process's main thread does."""

    doing: str = "start-up"
    ticks: int = 0
    stall_timeout_s: float = math.inf


_activity = Activity()


def progressed(doing: str | None = None) -> None:
    """Note that the main thread has come further, and what it does now if that is something else."""
    _activity.ticks += 1
    _activity.doing = doing or _activity.doing


def end_stalls_after(seconds: float) -> None:
    """From now on, end the job if no rank reports progress for so long."""
    progressed()
    _activity.stall_timeout_s = seconds


@dataclasses.dataclass
class Heartbeat:
    """What a rank posts.

    Attributes:
        state: running; trouble (lost a connection); failing (about to say why it ends); failed (has said it); done.
        verdict: rank 0's, why the job ends; empty if that has been said.
    """

    beat: int = 0
    ticks: int = 0
    state: str = "running"
    verdict: str | None = None

    @property
    def out(self) -> bool:
        """Whether the rank needs nothing more of the others."""
        return self.state in ("failed", "done")


class Watchdog:
    """Watches this rank and its peers, in a job of several. Every rank makes one, once the default group exists."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._own = Heartbeat()
        self._where: str | None = None
        self._peers = {rank: Heartbeat() for rank in (range(1, self.world) if self.rank == 0 else [0])}
        now = time.monotonic()
        self._heard = dict.fromkeys(self._peers, now)
        self._contact, self._moved = now, now  # the last exchange; the last progress of any rank
        self._lost_store = False
        self._judging = threading.Lock()  # held while a verdict is found and carried out, or this rank's own failure told
        self._wake = threading.Event()
        self._job_store = dist.distributed_c10d._get_default_store()  # its server ends with the last reference
        connection = self._job_store.clone()  # type: ignore[attr-defined]  # its own: the main thread's may block
        self._store = dist.PrefixStore("accessory/watchdog", connection)
        self._store.set(f"host/{self.rank}", socket.gethostname())  # known from the start: it is said of the dead
        self._hosts = {rank: self._store.get(f"host/{rank}").decode() for rank in (self.rank, *self._peers)}
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._line = socket.create_connection(address)  # says nothing; it is closed when the store's process is gone
        self._line.setblocking(False)
        self._threads = [threading.Thread(target=body, daemon=True) for body in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()

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
        return all(peer.out or rank in silent for rank, peer in self._peers.items())

    def _silent(self, seconds: float) -> list[int]:
        """The ranks that should have been heard of for so long, and were not."""
        return [rank for rank, peer in self._peers.items() if not peer.out and self._contact - self._heard[rank] > seconds]

    def _exchange(self) -> None:
        """The first thread."""
        absent = set(self._peers)  # have not posted yet: to ask for their keys would block
        try:
            while self._store_lives():
                absent = {rank for rank in absent if not self._store.check([str(rank)])}
                present = [rank for rank in self._peers if rank not in absent]
                posted = self._store.multi_get([str(rank) for rank in present]) if present else []
                now = time.monotonic()
                for rank, text in zip(present, posted, strict=True):
                    heartbeat = Heartbeat(**json.loads(text))
                    if heartbeat.beat > self._peers[rank].beat:
                        self._heard[rank] = now
                    if heartbeat.ticks != self._peers[rank].ticks:
                        self._moved = now
                    self._peers[rank] = heartbeat
                self._contact = now
                post = dataclasses.replace(self._own, ticks=_activity.ticks)
                self._store.set(str(self.rank), json.dumps(dataclasses.asdict(post)))
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
            with self._judging:
                verdict = self._judge(now)
                if verdict is not None:
                    self._end(verdict)

    def _judge(self, now: float) -> str | None:
        """Why the job ends here; None: it does not."""
        silence = min(SILENT_S, _activity.stall_timeout_s)
        if self._own.state == "failed" or (self._own.state == "done" and self.rank != 0):
            return None
        if now - self._contact > silence:
            return f"{self._store_holder()}, where the job's key-value store is, has not answered for {silence:.0f} s"
        if self._own.state == "failing":  # the main thread will say why
            return None
        if self._lost_store:
            return f"{self._store_holder()} is gone, and with it the job's key-value store"
        if self.rank != 0 and self._peers[0].verdict is not None:
            return self._peers[0].verdict
        if any(peer.state == "failed" for peer in self._peers.values()):
            return ""
        trouble = any(heartbeat.state == "trouble" for heartbeat in (self._own, *self._peers.values()))
        patience = min(GONE_S, silence) if trouble else silence
        if gone := self._silent(patience):
            return (
                f"no sign of life for {patience:.0f} s from {self._names(gone)}: killed, out of memory or stopped, "
                "or the node is down; its own log or the node's may say why"
            )
        if self.rank == 0 and now - self._moved > _activity.stall_timeout_s:
            gone = self._silent(3 * BEAT_S)
            what = f"no sign of life from {self._names(gone)}" if gone else "below is where each of them is"
            return (
                f"no rank has made progress for {_activity.stall_timeout_s:g} s: {what}. If what they do takes so long, "
                "raise parallel.stall_timeout_s"
            )
        return None

    def _end(self, verdict: str) -> NoReturn:
        """Tell the verdict, and where this rank is; then end the process, whatever its main thread does."""
        if verdict:
            where = self._where or describe(_frames(self._threads))
            text = f"accessory: {self._name(self.rank)}: {_activity.doing}, {where}\n"
            if verdict != self._peers.get(0, self._own).verdict:  # else rank 0 says why
                text = f"accessory: error: {verdict}\n{text}"
            sys.stderr.write(text)
        self._own.verdict = verdict
        self.farewell(1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _names(self, ranks: list[int]) -> str:
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return ", ".join(map(self._name, ranks[:4])) + more

    def _store_holder(self) -> str:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"torchrun on {os.environ.get('MASTER_ADDR')}"
        return self._name(0)


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
