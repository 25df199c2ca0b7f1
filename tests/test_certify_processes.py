"""Certifying always ends: a cell that fails or hangs is told, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.forkserver import _forkserver
from multiprocessing.resource_tracker import _resource_tracker
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from accessory.certify.processes import Failure, run_jobs


def misbehave(job, device, scratch):
    """A body whose jobs are the names of what rank 1 does."""
    if dist.get_rank() == 1:
        if job == "raises":
            raise RuntimeError("no luck")
        if job == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "hangs":
            time.sleep(1000)
    x = torch.ones(1)
    dist.all_reduce(x)
    return x


def descendants(pid=None):
    pid = pid or os.getpid()
    children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children.union(*map(descendants, children))


def test_a_failed_cell_is_told_and_the_others_go_on():
    before = descendants()
    jobs = ["works", "hangs", "also works", "raises", "works again", "dies"]
    outcomes = dict(run_jobs(2, "cpu", misbehave, jobs, limit_s=4))
    assert outcomes["works"] == outcomes["also works"] == outcomes["works again"] == [torch.tensor([2.0])] * 2
    assert outcomes["raises"] == Failure(f"rank 1: RuntimeError: no luck (test_certify_processes.py:{LINE})")
    assert outcomes["hangs"] == Failure("no result of rank 0, 1 within 4 s")
    assert outcomes["dies"].reason.startswith("rank 1 died with exit code -9")
    assert descendants() - before <= {_resource_tracker._pid, _forkserver._forkserver_pid}


LINE = misbehave.__code__.co_firstlineno + 4


def processes_of(group):
    found = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-g", str(group)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if " Z" not in line]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_leaves_no_process_behind(how, tmp_path):
    command = [sys.executable, "-m", "accessory", "certify", "--world", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        # what a shell starts in the background inherits that SIGINT is ignored, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    group = process.pid
    wait_until(lambda: len(processes_of(group)) >= 5)  # two ranks, and Python's fork server and resource tracker
    if how == signal.SIGINT:
        os.killpg(group, how)  # a terminal's Ctrl-C reaches all of them
    else:
        process.send_signal(how)
    out, error = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    assert "PASS" not in out and "Traceback" not in error
    wait_until(lambda: not processes_of(group))
    assert how == signal.SIGKILL or not list(tmp_path.glob("accessory-certify-*"))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
