"""Runs under a real Slurm, on two nodes that are this machine: make test-slurm."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_commands import rows
from test_resume import assert_same_run, home  # noqa: F401 (home is a fixture)

# ruff: noqa: F811 (home)

HERE = Path(__file__).parent
TWO_NODES = ["-N2", "-n2", "--ntasks-per-node=1"]


@pytest.fixture(scope="session", autouse=True)
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", HERE / "slurm_up.sh", folder], check=True, timeout=60)
    bin_folder = Path(sys.executable).parent
    before = dict(os.environ)
    os.environ |= {
        "SLURM_CONF": f"{folder}/slurm.conf",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",  # n0 and n1 are no names that can be looked up
    }
    yield folder
    subprocess.run(["bash", folder / "down.sh"], check=True, timeout=60)
    os.environ.clear()
    os.environ.update(before)


def run(*words, timeout=240):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def accessory(*words, srun):
    own_core = (
        'exec taskset -c $SLURM_PROCID python -m accessory "$@"'  # each of two nodes takes all of the host to be its own
    )
    return run("srun", *srun, "--kill-on-bad-exit=1", "bash", "-c", own_core, "-", *words)


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, said, err = accessory("finetune", home / "run.yaml", f"out={out}", "train.accumulation=2", srun=["-N1", "-n2"])
    assert code == 0, said + err
    return out


def test_doctor(tmp_path):
    code, said, err = accessory("doctor", srun=TWO_NODES)
    assert code == 0, said + err
    assert "2 ranks by rank 0 on 127.0.0.1" in said and said.endswith("a run can start here\n")


def test_two_nodes_have_the_losses_of_one(home, undisturbed, tmp_path):
    words = [f"out={tmp_path}/run", "parallel.model_parallel=2", "model.layout=mixtral_sparse"]
    code, said, err = accessory("finetune", home / "run.yaml", *words, srun=TWO_NODES)
    assert code == 0, said + err
    assert_same_run(undisturbed, tmp_path / "run")


def state_of(job):
    return run("squeue", "-h", "-o", "%T", "-j", job)[1].strip()


def queue_of(job):
    """Why a job waits."""
    return "".join(run(*words)[1] for words in (("scontrol", "show", "job", job), ("sinfo", "-R"), ("sinfo", "-Nl")))


def wait_until(condition, what, timeout=90):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["time", "pre-emption"])
def test_a_job_that_is_ended_is_queued_again_and_goes_on(home, undisturbed, tmp_path, how):
    """Told by SIGUSR1 that its time will be up, it asks for more; pre-empted, it is queued again by Slurm itself."""
    out, log, metrics = tmp_path / "run", tmp_path / "log", tmp_path / "run/metrics.jsonl"
    # slower steps, so that the end comes in the midst of the run
    words = [home / "run.yaml", f"out={out}", "train.accumulation=2", "log.validate_every=1"]
    code, job, err = run(
        *("sbatch", "--parsable", "-N1", "-n2", f"--output={log}", HERE.parent / "exps/finetune/job.sbatch", *words)
    )
    assert code == 0, err
    job = job.strip()
    wait_until(lambda: metrics.is_file() and metrics.read_text().count('"loss"') >= 3, log.read_text)
    code, _, err = run("scancel", "--signal=USR1", job) if how == "time" else run("scontrol", "requeue", job)
    assert code == 0, err
    wait_until(lambda: state_of(job) == "PENDING", lambda: state_of(job) + log.read_text())
    assert list((out / "states").iterdir())

    # rather than two minutes later; what is started in the second in which it ended counts as killed
    wait_until(lambda: run("scontrol", "update", f"JobId={job}", "StartTime=now+5")[0] == 0, log.read_text)
    wait_until(lambda: "picture:" in log.read_text(), lambda: log.read_text() + queue_of(job), timeout=150)
    said = log.read_text()
    assert "resumed from" in said and said.count("its files are in") == 2, said
    stopped = "stopped by SIGUSR1 after step" if how == "time" else "stopped by SIGTERM after step"
    assert stopped in said, said
    losses = [{row["step"]: row["loss"] for row in rows(run) if "loss" in row} for run in (undisturbed, out)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and len(losses[0]) == 15
