"""How commands end that cannot go on: no right, no room, no memory, no reader, a signal; alone and under torchrun."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from jobs import Job, command, run_each
from slips import make_home

NO_RIGHTS = """
import ctypes
libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
assert libc.capset(header, sets) == 0
"""
"""Even if the tests run as root, the modes of files and directories count."""
FULL = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
"""No file can grow beyond 2000 bytes, as on a full disk."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def check(slips, plant, home, folder, tmp_path):
    """Each line of ``slips`` gives its sentence, and leaves nothing in ``folder``, where its ``out`` would be."""
    before = {*folder.iterdir()}
    lines = [line.format(home=home, out=folder / f"out{number}") for number, line in enumerate(slips)]
    ends = run_each([(shlex.split(line), plant) for line in lines], tmp_path)
    for number, (line, sentence, (code, _, err)) in enumerate(zip(lines, slips.values(), ends, strict=True)):
        said = re.escape(sentence.format(home=home, out=folder / f"out{number}"))
        assert code == 1 and re.fullmatch(rf"accessory: error: .*{said}.*\n", err), (line, err)
    assert {*folder.iterdir()} == before, "something is left behind"


def test_what_may_not_be_read(home, tmp_path):
    locked = home / "locked"
    locked.mkdir(mode=0o000)
    for name in ("run.yaml", "tokenizer.model", "model.json", "talks.jsonl"):
        (home / f"secret_{name}").write_bytes((home / name).read_bytes())
        (home / f"secret_{name}").chmod(0o000)
    (home / "secret_mix.yaml").write_text("META: [{path: secret_talks.jsonl}]")
    (home / "secret").mkdir()
    for name in ("config.json", "model.safetensors"):
        (home / "secret" / name).write_bytes((home / "hf" / name).read_bytes())
    (home / "secret/model.safetensors").chmod(0o000)
    denied = "cannot be read: Permission denied"
    run = "finetune {home}/run.yaml out={out} "
    slips = {
        "finetune {home}/secret_run.yaml": f"secret_run.yaml: {denied}",
        "finetune {home}/locked/run.yaml": f"locked/run.yaml: {denied}",
        run + "model.tokenizer={home}/secret_tokenizer.model": f"secret_tokenizer.model: {denied}",
        run + "model.config={home}/secret_model.json": f"secret_model.json: {denied}",
        run + "data.mix={home}/secret_mix.yaml": f"secret_talks.jsonl: {denied}",
        run + "model.checkpoint={home}/locked": f"locked: {denied}",
        run + "model.checkpoint={home}/secret model.config=null": f"model.safetensors: {denied}",
        "generate {home}/secret Why?": f"model.safetensors: {denied}",
        "inspect {home}/locked": f"locked: {denied}",
        "verify {home}/hf {home}/secret": f"model.safetensors: {denied}",
        "convert {home}/secret {out} --to mixtral": f"model.safetensors: {denied}",
        "compare {home}/locked": f"locked: {denied}",
    }
    check(slips, NO_RIGHTS, home, home, tmp_path)


def test_where_nothing_may_be_written(home, tmp_path):
    slips = {
        "finetune {home}/run.yaml out={out}": "{out}: cannot be written (Permission denied)",
        "convert {home}/hf {out} --to mixtral": "{out}: cannot be written (Permission denied)",
        "compare {home}/logged --png {out}": "{out}: cannot be written: Permission denied",
        "data check {home}/run.yaml --png {out}": "{out}: cannot be written: Permission denied",
        "data stdlib {out}": "{out}: Permission denied",
        "data tokenizer {home}/mix.yaml {out}": "{out}: cannot be written: Permission denied",
        "certify --quick --html {out}": "{out}: cannot be written: Permission denied",
    }
    (home / "read-only").mkdir(mode=0o555)
    check(slips, NO_RIGHTS, home, home / "read-only", tmp_path)


