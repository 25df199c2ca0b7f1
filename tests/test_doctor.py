"""``accessory doctor``: one line for each thing a run needs, and exit code 1 if one is wrong."""

import os
import re

import pytest
from jobs import Job, command
from slips import make_home

LINES = ["versions", "devices", "kernels", "meeting", "gloo", "files", "disk", "clocks"]
ELSEWHERE = """
from accessory.train import doctor
from pathlib import Path
looked = doctor.Examination.__init__
def elsewhere(self, launch, directory, sizes):
    looked(self, launch, Path("{folder}") if launch.rank else directory, sizes)
doctor.Examination.__init__ = elsewhere
doctor.SEEN_WITHIN_S = 0.2
"""
WRONG = {  # what is planted: the line that says it, and how
    ELSEWHERE: ("files", "does not see what rank 1 wrote: {out} is not on shared storage"),
    "clock = time.time\nif rank: time.time = lambda: clock() - 3600\n": (
        "clocks",
        "3600.* s apart at most",
    ),
    "import torch.distributed as dist\nreduce = dist.all_reduce\n"
    "def twice(x, **k): reduce(x, **k), x.mul_(1 + rank)\ndist.all_reduce = twice\n": ("gloo", "came out wrong"),
    "import accessory.train.doctor as d\nd.__version__ = f'1.{rank}'\n": ("versions", "not the same on all ranks"),
    "import shutil\nshutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000)\n": ("disk", "too much"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def verdicts(out):
    return {line.split()[1]: line.split()[0] for line in out.splitlines() if line.startswith(("ok ", "WRONG "))}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_healthy_machine(home, tmp_path, ranks):
    codes, out, err = command("doctor", home / "run.yaml", f"out={tmp_path}/a/b", ranks=ranks)
    assert codes == [0] * ranks, out + err
    assert verdicts(out) == dict.fromkeys(LINES, "ok") and out.endswith("a run can start here\n")
    assert f"free in {tmp_path}" in out and "the next save takes 331kB" in out
    assert len(out.splitlines()) <= 24 and not os.listdir(tmp_path)


@pytest.mark.parametrize("plant", WRONG, ids=[line for line, _ in WRONG.values()])
def test_what_is_wrong_is_said_in_its_line(home, tmp_path, plant):
    name, said = WRONG[plant]
    out_of_rank_1 = tmp_path / "elsewhere"
    out_of_rank_1.mkdir()
    words = ["doctor", home / "run.yaml", f"out={tmp_path}"]
    with Job(*words, ranks=2, plant=plant.replace("{folder}", str(out_of_rank_1))) as job:
        assert job.codes() == [1, 1], job.out()
        assert verdicts(job.out()) == dict.fromkeys(LINES, "ok") | {name: "WRONG"}, job.out()
        (line,) = [line for line in job.out().splitlines() if line.startswith("WRONG")]
        assert re.search(said.replace("{out}", ".*"), line), line
        assert job.err() == f"accessory: error: doctor: {name}: see above\n"
    assert not [path for path in tmp_path.rglob(".doctor*")]
