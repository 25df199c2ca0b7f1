"""Run a check in a copy of the program, with a fault planted there or none, and say what it found."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from faults.fault import Fault

ROOT = Path(__file__).parents[2]
NEEDED = ("accessory", "tests", "configs", "data", "pyproject.toml")
LIMIT_S = 300.0
OUT_OF_TIME = re.compile(r"not end within|Timeout|no result of rank")
TRIVIAL = re.compile(r"\b(Syntax|Indentation|Import|ModuleNotFound|Name|UnboundLocal|Attribute|Type)Error: .*")


@dataclass(frozen=True)
class Outcome:
    """What a check said.

    Attributes:
        verdict: green; red: it caught something; hang: it did not end in time; broken: it says nothing of the fault, for
            the program did not even run.
        piece: which part of the check is red, in its own words.
    """

    verdict: str
    piece: str
    seconds: float

    @property
    def caught(self) -> bool:
        return self.verdict in ("red", "hang")


class Checks:
    """Runs checks, each in a copy of its own; ``stop`` ends those that run and lets no other begin."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, check: str, faults: Sequence[Fault] = (), limit_s: float = LIMIT_S) -> Outcome:
        """What ``check`` says of the program with ``faults``."""
        with copied(self.root) as home:
            for fault in faults:
                fault.plant(home)
            report = home / "certificate.json"
            words = shlex.split(check)
            if words[0] == "certify":
                command = ["accessory", *words, "--json", str(report)]
            else:
                command = ["pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *words]
            begun = time.monotonic()
            code, output = self._execute(["-m", *command], home, limit_s)
            seconds = time.monotonic() - begun
            if code is None:
                return Outcome("hang", f"no end within {limit_s:.0f} s", seconds)
            if code == 0:
                return Outcome("green", "", seconds)
            if found := TRIVIAL.search(output):
                return Outcome("broken", found[0], seconds)
            said = code == 1 and (_red_rows(report) if words[0] == "certify" else _failed_assertion(output))
            if not said:
                return Outcome("broken", _last_line(output), seconds)
            return Outcome("hang" if OUT_OF_TIME.search(said) else "red", said, seconds)

    def _execute(self, arguments: list[str], home: Path, limit_s: float) -> tuple[int | None, str]:
        """Exit code, None if the time ran out, and what Python said; no process is left behind."""
        (home / "tmp").mkdir()
        # the copy comes before an installed accessory, in every process that inherits this
        place = {"PYTHONPATH": str(home), "TMPDIR": str(home / "tmp"), "COLUMNS": "400", "PYTEST_ADDOPTS": ""}
        with open(home / "output", "wb") as output:  # no pipe: a straggler could keep that open
            with self._lock:
                if self._stopped:
                    raise InterruptedError
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=home,
                    env=os.environ | place,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
                self._running.discard(process)
        return code, (home / "output").read_text(errors="replace")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in tuple(self._running):
                _kill(process)


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A directory with what checks need of ``root``."""
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        for needed in NEEDED:
            source, target = root / needed, Path(name, needed)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                shutil.copyfile(source, target)
        yield Path(name)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and its group: ranks, the server that forks them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failed_assertion(output: str) -> str:
    """Of pytest's words: where it failed, and what the assertion said; of a rank that failed, what its last line says."""
    places = re.findall(r"^(tests/\S+\.py:\d+): in ", output, re.M)
    lines = [line[1:].strip() for line in output.splitlines() if line.startswith("E  ")]
    if not lines:
        return ""
    rank = "Traceback" in lines[0]
    return f"{places[-1].removeprefix('tests/') if places else ''}: {lines[-1] if rank else lines[0]}"


def _red_rows(report: Path) -> str:
    """Of a certificate: the first red cell's quantities and settings, and how many there are."""
    if not report.is_file():
        return ""
    rows = json.loads(report.read_text())["rows"]
    red = [row for row in rows if not row["passed"]]
    if not red:
        return ""
    errors, bounds = red[0]["errors"], red[0]["bounds"]
    pieces = [f"{name} {error:.1e}" for name, error in errors.items() if error is not None and error > bounds[name]]
    pieces += [f"{name} is no number" for name, error in errors.items() if error is None]
    pieces += [red[0]["reason"]] if red[0]["reason"] else []
    settings = ", ".join(f"{name}={value}" for name, value in red[0]["cell"].items())
    return f"{len(red)} of {len(rows)} cells: {'; '.join(pieces)} ({settings})"


def _last_line(output: str) -> str:
    return next((line for line in reversed(output.splitlines()) if line.strip()), "it said nothing")
