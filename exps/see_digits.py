"""Handwritten digits as a visual task: the 1,797 real ones in scikit-learn, each with the question which digit it is.

    python exps/see_digits.py write DIR
    python exps/see_digits.py check DIR PICTURE RUN ...     # each has answers.jsonl

Held-out questions are asked three times: with their own image, with another digit's, and with none. A model that sees is
right with the first, and near chance with the others.
"""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTION = "Which digit is it?"
HELD_OUT = 300
MIX = """\
META:
  - {path: digits.jsonl, template: mixtral-instruct}
  - {path: held_out.jsonl, template: mixtral-instruct, split: validation}
"""


def digits() -> tuple[np.ndarray, np.ndarray]:
    """[n, 8, 8] of 0 to 16, and which digit each is."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        sys.exit('the digits lie in scikit-learn: pip install "accessory-moe[see]"')
    with gzip.open(Path(found.origin).parent / "datasets/data/digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)


def write(folder: Path) -> None:
    """The images, the records of both splits, the questions, and the mix."""
    pixels, numbers = digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = []
    for place, image in enumerate(pixels):
        names.append(f"images/{place}.png")
        Image.fromarray((255 - image * 255 / 16).astype(np.uint8)).save(folder / names[-1])
    order = np.random.default_rng(0).permutation(len(names))
    splits = {"held_out": order[:HELD_OUT], "digits": order[HELD_OUT:]}
    for split, places in splits.items():
        records = ({"image": names[n], "instruction": QUESTION, "output": WORDS[numbers[n]]} for n in places)
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    held_out = splits["held_out"]
    others = [
        next(n for n in np.roll(held_out, -place) if numbers[n] != numbers[held_out[place]]) for place in range(HELD_OUT)
    ]
    shown = [str(folder / names[n]) for n in (*held_out, *others)] + [None] * HELD_OUT
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(_question(image))}\n" for image in shown))
    (folder / "mix.yaml").write_text(MIX)
    print(f"{folder}: {len(splits['digits'])} digits to learn from, {HELD_OUT} held out")


def _question(image: str | None) -> dict[str, object]:
    parts = [{"type": "image", "image": image}] if image else []
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]}


def check(folder: Path, picture: Path, runs: list[Path]) -> None:
    """Print how many answers are right, draw some; exit code 1 unless those with their own image, and only those, are."""
    right = [json.loads(line)["output"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    sees = True
    for run in runs:
        answers = _answers(run)
        shares = [
            np.mean([answer == word for answer, word in zip(answers[start : start + HELD_OUT], right, strict=True)])
            for start in range(0, 3 * HELD_OUT, HELD_OUT)
        ]
        own, other, none = shares
        print(f"{run.name}: of {HELD_OUT} digits that it has never seen, right are {own:.1%}")
        print(f"    {other:.1%} if it is shown another digit, {none:.1%} if it is shown nothing")
        sees &= bool(own >= 0.9 and other <= 0.2 and none <= 0.2)
    draw(folder, picture, runs[-1], right)
    print(f"picture: {picture}")
    sys.exit(not sees)


def _answers(run: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (run / "answers.jsonl").read_text().splitlines()]


def draw(folder: Path, picture: Path, run: Path, right: list[str], most: int = 20) -> None:
    """Some images with what the model says of them."""
    from matplotlib.figure import Figure

    images = [json.loads(line)["image"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, image, answer, word in zip(figure.subplots(2, most // 2).flat, images, _answers(run), right, strict=False):
        axes.imshow(Image.open(folder / image), cmap="gray")
        axes.set_title(answer[:12], fontsize=9, color="black" if answer == word else "red")
        axes.set_axis_off()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), Path(sys.argv[3]), [Path(run) for run in sys.argv[4:]])
