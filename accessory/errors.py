"""What is told to the user in a sentence; any other error is a fault of the program, and keeps its traceback."""

import os
import re
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn


class UserError(ValueError):
    """Something the user can mend; its message is one sentence that says what is wrong, where, and what to do."""


@contextmanager
def needs(what: str, install: str) -> Iterator[None]:
    """Inside, imports may fail: ``what`` needs them, and ``install`` is the command that installs them.

    Raises:
        UserError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise UserError(f"{what} needs {missing}, which is not installed: {install}") from error


def extra(name: str) -> str:
    """How to install an extra of this package (see ``needs``)."""
    return f'pip install "accessory-moe[{name}]", or, where this program\'s sources are, pip install -e ".[{name}]"'


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C; what a scheduler sends some time before it kills: SIGTERM, or that of sbatch --signal=USR1@180; and what comes
when the terminal is closed, or the connection to it lost."""


class Stopped(KeyboardInterrupt):
    """One of these signals asks the program to end.

    Args:
        number: the signal's. where: what stands behind "stopped by SIGTERM" in the sentence. everywhere: all ranks end so.
    """

    def __init__(self, number: int, where: str = "", everywhere: bool = False):
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}{where}")
        self.code, self.everywhere = 128 + number, everywhere  # as a shell names it


def stop_on_signals() -> None:
    """From now on these signals raise ``Stopped`` in the main thread, so that what is half-written goes."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in what a shell starts in the background
            signal.signal(number, _stop)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    leave_closed_terminal()
    raise Stopped(number)


def leave_closed_terminal() -> None:
    """Let output go nowhere that would go to a terminal which is gone: each write would fail, and so what is left to do."""
    for stream in (1, 2):
        with suppress(OSError):  # it was closed from the beginning
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):  # what is gone is no terminal any more
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def sentence(error: BaseException) -> str | None:
    """What to tell the user of an error, on one line; None: it is the program's fault.

    What the system refuses (no right, no room, no such path) is told with the path: that can happen wherever one is touched.
    """
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, BrokenPipeError):
        text = "what read this program's output has ended"
    elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
    else:
        return None
    return re.sub(r"\s*\n\s*", " ", text.strip())
