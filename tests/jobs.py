"""``accessory`` as real processes: one, or the ranks of a job; none is left behind."""

import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
from ranks import server

from accessory.parallel.launch import hold_port


class Job:
    """``accessory words``, started as ``ranks`` processes.

    They are forked from a server that has imported what they need, which spares each of them seconds; everything else is
    theirs: command line, environment, output files. ``plant`` is Python that each runs before, with ``rank`` defined.
    """

    def __init__(self, *words, ranks=1, plant=""):
        self.folder = tempfile.TemporaryDirectory()
        self.held = hold_port()
        port = self.held.getsockname()[1]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))}
        self.files = [[Path(self.folder.name, f"{name}{rank}") for name in ("out", "err")] for rank in range(ranks)]
        self.processes = []
        for rank, files in enumerate(self.files):
            place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = inherited | ({k: str(v) for k, v in place.items()} if ranks > 1 else {})
            arguments = [*map(str, words)], environment, files, plant, rank
            self.processes.append(server().Process(target=_main, args=arguments))
            self.processes[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.held.close()
        self.folder.cleanup()

    def kill(self):
        """SIGKILL to all that still run."""
        for process in self.processes:
            process.kill()
            process.join()

    def send(self, number, *ranks):
        """A signal to ``ranks``, all if none is given."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def out(self):
        return "".join(out.read_text() for out, _ in self.files if out.exists())

    def err(self, *ranks):
        files = [self.files[rank][1] for rank in ranks or range(len(self.files))]
        return "".join(file.read_text() for file in files if file.exists())

    def running(self):
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def wait_for(self, condition, timeout=120):
        """Until ``condition()`` holds, which it must before any rank ends."""
        deadline = time.monotonic() + timeout
        while not condition():
            waits = time.monotonic() < deadline and len(self.running()) == len(self.processes)
            assert waits, f"not reached within {timeout} s, or before a rank ended: {self.out()} {self.err()}"
            time.sleep(0.02)

    def reach(self, text):
        self.wait_for(lambda: text in self.out() + self.err())

    def codes(self, *ranks, timeout=120):
        """The exit codes of ``ranks``, all if none is given, which must end within ``timeout`` s."""
        deadline = time.monotonic() + timeout
        processes = [self.processes[rank] for rank in ranks or range(len(self.processes))]
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                pytest.fail(f"{process.name} did not end within {timeout} s: {self.out()} {self.err()}")
        return [process.exitcode for process in processes]


def command(*words, ranks=1, timeout=120):
    """Run ``accessory words`` to its end; returns (exit codes, stdout, stderr), of all ranks together."""
    with Job(*words, ranks=ranks) as job:
        codes = job.codes(timeout=timeout)
        return codes, job.out(), job.err()


def _main(words, environment, files, plant, rank):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which has it ignored
    for stream, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["accessory", *words]
    exec(plant, {"rank": rank, "time": time})
    from accessory.cli import main

    main()


LIMIT_S = 60
"""Seconds that a command of ``run_each`` may take, before SIGALRM ends it."""


def run_each(commands, folder, workers=2):
    """Run many ``(words, plant)``, each as a process of its own; returns (exit code, stdout, stderr) of each, in order.

    A few processes, which have imported all that is needed, fork for one command after the other: that takes hundredths of a
    second. Each begins in an empty directory of its own below ``folder``.
    """
    files = [[folder / f"{number}.{name}" for name in ("out", "err", "code")] for number in range(len(commands))]
    shares = [list(zip(commands, files, strict=True))[first::workers] for first in range(workers)]
    processes = [server().Process(target=_fork_each, args=(share, dict(os.environ))) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [(int(code.read_text()), out.read_text(), err.read_text()) for out, err, code in files]


def _fork_each(commands, environment):
    for (words, plant), (*streams, code) in commands:
        place = code.with_suffix("")
        place.mkdir()
        child = os.fork()
        if not child:
            signal.alarm(LIMIT_S)
            os.chdir(place)
            _exit_of(lambda: _main([*map(str, words)], environment, streams, plant, 0))  # noqa: B023 (called at once)
        code.write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


def _exit_of(body):
    """Run ``body`` and end the process as Python would."""
    code = 0
    try:
        body()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else 1
        if code and code is not end.code:
            print(end.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
