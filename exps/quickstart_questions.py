"""Questions about functions of the standard library, each answered by the first sentence of the function's documentation.

    python exps/quickstart_questions.py write DIR
    accessory generate MODEL QUESTION ... | python exps/quickstart_questions.py check DIR

Every function has six questions. One of them, chosen by the length of its name, is held out: a model is tested on wordings
that it has not seen for the function.
"""

import json
import re
import sys
from pathlib import Path

from accessory.data.stdlib import stdlib_entries

WAYS = (
    "What is {} for?",
    "Explain {}.",
    "Tell me about {}.",
    "How would you describe {}?",
    "What does {} do?",
    "Describe {} in a sentence.",
)
LATER = {"glob", "heapq", "secrets", "shutil", "statistics", "textwrap"}
"""Modules for the adapter only."""
MIXES = {
    "first.yaml": """\
META:
  - {path: first.jsonl, template: mixtral-instruct}
  - {path: first_held_out.jsonl, template: mixtral-instruct, split: validation}
""",
    "later.yaml": """\
META:
  - {path: later.jsonl, template: mixtral-instruct}
  - {path: first.jsonl, template: mixtral-instruct, epochs: 0.1}  # a tenth in turn, so that it is not forgotten
  - {path: later_held_out.jsonl, template: mixtral-instruct, split: validation}
""",
}


def documented_functions() -> dict[str, str]:
    """The first sentence about every public function, where that is short: {"json.dumps": "Serialize ``obj`` to ..."}."""
    found: dict[str, str] = {}
    for entry in stdlib_entries():
        paragraph = " ".join(entry.documentation.split("\n\n")[0].split())
        sentence = re.match(r"(.{20,80}?\.)( [A-Z]|$)", paragraph)
        if sentence and entry.kind == "function" and re.fullmatch(r"[a-z]\w*\.[a-zA-Z]\w*", entry.name):
            found.setdefault(entry.name, sentence[1])
    return found


def write(folder: Path) -> None:
    """The records of both trainings, what is held out of each, and the mixes that name them."""
    files: dict[str, list[dict[str, str]]] = {}
    for name, sentence in documented_functions().items():
        part = "later" if name.split(".")[0] in LATER else "first"
        for number, way in enumerate(WAYS):
            file = f"{part}_held_out.jsonl" if number == len(name) % len(WAYS) else f"{part}.jsonl"
            files.setdefault(file, []).append({"instruction": way.format(name), "output": sentence})
    folder.mkdir(parents=True, exist_ok=True)
    for file, records in sorted(files.items()):
        (folder / file).write_text("".join(f"{json.dumps(record)}\n" for record in records))
        print(f"{folder / file}: {len(records)} questions, e.g. {records[0]['instruction']}")
    for file, mix in MIXES.items():
        (folder / file).write_text(mix)


def check(folder: Path) -> None:
    """Print what ``accessory generate`` says, and which of its answers are right; exit code 1 if not all are."""
    held_out = [json.loads(line) for file in folder.glob("*_held_out.jsonl") for line in file.read_text().splitlines()]
    answers = {record["instruction"]: record["output"] for record in held_out}
    given = [text.partition("\n") for text in f"\n{sys.stdin.read()}".split("\n> ")[1:]]
    right = 0
    for question, _, answer in given:
        if question not in answers:
            sys.exit(f"not among the questions that are held out in {folder}: {question}")
        is_right = answer.strip() == answers[question]
        right += is_right
        print(f"> {question}\n{answer.strip()}\n{'right' if is_right else f'wrong: {answers[question]}'}\n")
    print(f"{right} of {len(given)} answers are right; none of the questions was trained on in these words")
    sys.exit(not 0 < right == len(given))


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
