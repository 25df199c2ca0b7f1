"""Runs ``accessory serve`` in processes of its own, and restarts them when they end."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
ERROR = "accessory: error: "


class Worker:
    """A server in another process, watched by a thread.

    Attributes:
        url: the server's address; None while it does not run. status: its state in a sentence.
    """

    def __init__(self, words: Sequence[str], gpus: Sequence[int] = ()):
        self.url: str | None = None
        self.status = "The model is being loaded."
        self._words, self._gpus = words, gpus
        self._closes, self._answers = threading.Event(), threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def wait(self) -> bool:
        """Wait until the server runs; False if it ended before."""
        self._answers.wait()
        return self.url is not None

    def close(self) -> None:
        self._closes.set()
        if self._process:
            self._process.terminate()
        self._thread.join(10)
        if self._process and self._process.poll() is None:
            self._process.kill()

    def _watch(self) -> None:
        pause = 1.0
        while not self._closes.is_set():
            code, why, lived = self._run()
            self.url = None
            if self._closes.is_set() or not self._answers.is_set():
                break  # what does not start once will not start
            pause = 1.0 if lived else min(60.0, 2 * pause)
            self.status = f"The model's processes have ended ({why or f'exit code {code}'}). They are being started again."
            print(self.status, file=sys.stderr, flush=True)
            self._closes.wait(pause)
        self._answers.set()

    def _run(self) -> tuple[int, str, bool]:
        """Run the server to its end: its exit code, why it ended in its own words, and whether it has served."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, self._gpus))} if self._gpus else {})
        command = [sys.executable, "-m", "accessory", *self._words]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self._process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_end_with_parent, **pipes
        )
        if self._closes.is_set():
            self._process.terminate()
        why, lived = "", False
        for line in self._process.stdout or ():
            if found := re.search(r"is served at (http://\S+)/v1", line):
                self.url, self.status, lived = found[1], f"Ready since {time.strftime('%H:%M:%S')}.", True
                self._answers.set()
            else:
                why = line.removeprefix(ERROR).strip() if line.startswith(ERROR) else why
                print(line, end="", file=sys.stderr, flush=True)
        return self._process.wait(), why, lived


def _end_with_parent() -> None:
    """Have Linux end this process when its parent is gone, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
