"""Further processes of this machine that start in milliseconds."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

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


def map_in_processes(
    context: ForkServerContext, setup: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """``setup()(item)`` of each item, in their order, by as many processes, each of which calls ``setup`` once.

    Not a pool of the standard library: those can wait for ever if a process is killed (CPython's issue 94777).

    Args:
        setup: can be pickled, as can items and results. While a process works, the next item is taken.

    Raises:
        Killed: a process was, by the system say, which is out of memory.
        Exception: what ``setup`` or the function raised.
    """
    free: deque[Connection] = deque()
    busy: deque[Connection] = deque()
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(setup, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            free.append(ours)
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
        for pipe in (*free, *busy):
            pipe.close()
        for process in processes:
            process.kill()
            process.join()


def _send(pipe: Connection, item: Any) -> None:
    try:
        pipe.send(item)
    except OSError as error:
        raise Killed from error


def _receive(pipe: Connection) -> Any:
    try:
        result, error = pipe.recv()
    except (EOFError, OSError) as lost:
        raise Killed from lost
    if error is not None:
        raise error
    return result


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
