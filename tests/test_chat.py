"""The commands that answer: generate with files, and chat in a terminal, on one process and on its own ranks."""

import fcntl
import gc
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import weakref
from dataclasses import replace

import pytest
import torch
from jobs import Job, command
from models import TINY, Tensors, build, make_tokenizer, weights
from ranks import run_ranks

from accessory.errors import UserError
from accessory.infer.sampling import Sampling
from accessory.model.meta import MetaModel
from accessory.train.save import save_model

QUESTIONS = ["the list of tokens", "a", "then every answer"]
TALK = [
    {"role": "user", "content": "the list"},
    {"role": "assistant", "content": "of words"},
    {"role": "user", "content": "and then"},
]


ARGS = replace(TINY, vocab_size=300, max_seq_len=4096, sliding_window=None)


def write_model(home):
    tokenizer = make_tokenizer(home / "tokenizer.model")
    w = weights(ARGS)
    w["output.weight"][3:259] *= 0.3  # pieces rather than bytes
    w["output.weight"][2] *= 0.0  # no answer ends by itself
    save_model(
        build(ARGS, "mixtral", Tensors(w)), home / "model", {"tokenizer.model": tokenizer}, torch.float64, "safetensors"
    )
    model = MetaModel.from_pretrained(home / "model", dtype=torch.float64, device="cpu")
    return model.chat([*QUESTIONS, TALK, [{"role": "system", "content": "then"}, *TALK[:1]]], max_gen_len=12)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("chat")
    (answers,) = run_ranks(1, write_model, home)
    (home / "answers.json").write_text(json.dumps([answer.strip() for answer in answers]))
    return home


@pytest.fixture(scope="module")
def answers(home):
    return json.loads((home / "answers.json").read_text())


OPTIONS = ("--precision", "fp64", "--max-gen-len", 12, "--temperature", 0)


@pytest.mark.parametrize("mp", [1, 2])
def test_prompts_of_a_file_are_answered_into_a_file(home, answers, tmp_path, mp):
    lines = [{"prompt": QUESTIONS[0]}, {"messages": TALK}, {"prompt": QUESTIONS[1]}]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)))
    words = (f"@{tmp_path}/in.jsonl", "--out", tmp_path / "out.jsonl", "--mp", mp, *OPTIONS)
    codes, out, err = command("generate", home / "model", *words)
    assert codes == [0], err
    assert out.endswith(f"{tmp_path}/out.jsonl: 3 answers\n")
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = (answers[0], answers[3], answers[1])
    assert told == [
        line | {"answer": answer, "finish_reason": "length", "tokens": 12}
        for line, answer in zip(lines, expected, strict=True)
    ]


def test_plain_lines_are_prompts_and_a_seed_gives_the_same_again(home, tmp_path):
    (tmp_path / "in.txt").write_text("\n\n".join(QUESTIONS))
    words = (f"@{tmp_path}/in.txt", *OPTIONS[:-1], 1.5, "--top-k", 20, "--seed")
    said = [command("generate", home / "model", *words, seed)[1] for seed in (-1, -1, 2)]
    assert said[0] == said[1] != said[2] and all(f"> {question}\n" in said[0] for question in QUESTIONS)


@pytest.mark.parametrize(("ranks", "words"), [(1, ["chat"]), (2, ["generate"])], ids=str)
def test_answers_that_nobody_reads_end_quietly(home, ranks, words):
    closed = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
    texts = QUESTIONS if words == ["generate"] else ()
    with Job(*words, home / "model", *texts, *OPTIONS, ranks=ranks, plant=closed) as job:
        assert job.codes() == [0] * ranks and job.err() == ""


