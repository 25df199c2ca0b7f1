"""What exps/see.sh teaches, what it holds out, and how it judges answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def digits(*words):
    words = [sys.executable, ROOT / "exps/see_digits.py", *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    done = digits("write", folder)
    assert done.returncode == 0, done.stderr
    return folder


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_what_is_held_out_is_asked_with_its_own_image_with_another_and_with_none(folder):
    learnt, held_out, asked = (read(folder, name) for name in ("digits", "held_out", "questions"))
    images = {record["image"]: record["output"] for record in (*learnt, *held_out)}
    assert len(images) == len(learnt) + len(held_out) == 1797 and len(held_out) == 300 and len(asked) == 900
    shown = [[part["image"] for part in one["messages"][0]["content"] if "image" in part] for one in asked]
    assert shown[:300] == [[f"{folder}/{record['image']}"] for record in held_out] and shown[600:] == [[]] * 300
    for record, (other,) in zip(held_out, shown[300:600], strict=True):
        assert images[str(Path(other).relative_to(folder))] != record["output"]
    for word in ("zero", "one"):  # black on white: a nought leaves its middle white
        pixels = [np.asarray(Image.open(folder / image)) for image, said in images.items() if said == word]
        assert (np.mean(pixels, 0)[3:5, 3:5].mean() > 128) == (word == "zero")


def test_answers_are_judged(folder, tmp_path):
    right = [record["output"] for record in read(folder, "held_out")]
    always = ["one"] * 300

    def judged(*answers):
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
        return digits("check", folder, tmp_path / "picture.png", tmp_path)

    done = judged(*right, *always, *always)
    assert done.returncode == 0 and "right are 100.0%" in done.stdout and (tmp_path / "picture.png").stat().st_size
    assert judged(*right[:269], *["nothing"] * 31, *always, *always).returncode == 1, "fewer than nine of ten"
    assert judged(*right, *right, *always).returncode == 1, "it does not need the image"
    assert judged(*right, *always, *right).returncode == 1