def test_what_must_not_be_replaced(home, tmp_path):
    """A root user's --out /dev/null or /dev/stdout would be everybody's file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    for name in ("pipe", "stdout"):
        codes, _, err = ends("compare", home / "logged", "--png", tmp_path / name)
        assert codes == [1] and f"{name}: cannot be written: a pipe or device; name a file" in err
    assert (tmp_path / "stdout").is_symlink() and (tmp_path / "pipe").is_fifo()


def test_a_disk_that_is_full(home, tmp_path):
    slips = {
        "convert {home}/hf {out} --to mixtral": "{out}: File too large; nothing was left behind",
        "convert {home}/ckpt {out} --to hf --format safetensors": "{out}: File too large; nothing was left behind",
        "data tokenizer {home}/mix.yaml {out} --vocab-size 300": "{out}: cannot be written: File too large",
        "data stdlib {home}": "{home}/dialog.jsonl: cannot be written: File too large",
    }
    check(slips, FULL, home, home, tmp_path)


def test_a_run_whose_disk_is_full(home, tmp_path):
    plant = FULL.replace("2000", "20000")
    codes, _, err = ends("finetune", home / "run.yaml", f"out={tmp_path}/run", plant=plant)
    assert codes == [1] and re.search(r"^accessory: error: .*cannot be written \(File too large\)", err, re.M), err
    assert "Traceback" not in err and not list((tmp_path / "run").glob("epoch*"))


def ends(*words, ranks=1, plant="", timeout=120):
    with Job(*words, ranks=ranks, plant=plant) as job:
        return job.codes(timeout=timeout), job.out(), job.err()


def test_output_that_nobody_reads(home, tmp_path):
    closed = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
    full = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
    for verb in (["config"], ["inspect", home / "ckpt"]):
        (tmp_path / verb[0]).mkdir()
        (piped, stuck) = run_each([(verb, closed), (verb, full)], tmp_path / verb[0])
        assert piped == (0, "", "")
        assert stuck == (1, "", "accessory: error: No space left on device\n")


def test_a_fault_of_the_program_keeps_its_traceback(home):
    plant = "from accessory.train import loop\nloop.train_step = lambda *_, **__: {}['planted']\n"
    codes, _, err = ends("finetune", home / "run.yaml", f"out={home}/fault", plant=plant)
    assert codes == [1] and "KeyError: 'planted'" in err and "in <lambda>" in err
    assert err.splitlines()[-1] == "accessory: error: rank 0 of 1 failed: KeyError; its traceback is above"


def test_no_memory_left(home):
    for error in ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", "MemoryError()"):
        fails = f"def full(*_, **__): raise {error}"
        plant = f"import torch\nfrom accessory.train import loop\n{fails}\nloop.train_step = full\n"
        codes, _, err = ends("finetune", home / "run.yaml", f"out={home}/memory", "save.state_every=null", plant=plant)
        (line,) = err.splitlines()
        assert codes == [1] and "out of memory while step 1 of epoch 0 (a process needs about 0.00 GiB: weights" in line
        assert "): lower train.batch_size" in line


LONG = ["train.epochs=9999", "train.max_steps=null", "save.every_epochs=9999", "log.every=1"]


@pytest.mark.parametrize(
    "number, asked", [(signal.SIGINT, [0, 1]), (signal.SIGTERM, [1]), (signal.SIGUSR1, [0]), (signal.SIGHUP, [1])]
)
def test_a_signal_ends_a_run_with_a_state_to_resume_from(home, tmp_path, number, asked):
    """Also if only one rank gets it, and a scheduler sends it twice."""
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    with Job("finetune", home / "run.yaml", f"out={tmp_path}/run", *LONG, ranks=2) as job:
        job.reach("step     3/")
        for _ in range(1 if number == signal.SIGINT else 2):
            job.send(number, *asked)
            time.sleep(0.02)
        assert job.codes() == [128 + number] * 2, job.err()
        (stopped,) = re.findall(
            rf"^accessory: stopped by {name} after step (\d+) of \d+; resume=auto goes on", job.err(), re.M
        )
        assert "Traceback" not in job.err() and "error" not in job.err()
    assert [path.name for path in (tmp_path / "run/states").iterdir()] == [f"step{stopped}"]
    more = [*LONG[:1], f"train.max_steps={int(stopped) + 2}", "resume=auto"]
    codes, out, err = command("finetune", home / "run.yaml", f"out={tmp_path}/run", *more, ranks=2)
    assert codes == [0, 0], err
    assert f"resumed from {tmp_path}/run/states/step{stopped}" in out


def test_a_terminal_that_is_closed_ends_a_run_with_a_state(home, tmp_path):
    """As an ssh session that is lost: what is written from then on goes nowhere, and saving goes on."""
    plant = """
