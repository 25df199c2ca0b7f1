"""Further processes of this machine that start in milliseconds."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def fork_server(*modules: str) -> ForkServerContext:
    """A context whose processes are forked from a server that has imported ``modules``, and run nothing.

    To fork this process itself would hang in it, once it has run threaded torch; to start Python anew costs each process
    the seconds that importing torch takes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


class Killed(Exception):
    """A process was killed while it had work."""


class NotStarted(Exception):
    """A process could not start; the message is a sentence that says why, and what to do."""


class Worker(NamedTuple):
    process: Any
    pipe: Connection


def map_in_processes(
    context: ForkServerContext, setup: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """``setup()(item)`` of each item, in their order, by as many processes, each of which calls ``setup`` once.

    Not a pool of the standard library: those can wait for ever if a process is killed (CPython's issue 94777).

    Args:
        setup: can be pickled, as can items and results. While a process works, the next item is taken.

    Raises:
        NotStarted: a process could not start.
        Killed: a process was, by the system say, which is out of memory.
        Exception: what ``setup`` or the function raised.
    """
    free: deque[Worker] = deque()
    busy: deque[Worker] = deque()
    try:
        for _ in range(workers):
            free.append(start(context, setup))
        for item in items:
            if not free:
                yield _receive(busy[0])
                free.append(busy.popleft())
            busy.append(free.popleft())
            _send(busy[-1], item)
        while busy:
            yield _receive(busy[0])
            free.append(busy.popleft())
    finally:
        for worker in (*free, *busy):
            worker.pipe.close()
        for worker in (*free, *busy):
            worker.process.kill()
            worker.process.join()


def start(context: ForkServerContext, setup: Callable[[], Callable[[Any], Any]]) -> Worker:
    """A process that answers each item in its pipe with (``setup()(item)``, None), or (None, the exception).

    Raises:
        NotStarted: see ``map_in_processes``.
    """
    try:
        ours, theirs = context.Pipe()
        with theirs:
            process = context.Process(target=_serve, args=(setup, theirs), daemon=True)
            process.start()
    except RuntimeError:
        if multiprocessing.current_process().name == "MainProcess":
            raise
        sys.exit(1)  # this is such a process, which imports the script: ``why_gone`` tells it in the script's own process
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or "the process that forks the others is gone"
        raise NotStarted(f"a process could not be started: {why}; allow more processes and open files (ulimit)") from error
    return Worker(process, ours)


def _send(worker: Worker, item: Any) -> None:
    try:
        worker.pipe.send(item)
    except OSError as error:
        raise why_gone(worker) from error


def _receive(worker: Worker) -> Any:
    try:
        result, error = worker.pipe.recv()
    except (EOFError, OSError) as lost:
        raise why_gone(worker) from lost
    if error is not None:
        raise error
    return result


def why_gone(worker: Worker) -> Exception:
    """Why a process is gone."""
    worker.process.join()
    code = worker.process.exitcode
    if code is not None and code > 0:
        return NotStarted(
            f"a process ended with exit code {code} as it started. Each begins by importing the script that was run, so "
            'keep what that does under if __name__ == "__main__":. If it is there, look at what the process said above'
        )
    return Killed()


def _serve(setup: Callable[[], Callable[[Any], Any]], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    function = None
    while True:
        try:
            item = pipe.recv()
        except (EOFError, OSError):  # the parent is gone
            return
        try:
            function = function or setup()
            pipe.send((function(item), None))
        except Exception as error:
            pipe.send((None, error))


def end_with_parent() -> None:
    """Wait for the end of the process that asked for this one, and end as well, whatever else this one does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
