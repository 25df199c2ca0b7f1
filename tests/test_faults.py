"""The planted faults still apply, and their runner tells a caught one from an uncaught one. (``make faults`` runs all.)"""

import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import EIGHT, EVERY, ROOMS
from faults.fault import Fault
from faults.runner import ROOT, Checks

from accessory.cli import make_parser


@pytest.mark.parametrize("room", ROOMS)
def test_they_still_apply(room):
    assert ROOMS[room], "a room without faults"
    for fault in ROOMS[room]:
        assert fault.planted(ROOT)  # each old text stands once in its file, and what is made is Python


def test_they_name_nothing_that_is_not_there(tmp_path):
    """A fault with a name that is gone would only show that Python stumbles over it."""
    for number, fault in enumerate(EVERY):
        for path, text in fault.planted(ROOT).items():
            if path.suffix != ".py":
                continue  # C's compiler finds them
            (tmp_path / f"{number}-{path.stem}.py").write_text(f"# {fault.name}\n{text}")
    words = ["ruff", "check", "--isolated", "--select=F821", "--output-format=concise", str(tmp_path)]
    found = subprocess.run([Path(sys.executable).parent / words[0], *words[1:]], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_they_are_many_and_their_names_are_their_own():
    assert len(EVERY) >= 60 and len({fault.name for fault in EVERY}) == len(EVERY)
    assert len(EIGHT) == 8 and set(EIGHT) <= {fault.name for fault in EVERY}
    rooms = {file.split("/")[1] for fault in EVERY for file, _, _ in fault.changes}
    assert rooms == {"model", "train", "parallel", "tuning", "checkpoint", "infer", "data", "visual"}


@pytest.mark.parametrize("check", sorted({fault.check for fault in EVERY}))
def test_every_check_exists(check):
    words = shlex.split(check)
    if words[0] == "certify":
        make_parser().parse_args(words)
        return
    file, _, name = words[0].partition("::")
    text = (ROOT / file).read_text()
    assert not name or re.search(rf"^def {name.partition('[')[0]}\(", text, re.M), check


THING = "def double(x):\n    return 2 * x\n"
TEST = "from accessory import thing\nfrom elsewhere import asked\n\n\ndef test_double():\n    assert asked(thing, 2) == 4\n"
# the number comes from a process of its own, as ranks are: there, too, the copy must be what is imported
ELSEWHERE = """import subprocess, sys

def asked(thing, x):
    expected = thing.double(x)
    code = f"from accessory import thing; print(thing.double({x}))"
    told = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert told == expected
    return told
"""
TURNS = {"3 * x": "red", "x + x": "green", "y * x": "broken", "sum(iter(int, 1))": "hang"}  # in place of 2 * x: the verdict


def test_the_runner_tells_them_apart(tmp_path):
    files = {"accessory/__init__.py": "", "accessory/thing.py": THING, "tests/test_thing.py": TEST}
    for name, text in (files | {"tests/elsewhere.py": ELSEWHERE}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    check = "tests/test_thing.py::test_double -p no:xdist -p no:hypothesispytest -p no:timeout"
    faults = [Fault(new, "accessory/thing.py", "2 * x", new, check) for new in TURNS]
    checks = Checks(tmp_path)
    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(lambda fault: checks.run(check, [fault], 1.0 if "sum" in fault.name else 60.0), faults))
    assert [outcome.verdict for outcome in outcomes] == list(TURNS.values()), outcomes
    assert outcomes[0].piece == "test_thing.py:6: assert 6 == 4"
    assert "NameError" in outcomes[2].piece
    assert (tmp_path / "accessory/thing.py").read_text() == THING
    with pytest.raises(ValueError, match="stands 0 times"):
        checks.run(check, [faults[0], faults[1]])
    with pytest.raises(ValueError, match="is no Python"):
        Fault("", "accessory/thing.py", "2 * x", "2 *", check).planted(tmp_path)
