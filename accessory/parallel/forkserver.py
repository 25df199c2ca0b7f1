"""Further processes of this machine that start in milliseconds."""

import multiprocessing
from multiprocessing.context import ForkServerContext


def fork_server(*modules: str) -> ForkServerContext:
    """A context whose processes are forked from a server that has imported ``modules``, and run nothing.

    To fork this process itself would hang in it, once it has run threaded torch; to start Python anew costs each process
    the seconds that importing torch takes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context
