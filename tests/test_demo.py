"""The demos as their users see them: pages in a browser, processes on the machine."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gradio_client
import pytest
from ranks import run_ranks
from test_chat import QUESTIONS, write_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def answers(home):
    return [answer.strip() for answer in run_ranks(1, write_model, home)[0]]


class Demo:
    """A demo's processes, in a group of their own; ``code``: what the first of them ends with after Ctrl-C."""

    def __init__(self, *words, log, code=0):
        self.log, self.code = log, code
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE"))}
        environment = inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)], cwd=ROOT, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def __enter__(self):
        until(lambda: "The page is at" in self.said(), 90)
        self.url = re.search(r"The page is at (\S+)", self.said())[1]
        return self

    def __exit__(self, *_):
        ours = processes(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(30) == self.code, self.said()
            until(lambda: not any(map(lives, ours)), 30)
        finally:
            for pid in [self.process.pid, *ours]:
                if lives(pid):
                    os.kill(pid, signal.SIGKILL)

    def said(self):
        return self.log.read_text()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes(pid):
    """Those that ``pid`` has started, and they in turn."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children += [int(stat.parent.name)] if int(stat.read_text().rpartition(")")[2].split()[1]) == pid else []
        except OSError:
            continue
    return children + [other for child in children for other in processes(child)]


def test_what_the_page_asks_for(home, answers, tmp_path):
    """An answer that grows, and the picture of its experts; after a process was lost, the same again. ``make browser`` looks
    at the page itself."""
    words = ("demos/multi_turn.py", "--n_gpus", 2, "--pretrained_path", home / "model", "--dtype", "fp64")
    with (
        Demo(*words, log=tmp_path / "log") as demo,
        contextlib.closing(gradio_client.Client(demo.url, verbose=False)) as page,
    ):
        told = list(page.submit(QUESTIONS[0], "", 12, 0, 1.0, 0, 1.0, api_name="/answer"))
        assert [text for text, _ in told][-1].strip() == answers[0] and len(told) > 5
        assert all(answers[0].startswith(text.strip()) for text, _ in told) and "Figure" in str(told[-1][1])
        with pytest.raises(gradio_client.exceptions.AppError, match="leaves no room"):
            page.predict("word " * 9000, "", 12, 0, 1.0, 0, 1.0, api_name="/answer")
        assert "Traceback" not in demo.said(), "that is told on the page"
        os.kill(processes(demo.process.pid)[-1], signal.SIGKILL)
        assert ask_anew(demo.url) is None, "a lost process is noticed where it is needed"
        until(lambda: "They are being started again" in demo.said())
        until(lambda: ask_anew(demo.url) == answers[0], 90)


def test_single_questions_under_torchrun(home, answers, tmp_path):
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "demos/single_turn.py")
    words += ("--pretrained_path", home / "model", "--dtype", "fp64", "--offload", "experts=2")
    with (
        Demo(*words, log=tmp_path / "log", code=1) as demo,  # torchrun's
        contextlib.closing(gradio_client.Client(demo.url, verbose=False)) as page,
    ):
        sampling, how = (12, 0, 1.0, 0, 1.0), {"api_name": "/answer"}
        assert page.predict(QUESTIONS[0], "", "asked in the model's template", *sampling, **how)[0] == answers[0]
        text = page.predict(QUESTIONS[0], "", "gone on with as it is", *sampling, **how)[0]
        assert text and text != answers[0]


def ask_anew(url):
    """What a session of its own is answered; None while there is nobody to do it."""
    page = gradio_client.Client(url, verbose=False)
    with contextlib.closing(page), contextlib.suppress(gradio_client.exceptions.AppError):
        return page.predict(QUESTIONS[0], "", 12, 0, 1.0, 0, 1.0, api_name="/answer")[0].strip()


def test_a_model_that_is_not_there():
    command = [sys.executable, "demos/multi_turn.py", "--pretrained_path", "nowhere", "--quant"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=90)
    assert done.returncode == 1 and b"nowhere: no such directory" in done.stderr
