"""Run a function as several real processes that talk over gloo, with a time limit, and leave none behind."""

from accessory.certify.processes import Failure, run_jobs
from accessory.parallel.forkserver import fork_server

IMPORTS = (
    "accessory.cli",  # first, as in the command: it tells torch what to log
    "pytest",
    "matplotlib.pyplot",
    "transformers.models.mixtral.modeling_mixtral",
    "peft",
    "accessory.train.loop",
    "accessory.train.report",
    "accessory.certify.run",
)


def server():
    """Processes forked from it have imported what tests and the program need; once for each process of pytest."""
    return fork_server(*IMPORTS)


def run_ranks(world, body, *args, timeout=120):
    """Call ``body(*args)`` on ``world`` ranks of one gloo group; return what each returned, in rank order.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or the time ran out.
    """
    ((_, outcome),) = run_jobs(world, "cpu", _Call(body), [args], timeout, IMPORTS)
    assert not isinstance(outcome, Failure), f"{outcome.reason}\n{outcome.log}"
    return outcome


class _Call:
    def __init__(self, body):
        self.body = body

    def __call__(self, args, device, scratch):
        return self.body(*args)
