"""One thread per process: several test processes share the machine, and OpenMP threads that wait would spin against them."""

import os
import shutil
from collections import Counter
from multiprocessing.forkserver import ensure_running

import pytest
import torch
from ranks import server

torch.set_num_threads(1)
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports it; processes that tests start inherit this


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised data of the tests goes with the tests; processes that they start inherit this."""
    os.environ["ACCESSORY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def own_server(own_cache):
    """What is tested asks for processes, too: the server that it would start has imported less, which each then has to."""
    server()
    ensure_running()


def pytest_terminal_summary(terminalreporter):
    """Say what was skipped, and why: a skipped check proves nothing."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"not run, {count} tests: {reason}")
    if not shutil.which("slurmctld"):
        terminalreporter.write_line("not run, for slurmctld is not here: jobs under a real Slurm: make test-slurm gets it")
