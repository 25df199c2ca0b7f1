"""A rank that does not come, or dies while the job is set up, is named, and all end in time: real jobs with a fault each."""

# ruff: noqa: F811 (home is a fixture)

import os
import re
import socket

import pytest
import torch.distributed as dist
from jobs import Job
from test_watchdog import HOST, STALL, errors, home, run  # noqa: F401

from accessory.errors import UserError
from accessory.parallel.launch import Launch, read_environment

END = STALL + 90
"""Seconds from the start of the processes, which a busy machine forks late, to their end."""

DIES = "import os\nif rank in {ranks}: os._exit(9)\n"
SAYS_SOON = "from accessory.parallel import watchdog\nwatchdog.AWAITED_S = 0.2\n"
WAITS_FOR_FILE = """
import os
while rank == {rank} and not os.path.exists("{file}"):
    time.sleep(0.02)
"""
CAUSE = "died at start-up, or {} never started"


@pytest.fixture
def listener():
    """Something else that listens, and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "dead, said",
    [
        ([2], f"rank 2 of 3 has not joined within {STALL} s: it " + CAUSE.format("was")),
        ([1, 2], f"rank 1, rank 2 of 3 have not joined within {STALL} s: they " + CAUSE.format("were")),
    ],
)
def test_ranks_that_never_come_are_named(home, tmp_path, dead, said):
    with run(home, tmp_path, ranks=3, plant=DIES.format(ranks=dead)) as job:
        codes = job.codes(timeout=END)
        assert codes == [9 if rank in dead else 1 for rank in range(3)], job.err()
        (line,) = job.err().splitlines()
        assert said in line
        assert "waiting" not in job.out()


def test_without_rank_0_the_others_say_so(home, tmp_path):
    with run(home, tmp_path, ranks=3, plant=DIES.format(ranks=[0])) as job:
        assert job.codes(timeout=END) == [9, 1, 1], job.err()
        for rank in (1, 2):  # each, for there is no store in which they could agree who speaks
            (line,) = job.err(rank).splitlines()
            assert f"waited for {STALL} s: rank {rank} of 3 cannot reach rank 0 on 127.0.0.1, port" in line
            assert CAUSE.format("was") in line


@pytest.fixture
def under_torchrun():
    """What each rank is to run first; the store is in this process, which is no rank, as torchrun is none."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    yield lambda attempt=0: f"import os\nos.environ |= {variables | {'TORCHELASTIC_RESTART_COUNT': str(attempt)}}\n"
    del store


def test_without_rank_0_under_torchrun(home, tmp_path, under_torchrun):
    with run(home, tmp_path, ranks=3, plant=under_torchrun() + DIES.format(ranks=[0])) as job:
        assert job.codes(timeout=END) == [9, 1, 1], job.err()
        for rank in (1, 2):
            (line,) = job.err(rank).splitlines()
            assert f"rank 0 of 3 has not joined within {STALL} s" in line


def test_torchrun_starts_the_ranks_anew(home, tmp_path, under_torchrun):
    """Its store still holds what the first ones said last."""
    with run(home, tmp_path, plant=under_torchrun() + GROUP_FAILS.format(rank=1, fault="raise KeyError('planted')")) as job:
        assert job.codes(timeout=END) == [1, 1], job.err()
    with run(home, tmp_path, "train.max_steps=1", plant=under_torchrun(attempt=1)) as job:
        assert job.codes() == [0, 0], job.err()
        assert job.err() == ""


def test_a_late_rank_is_waited_for(home, tmp_path):
    """Also for longer than a rank that was there may be silent."""
    come = tmp_path / "come"
    plant = SAYS_SOON + "watchdog.SILENT_S = 5.0\n" + WAITS_FOR_FILE.format(rank=1, file=come)
    with run(home, tmp_path, "parallel.stall_timeout_s=60", "train.max_steps=2", ranks=3, plant=plant) as job:
        job.reach("waiting for rank 1 of 3, 6.4 s so far; the job ends after 60 s")
        come.touch()
        assert job.codes() == [0, 0, 0], job.err()
        assert job.err() == ""


def test_a_late_rank_0_is_waited_for(home, tmp_path):
    """Until the other one is at the point where it reaches for the store."""
    come = tmp_path / "come"
    plant = WAITS_FOR_FILE.format(rank=0, file=come) + (
        "import torch.distributed as dist\n"
        "def reach(*options, real=dist.TCPStore, **named):\n"
        f"    open('{come}', 'w') if rank else None\n"
        "    return real(*options, **named)\n"
        "dist.TCPStore = reach\n"
    )
    with run(home, tmp_path, "parallel.stall_timeout_s=60", "train.max_steps=2", plant=plant) as job:
        assert job.codes() == [0, 0], job.err()
        assert job.err() == ""


def test_a_normal_start_says_nothing_of_it(home, tmp_path):
    with run(home, tmp_path, "train.max_steps=1", ranks=3) as job:
        assert job.codes() == [0, 0, 0], job.err()
        assert job.err() == "" and job.out().startswith("data: ")


def test_the_rank_with_the_store_dies_while_a_rank_is_awaited(home, tmp_path):
    plant = SAYS_SOON + WAITS_FOR_FILE.format(rank=2, file=tmp_path / "never")
    with run(home, tmp_path, "parallel.stall_timeout_s=60", ranks=3, plant=plant) as job:
        job.reach("waiting for rank 2 of 3")  # so rank 1 has come
        job.processes[0].kill()
        assert job.codes(1, timeout=END) == [1]
        (error,) = errors(job.err(1))
        assert re.search(r"rank 0 on \S+ is gone, and with it the job's key-value store", error), job.err()
        assert "Traceback" not in job.err() and "frame #" not in job.err()