import fcntl, os, pty, termios, threading
mine, terminal = pty.openpty()
os.setsid()
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for stream in (1, 2):
    os.dup2(terminal, stream)
def close():
    read = b""
    while b"step     3/" not in read:
        read += os.read(mine, 4096)
    os.close(mine)
threading.Thread(target=close, daemon=True).start()
"""
    with Job("finetune", home / "run.yaml", f"out={tmp_path}/run", *LONG, plant=plant) as job:
        assert job.codes() == [128 + signal.SIGHUP]
    (state,) = (tmp_path / "run/states").iterdir()
    assert int(state.name.removeprefix("step")) >= 3


def test_a_signal_where_no_states_are_kept(home, tmp_path):
    with Job("finetune", home / "run.yaml", f"out={tmp_path}/run", *LONG, "save.state_every=null") as job:
        job.reach("step     2/")
        job.send(signal.SIGTERM)
        assert job.codes() == [143]
        assert "save.state_every is null: what was learnt since the last save is lost" in job.err()


def test_a_second_signal_ends_at_once(home, tmp_path):
    plant = "from accessory.train import loop\nloop.train_step = lambda *_, **__: print('in a step') or time.sleep(600)\n"
    with Job(
        "finetune",
        home / "run.yaml",
        f"out={tmp_path}/run",
        plant=plant + "import sys\nsys.stdout.reconfigure(line_buffering=True)\n",
    ) as job:
        job.reach("in a step")
        job.send(signal.SIGINT)
        job.reach("Ctrl-C: the run ends after this step; once more, and it ends at once")
        job.send(signal.SIGINT)
        assert job.codes(timeout=20) == [130]
        assert job.err().splitlines()[-1] == "accessory: stopped by Ctrl-C"


def test_a_signal_before_the_first_step_ends_at_once(home, tmp_path):
    plant = "from accessory.train import loop\nloop.RunData = lambda *_: print('reading', flush=True) or time.sleep(600)\n"
    with Job("finetune", home / "run.yaml", f"out={tmp_path}/run", plant=plant) as job:
        job.reach("reading")
        job.send(signal.SIGTERM)
        assert job.codes(timeout=20) == [143] and job.err() == "accessory: stopped by SIGTERM\n"
    assert not (tmp_path / "run").exists()


def test_torchrun_says_the_sentence_last(home, tmp_path):
    """After its own report, which is long, on one line."""
    words = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m", "accessory", "finetune"]
    words += [home / "run.yaml", f"out={tmp_path}/run", "data.mix=nowhere.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)], capture_output=True, text=True, env=environment
    )
    lines = ended.stderr.splitlines()
    sentence = "accessory: error: nowhere.yaml: no such file; expected a YAML or JSON file"
    assert ended.returncode == 1
    assert lines.count(sentence) == 1, "one rank says it"
    assert lines[-2].strip() == f"traceback : {sentence}", ended.stderr  # and behind it a line of ====
    assert not (tmp_path / "run").exists()
