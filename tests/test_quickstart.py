"""What the quickstart teaches, what it holds out, and how it judges answers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def questions(verb, folder, said=""):
    words = [sys.executable, ROOT / "exps/quickstart_questions.py", verb, folder]
    return subprocess.run(words, input=said, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    done = questions("write", folder)
    assert done.returncode == 0, done.stderr
    return folder


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def asked():
    """The questions that the quickstart asks."""
    return re.findall(r'"([^"]+[.?])"', (ROOT / "exps/quickstart.sh").read_text().partition("ask()")[2].partition("}")[0])


def test_one_wording_of_each_question_is_held_out(folder):
    learnt, held_out = ([*read(folder, f"first{part}"), *read(folder, f"later{part}")] for part in ("", "_held_out"))
    wordings = {record["instruction"] for record in learnt}
    assert len(wordings) == len(learnt) == 5 * len(held_out) > 2000
    assert wordings.isdisjoint(record["instruction"] for record in held_out)
    assert {record["output"] for record in learnt} == {record["output"] for record in held_out}
    first, later = (
        {re.findall(r"(\w+)\.\w", r["instruction"])[0] for r in read(folder, part)} for part in ("first", "later")
    )
    assert len(later) == 6 and first.isdisjoint(later)


def test_answers_are_judged(folder):
    answers = {r["instruction"]: r["output"] for part in ("first", "later") for r in read(folder, f"{part}_held_out")}
    assert len(asked()) == 3
    right = [f"> {question}\n{answers[question]}\n\n" for question in asked()]
    done = questions("check", folder, "".join(right))
    assert done.returncode == 0 and "3 of 3 answers are right" in done.stdout
    for wrong in ("Nothing.", "", answers[asked()[1]]):
        done = questions("check", folder, "".join([f"> {asked()[0]}\n{wrong}\n\n", *right[1:]]))
        assert done.returncode == 1 and "2 of 3 answers are right" in done.stdout
    assert questions("check", folder, "> Why?\nBecause.\n\n").returncode == 1
    assert questions("check", folder, "").returncode == 1
