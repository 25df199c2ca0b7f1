"""The pages of the demos in a real browser: ``make browser``. It needs Chromium or Chrome, and playwright to drive it."""

import os
import shutil
import signal
import time

import pytest
from playwright import sync_api as playwright
from ranks import run_ranks
from test_chat import QUESTIONS, write_model
from test_demo import Demo, lives, processes, until
from test_seen_use import QUESTION, write_seeing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
PICTURES = os.environ.get("ACCESSORY_SCREENSHOTS")  # a directory, to keep what the browser showed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def answers(home):
    return [answer.strip() for answer in run_ranks(1, write_model, home)[0]]


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, f"there is no browser to drive: none of {BROWSERS}"
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
        first.ask(QUESTIONS[1])  # a lost process is noticed where it is needed
        status = first.page.locator("#status")
        first.until(lambda: "started again" in status.inner_text())
        first.keep("lost")
        first.until(lambda: "Ready" in status.inner_text(), 90)
        third = Page(browser, demo.url)
        third.ask(QUESTIONS[0])
        third.answered(answers[0])
        hosts = {url.split("/")[2] for page in (first, second, third) for url in page.asked if "//" in url}
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


def test_an_image_in_the_browser(browser, tmp_path):
    """It is seen where it was shown; another talk shows none."""
    (expected,) = run_ranks(1, write_seeing, tmp_path)
    words = ("demos/multi_turn_mm.py", "--pretrained_path", tmp_path / "model", "--dtype", "fp64")
    with Demo(*words, log=tmp_path / "log") as demo:
        first = Page(browser, demo.url)
        first.set("Longest answer", 8)
        first.page.locator("input[type=file]").first.set_input_files(tmp_path / "0.png")
        first.until(lambda: first.page.locator("[data-testid=multimodal-textbox] img, .thumbnail-item").count() > 0)
        first.ask(QUESTION)
        first.answered(expected[0])
        first.keep("image")
        second = Page(browser, demo.url)
        second.set("Longest answer", 8)
        second.ask(QUESTION)
        second.answered(expected[3])
        assert {url.split("/")[2] for url in first.asked if "//" in url} == {demo.url.split("/")[2]}