def test_a_rank_that_dies_while_another_is_awaited_is_named(home, tmp_path):
    """Long before the other counts as missing."""
    plant = SAYS_SOON + "watchdog.SILENT_S = 3.0\n" + WAITS_FOR_FILE.format(rank=2, file=tmp_path / "never")
    with run(home, tmp_path, "parallel.stall_timeout_s=600", ranks=3, plant=plant) as job:
        job.reach("waiting for rank 2 of 3")
        job.processes[1].kill()
        assert job.codes(0, timeout=END) == [1]
        (error,) = errors(job.err())
        assert re.search(rf"no sign of life for 3 s from rank 1 on {HOST}: killed", error), job.err()


GROUP_FAILS = """
import os
import torch.distributed as dist
def init_process_group(*options, real=dist.init_process_group, **named):
    if rank == {rank}:
        {fault}
    return real(*options, **named)
dist.init_process_group = init_process_group
"""


@pytest.mark.parametrize("dead", [0, 2])
def test_a_rank_that_dies_as_the_group_is_made_is_named(home, tmp_path, dead):
    with run(home, tmp_path, ranks=3, plant=GROUP_FAILS.format(rank=dead, fault="os._exit(9)")) as job:
        others = [rank for rank in range(3) if rank != dead]
        assert job.codes(*others, timeout=END) == [1, 1], job.err()
        silent = rf"no sign of life for \d s from rank 2 on {HOST}: killed"
        said = silent if dead else f"rank 0 on {HOST} is gone, and with it the job's key-value store"
        for error in errors(job.err()):
            assert re.search(said, error), job.err()
        assert errors(job.err()) and "Traceback" not in job.err() and "frame #" not in job.err()
        for rank in others:  # if rank 0 dies, the others may not have come so far
            at = "waits in init_process_group called by join" if dead else ""
            assert re.search(rf"^accessory: rank {rank} on {HOST}: start-up, {at}", job.err(rank), re.M), job.err()


def test_a_rank_that_stays_as_the_group_is_made_ends_the_job(home, tmp_path):
    with run(home, tmp_path, plant=GROUP_FAILS.format(rank=1, fault="time.sleep(3600)")) as job:
        assert job.codes(timeout=END) == [1, 1], job.err()
        (error,) = errors(job.err())
        assert f"no rank has made progress for {STALL} s" in error


def test_a_rank_that_fails_as_the_group_is_made_speaks_alone(home, tmp_path):
    with run(home, tmp_path, ranks=3, plant=GROUP_FAILS.format(rank=1, fault="raise KeyError('planted')")) as job:
        assert job.codes(timeout=END) == [1, 1, 1], job.err()
        assert job.err(0) == job.err(2) == "" and "planted" in job.err(1)


def test_a_taken_port_is_said(home, tmp_path, listener):
    """The other rank speaks to what listens there, and gets no answer."""
    with run(home, tmp_path, plant=f"import os\nos.environ['MASTER_PORT'] = '{listener}'") as job:
        assert job.codes(timeout=END) == [1, 1], job.err()
        assert [line for line in job.err(0).splitlines() if line.startswith("accessory:")] == [
            f"accessory: error: rank 0 cannot listen on port {listener} of {socket.gethostname()}, which another program "
            "may use: set another MASTER_PORT"
        ]
        (line,) = job.err(1).splitlines()
        assert f"rank 1 of 2 cannot reach rank 0 on 127.0.0.1, port {listener}" in line


def test_what_is_wrong_in_the_run_file_is_said_once(home, tmp_path):
    with Job("finetune", home / "run.yaml", f"out={tmp_path}", "train.epoch=2", ranks=3) as job:
        assert job.codes() == [1, 1, 1]
        (error,) = errors(job.err())
        assert "did you mean 'train.epochs'" in error


STEP = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "2", "SLURM_JOB_ID": "30", "SLURM_LOCALID": "1"}


def place(monkeypatch, **environment):
    """(this process's place in the job, MASTER_ADDR and MASTER_PORT), as ``environment`` says."""
    for name in {*os.environ, "MASTER_ADDR", "MASTER_PORT"}:
        if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")):
            monkeypatch.setenv(name, "")  # so that what is set now is undone, too
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = read_environment()
    return launch, os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[3-4],m[1-9]", "n3"),
        ("gpu-a-[001-004,7],login", "gpu-a-001"),
        ("rack[2-3]n[08,10-12],x", "rack2n08"),
    ],
)
def test_ranks_of_a_slurm_step_meet_on_the_first_of_its_own_nodes(monkeypatch, nodes, first):
    """Not on the job's, of which a step may have some alone; without scontrol, which a container does not have."""
    monkeypatch.setenv("PATH", "/nowhere")
    lists = {"SLURM_JOB_NODELIST": "n[0-9]", "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    assert place(monkeypatch, **STEP, **lists) == (Launch(5, 8, 1, 4), first, "20032")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set in the environment and WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 by the environment"),
        ({**STEP, "SLURM_LOCALID": ""}, "SLURM_LOCALID is ''"),
        ({key: value for key, value in STEP.items() if key != "SLURM_JOB_ID"}, "SLURM_JOB_ID is not"),
    ],
)
def test_an_environment_that_places_no_rank_is_told(monkeypatch, environment, message):
    with pytest.raises(UserError, match=re.escape(message)):
        place(monkeypatch, **environment)


def test_a_port_that_is_none_is_told(home, tmp_path):
    with run(home, tmp_path, plant="import os\nos.environ['MASTER_PORT'] = '999999'") as job:
        assert job.codes(timeout=END) == [1, 1], job.err()
        assert "MASTER_PORT is 999999 in the environment; ports are from 1 to 65535" in job.err(0)