def test_precisions_and_experts_are_named_as_on_the_command_line(home):
    model = MetaModel.from_pretrained(home / "model", dtype="fp64", device="cpu")
    assert model.llma.norm.weight.dtype == torch.float64
    for how, sentence in (
        ({"dtype": "bfloat16"}, "unknown precision 'bfloat16'; did you mean 'bf16'?"),
        ({"dtype": 8}, "unknown precision '8'; known: bf16, fp16, fp32, fp64"),
        ({"offload": 3}, "offload: expected experts=4, device_memory=14GB or a mapping of such keys, found 3"),
        ({"offload": "3"}, "offload: expected experts=4, device_memory=14GB or a mapping of such keys, found '3'"),
        ({"quant": 4}, "quantise: expected a name such as nf4, or a mapping of experts and attention, found 4"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            MetaModel.from_pretrained(home / "model", device="cpu", **how)


def test_a_model_that_is_let_go_takes_no_memory(home):
    """Another one may need it: evaluate --against has one model after the other, a notebook as many as it likes."""
    model = MetaModel.from_pretrained(home / "model", dtype="fp64", device="cpu")
    model.chat(QUESTIONS[:1], max_gen_len=2)
    model.engine.submit([1], Sampling(max_tokens=2, grammar=model.grammars_of(None).regex("a+")))
    assert list(model.engine.run())
    decoder = weakref.ref(model.llma)
    del model
    gc.collect()
    assert decoder() is None


class Terminal:
    """``accessory chat`` on a terminal."""

    def __init__(self, *words):
        self.out = ""
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "accessory", "chat", *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(theirs)
        self.file = ours

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.file)

    def until(self, text, seconds=90):
        """What comes until ``text`` does."""
        deadline, begin = time.monotonic() + seconds, len(self.out)
        while text not in self.out[begin:]:
            assert time.monotonic() < deadline, self.out
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    self.out += os.read(self.file, 4096).decode()
                except OSError as error:  # it has ended
                    raise AssertionError(self.out) from error
        return self.out[begin:]

    def say(self, line):
        os.write(self.file, line.encode() + b"\n")
        return self.until("> ").replace("\r", "").removeprefix(f"{line}\n").removesuffix("> ").strip()


def _own_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # as a shell gives it, so that Ctrl-C is a signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("mp", [1, 2])
def test_a_chat(home, answers, tmp_path, mp):
    with Terminal(home / "model", "--mp", mp, *OPTIONS) as chat:
        chat.until("> ")
        assert chat.say(QUESTIONS[0]) == answers[0]
        assert chat.say("/retry") == answers[0], "without temperature"
        assert chat.say("/undo") == "" and chat.say("/undo") == "nothing was answered yet"
        assert chat.say(QUESTIONS[1]) == answers[1]
        assert chat.say("/system then") == "" and chat.say(TALK[0]["content"]) == answers[4]
        assert f"wrote {tmp_path}/talk.json" in chat.say(f"/save {tmp_path}/talk.json")
        expected = [("system", "then"), ("user", "the list"), ("assistant", answers[4])]
        saved = json.loads((tmp_path / "talk.json").read_text())
        assert [(turn["role"], turn["content"]) for turn in saved] == expected
        assert "no such" in chat.say("/save /nowhere/talk.json").lower()
        assert "/undo" in chat.say("/help") and chat.say("/reset") == ""
        os.write(chat.file, b"\x04")  # Ctrl-D
        assert chat.process.wait(60) == 0


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(home, answers):
    with Terminal(home / "model", *OPTIONS[:2], "--max-gen-len", 4000, "--temperature", 0) as chat:
        chat.until("> ")
        os.write(chat.file, f"{QUESTIONS[0]}\n".encode())
        chat.until(answers[0][:8])
        os.write(chat.file, b"\x03")
        assert " ..." in chat.until("> ")
        assert chat.say("/undo") == ""
        deadline = time.monotonic() + 60
        while chat.process.poll() is None and time.monotonic() < deadline:
            os.write(chat.file, b"\x03")  # Python misses one that comes just before it begins to read
            time.sleep(0.5)
        assert chat.process.wait(1) == 130


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('{"prompt": "a"}\n{"question": "b"}', 'line 2: expected {"prompt": text} or {"messages": [...]}'),
        ("not JSON", "line 1: expected"),
        ('{"prompt": null}', "line 1: expected"),
        ('{"prompt": "a", "system": "b"}', "found prompt, system"),
        ('\n{"messages": [{"role": "user"}]}', "line 2: turn 1 must be an object"),
        ('{"prompt": "a\u2028b"}\n\n{', "line 3: expected"),
        (b'{"prompt": "\xe9"}', "in.jsonl: not UTF-8"),
        ("", "in.jsonl: no prompt in it"),
    ],
)
def test_files_that_hold_no_prompts(lines, sentence, home, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    codes, out, err = command("generate", home / "model", f"@{tmp_path}/in.jsonl")
    assert codes == [1] and sentence in err and not out
