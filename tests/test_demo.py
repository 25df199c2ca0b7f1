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

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if os.access(path, os.X_OK)), None)
PICTURES = os.environ.get("ACCESSORY_SCREENSHOTS")  # a directory, to keep what the browser showed
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


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to drive")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Page:
    """The page of ``multi_turn.py`` in a session of its own."""

    def __init__(self, browser, url):
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.page.set_default_timeout(60_000)
        self.asked = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.get_by_label("Temperature").first.fill("0")
        self.set("Longest answer", 12)

    def set(self, label, value):
        box = self.page.locator(f"input[type=number][aria-label*='{label}']")
        box.fill(str(value))
        box.press("Tab")

    def ask(self, text):
        box = self.page.locator("textarea").last  # its placeholder goes with the first question
        box.fill(text)
        box.press("Enter")

    def answers(self):
        return [text.strip() for text in self.page.locator("[data-testid=bot]").all_inner_texts()]

    def until(self, condition, seconds=60):
        """As ``until``, with the browser at work."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.page.inner_text("body")
            self.page.wait_for_timeout(100)

    def answered(self, *expected):
        self.until(lambda: self.answers() == list(expected) and not self.streams())

    def streams(self):
        return self.page.locator("button.stop-button").count() > 0

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def keep(self, name):
        if PICTURES:
            self.page.screenshot(path=f"{PICTURES}/{name}.png")


def test_what_the_page_asks_for(home, answers, tmp_path):
    """Without a browser: an answer that grows, and the picture of its experts."""
    words = ("demos/multi_turn.py", "--pretrained_path", home / "model", "--dtype", "fp64")
    with (
        Demo(*words, log=tmp_path / "log") as demo,
        contextlib.closing(gradio_client.Client(demo.url, verbose=False)) as page,
    ):
        told = list(page.submit(QUESTIONS[0], "", 12, 0, 1.0, 0, 1.0, api_name="/answer"))
        assert [text for text, _ in told][-1].strip() == answers[0] and len(told) > 5
        assert all(answers[0].startswith(text.strip()) for text, _ in told) and "Figure" in str(told[-1][1])
        with pytest.raises(gradio_client.exceptions.AppError, match="leaves no room"):
            page.predict("word " * 9000, "", 12, 0, 1.0, 0, 1.0, api_name="/answer")


def test_a_talk_in_the_browser(home, answers, browser, tmp_path):
    words = ("demos/multi_turn.py", "--n_gpus", 2, "--pretrained_path", home / "model", "--dtype", "fp64")
    with Demo(*words, log=tmp_path / "log") as demo:
        first, second = Page(browser, demo.url), Page(browser, demo.url)
        for page, number in ((first, 0), (second, 1)):  # two sessions, at once
            page.ask(QUESTIONS[number])
        first.answered(answers[0])
        second.answered(answers[1])
        first.until(lambda: first.page.locator("img[alt], .plot-container, [data-testid=plot] img").count() > 0)
        first.keep("answered")

        first.ask(QUESTIONS[2])  # a second turn
        first.until(lambda: len(first.answers()) == 2 and not first.streams())
        later = first.answers()[1]
        first.press("Retry")
        first.until(lambda: not first.streams())
        first.answered(answers[0], later)  # greedily, the same again
        first.press("Undo")
        first.answered(answers[0])
        second.press("Clear")
        second.answered()

        second.set("Longest answer", 4000)
        second.ask(QUESTIONS[1])
        seen = set()
        second.until(lambda: seen.add("".join(second.answers())) or len(seen) > 4)  # it grows
        second.keep("streams")
        second.page.locator("button.stop-button").click()
        second.until(lambda: not second.streams())
        stopped = second.answers()
        second.page.wait_for_timeout(1000)
        assert second.answers() == stopped

        workers = [pid for pid in processes(demo.process.pid) if lives(pid)]
        os.kill(workers[-1], signal.SIGKILL)
        status = first.page.locator("#status")
        first.until(lambda: "started again" in status.inner_text())
        first.keep("lost")
        first.until(lambda: "Ready" in status.inner_text(), 90)
        first.page.get_by_role("button", name="Clear", exact=True).last.click()
        first.ask(QUESTIONS[0])
        first.answered(answers[0])
        hosts = {url.split("/")[2] for page in (first, second) for url in page.asked if "//" in url}
        assert hosts == {demo.url.split("/")[2]}, "nothing is asked of any other machine"


def test_single_questions_under_torchrun(home, answers, browser, tmp_path):
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "demos/single_turn.py")
    words += ("--pretrained_path", home / "model", "--dtype", "fp64")
    with Demo(*words, log=tmp_path / "log", code=1) as demo:  # torchrun's
        page = browser.new_page()
        page.goto(demo.url)
        for label, value in (("Temperature", 0), ("Longest answer", 12)):
            page.locator(f"input[type=number][aria-label*='{label}']").fill(str(value))
        page.get_by_label("Question", exact=True).fill(QUESTIONS[0])
        page.get_by_role("button", name="Run", exact=True).click()
        box = page.locator("#answer textarea")
        until(lambda: page.wait_for_timeout(100) or box.input_value() == answers[0])


def test_a_model_that_is_not_there():
    command = [sys.executable, "demos/multi_turn.py", "--pretrained_path", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=90)
    assert done.returncode == 1 and b"nowhere: no such directory" in done.stderr
