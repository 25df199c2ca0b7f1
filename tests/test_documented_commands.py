"""Every command of README.md, docs/ and data/README.md is run as it is printed, on models and data that fit."""

import functools
import glob
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from multiprocessing.forkserver import _forkserver
from pathlib import Path

import pytest
from jobs import Job
from ranks import run_ranks
from slips import make_home
from test_seen_use import write_seeing

from accessory.certify import command
from accessory.cli import make_parser
from accessory.config import from_mapping
from accessory.settings import TuningSection

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "data/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
COMMANDS = ("accessory", ".venv/bin/accessory", "torchrun", "srun", "export", "make", "python", "bash")
"""First words of a line that is a command."""
STANDS_FOR = {  # what a reader fills in, or has a cluster for: what it is here
    "CKPT_DIR": "{home}/ckpt",
    "CONFIG_JSON": "{home}/ckpt/config.json",
    "TOKENIZER": "{home}/ckpt/tokenizer.model",
    "RUN.yaml": "{home}/run.yaml",
    "RUN_OR_MIX.yaml": "{home}/run.yaml",
    "MIX.yaml": "{home}/mix.yaml",
    "SRC": "{home}/ckpt",
    "STATE": "{home}/lora/states/step1",
    "BASE": "{home}/ckpt",
    "ADAPTER": "{home}/adapter",
    "mine=ADAPTER": "mine={home}/adapter",
    "DST": "{new}",
    "TASKS": "{home}/tasks",
    "scores.json": "{new}",
    "@questions.txt": "@{home}/questions.txt",
    "SPHINX": "{home}/seeing/model",
    "a.jpg": "{home}/seeing/0.png",
    "answers.jsonl": "{new}",
    "DIR/config.json": "{home}/model.json",
    "ACCESSORY_DATA=/where/the/data/is": "ACCESSORY_DATA={home}",
    "nf4": "nf4-8",
    "int4": "int4-8",
    "experts=nf4,attention=int8": "experts=nf4-8,attention=int8",
    "model.checkpoint=BASE": "model.checkpoint={home}/ckpt",
    "model.quantise.experts=nf4": "model.quantise.experts=nf4-8",
    "model.quantise.attention=nf4": "model.quantise.attention=nf4-8",
    "tuning.lora.rank=16": "tuning.lora.rank=2",
    "cuda": "cpu",
    "1,2,4,8": "1,2",
    "8": "2",  # processes and parts
    "4": "2",
    "-n32": "-n2",
    "128": "2",
    "8080": "0",
}
SMALL = {  # what is added to a verb, so that it takes seconds
    "finetune": ["train.max_steps=1", "train.batch_size=1", "train.epochs=1", "data.max_seq_len=192", "log.probe_tokens=64"],
    "generate": ["--max-gen-len", "2"],
    "serve": ["--port", "0"],
    "plan": ["--rows=2"],
    "certify": ["--quick"],
}
SMALL["finetune"] += ["log.tensorboard=false", "data.validation=0", "parallel.model_parallel=2"]
MORE_RANKS = "torchrun --nproc-per-node 8 -m accessory finetune configs/finetune/quickstart.yaml parallel.model_parallel=4"
"""More model-parallel ranks than the model has kv heads."""


def blocks(document, language=""):
    """The code blocks of a document: those between fences of a language, or, of none, those that are indented too."""
    text = (ROOT / document).read_text()
    fenced = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return fenced if language else fenced + re.findall(r"(?:^    .*\n)+", text, re.M)


def commands(document):
    """Its commands, in their order, each on one line and without the comment behind it."""
    for block in blocks(document):
        for line in re.sub(r"\\\n *", "", block).splitlines():
            words = shlex.split(line, comments=True) if line.strip().startswith(COMMANDS) else []
            if words and words[0] in COMMANDS:
                yield shlex.join(words)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """What the repository looks like after the quickstart; ``home`` in it has a model that 2 ranks can cut."""
    place = tmp_path_factory.mktemp("workshop")
    for name in ("configs", "exps", "data", "tools", "Makefile", "pyproject.toml"):
        (place / name).symlink_to(ROOT / name)
    home = place / "home"
    home.mkdir()
    make_home(home)
    records = json.dumps([json.loads(line) for line in (home / "talks.jsonl").read_text().splitlines()])
    for name in ("ultrachat_200k_train_sft.json", "wizardcode_evol_instruct.json"):  # of another content each
        (home / name).write_text(records.replace("the", name[:4]))
    (home / "questions.txt").write_text("What is json?\nWhy?\n")
    write_task(home)
    (home / "seeing").mkdir()
    run_ranks(1, write_seeing, home / "seeing")
    quickstart = place / "runs/quickstart"
    subprocess.run([sys.executable, ROOT / "exps/quickstart_questions.py", "write", quickstart / "data"], check=True)
    mix, tokenizer = quickstart / "data/later.yaml", quickstart / "data/tokenizer.model"
    run(place, ["data", "tokenizer", mix, tokenizer, "--vocab-size", 2048])
    for records in (quickstart / "data").glob("first*.jsonl"):
        records.write_text("".join(records.open().readlines()[:40]))
    for out, layout in (("model", "mixtral"), ("mixtral_sparse", "mixtral_sparse")):
        settings = [f"model.layout={layout}", f"out={quickstart}/{out}", *SMALL["finetune"], "parallel.model_parallel=1"]
        run(place, ["finetune", "configs/finetune/quickstart.yaml", *settings])
    (quickstart / "mixtral").symlink_to("model")
    (quickstart / "model/epoch0-iter1").rename(quickstart / "model/epoch5")
    run(place, ["convert", quickstart / "model/epoch5", quickstart / "merged", "--to", "hf"])
    lora = [f"model.checkpoint={home}/ckpt", f"out={home}/lora", "tuning.lora.rank=2", *SMALL["finetune"]]
    run(place, ["finetune", home / "run.yaml", *lora, "parallel.model_parallel=1"])
    (home / "lora/epoch0-iter1").rename(home / "adapter")
    return place


def write_task(home):
    """The task of docs/evaluation.md, with its data."""
    (described,) = blocks("docs/evaluation.md", "yaml")
    (home / "tasks").mkdir()
    data = f"{home}/tasks/questions.jsonl}}, cache_dir: {home}/datasets"
    (home / "tasks/my_task.yaml").write_text(described.replace("questions.jsonl}", data))
    question = {"question": "the list is made", "choices": ["of words", "of tokens"], "answer": 1}
    (home / "tasks/questions.jsonl").write_text(json.dumps(question) + "\n" + json.dumps(question))


def run(place, words, ranks=1, environment=None):
    """An accessory command in ``place``, which must succeed; returns what it printed. A server is ended when it is up."""
    plant = f"import os\nos.chdir({str(place)!r})\nos.environ |= {environment or {}}\n"
    if words[0] == "certify":
        plant += f"import {__name__} as tests\ntests.certify_one_cell({_forkserver._forkserver_address!r})\n"
    with Job(*words, ranks=ranks, plant=plant) as job:
        if words[0] == "serve":
            job.reach("Ctrl-C ends it.")
            job.send(signal.SIGINT)
        assert job.codes(timeout=280) == [0] * ranks, job.out() + job.err()
        return job.out()


def certify_one_cell(server):
    """Of a certificate have the first cell alone (test_certify.py has all), in processes of a ``server`` that is there."""
    only = command._only
    command._only = lambda *asked: only(*asked)[:1]
    _forkserver._forkserver_address, _forkserver.ensure_running = server, lambda: None


def fitted(words, place, number):
    """The words of a command with stand-ins, globs expanded."""
    new = place / f"new{number}"
    found = [STANDS_FOR.get(word, word).format(home=place / "home", new=new) for word in words]
    return [path for word in found for path in (sorted(glob.glob(word, root_dir=place)) if "*" in word else [word])]


def small(words):
    """The words of an accessory command, so that it takes seconds."""
    return [*words, *(word for word in SMALL.get(words[0], []) if word not in words)]


def execute(line, place, number, environment):
    words = fitted(shlex.split(line), place, number)
    if words[0] == "export":
        environment |= [words[1].split("=", 1)]
    elif words[0] == "make":  # what it would do; the tests themselves are among that
        subprocess.run(["make", "-n", "-C", ROOT, words[1]], check=True, capture_output=True)
    elif demo := next((word for word in words if word.startswith("demos/")), None):  # test_demo.py opens its page
        see_help(demo)
    elif words[0] == "srun":
        ranks = int(next(word for word in words if word.startswith("-n")).removeprefix("-n"))
        run(place, small(recipe(words[words.index("bash") :], place, environment)), ranks, environment)
    elif words[0] == "torchrun":
        assert words[1] == "--nproc-per-node" and words[3:5] == ["-m", "accessory"]
        run(place, small(words[5:]), int(words[2]))
    else:
        assert words[0].endswith("accessory"), line
        run(place, small(words[1:]))


@functools.cache
def see_help(demo):
    subprocess.run([sys.executable, ROOT / demo, "--help"], check=True, capture_output=True)


def recipe(words, place, environment):
    """The accessory command that a recipe makes of its arguments: its ``python`` says so, and does nothing."""
    shim = place / "bin/python"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    shim.chmod(0o755)
    variables = os.environ | environment | {"PATH": f"{shim.parent}:{os.environ['PATH']}"}
    told = subprocess.run(words, cwd=place, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[:2] == ["-m", "accessory"]
    return told[2:]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if [*commands(document)]])
@pytest.mark.timeout(900)
def test_the_commands_of(document, workshop):
    environment = {}
    for number, line in enumerate(commands(document)):
        if line == MORE_RANKS:
            continue
        try:
            execute(line, workshop, f"{Path(document).stem}{number}", environment)
        except BaseException as error:
            error.add_note(f"{document}: {line}")
            raise


def test_more_ranks_than_kv_heads(workshop):
    assert MORE_RANKS in commands("README.md")
    words = shlex.split(MORE_RANKS)[5:]
    run(workshop, [*small(words)[:-1], words[-1], f"out={workshop}/eight"], ranks=4)


def test_commands_are_found():
    found = {document: len([*commands(document)]) for document in DOCUMENTS}
    least = {"README.md": 15, "docs/certify.md": 9, "docs/running.md": 6, "docs/checkpoints.md": 6, "data/README.md": 2}
    assert not {document for document, count in least.items() if found[document] < count}


def test_the_python_of_the_readme(workshop):
    (source,) = blocks("README.md", "python")
    for stands, what in {"DIR1": "adapter", "DIR2": "adapter", "DIR": "ckpt", "BASE": "ckpt"}.items():
        source = source.replace(f'"{stands}"', f'"{workshop}/home/{what}"')
    source = source.replace("128", "2")
    run_ranks(1, exec, source.replace('"..."', '"the words"'), {})


def test_the_tuning_of_the_readme():
    import yaml

    (source,) = blocks("README.md", "yaml")
    assert from_mapping(TuningSection, yaml.safe_load(source)["tuning"], "README.md").lora.rank == 16


def verbs(parser):
    """Every verb's parser, those of ``data`` among them."""
    for action in parser._subparsers._group_actions:
        for name, verb in action.choices.items():
            if verb._subparsers:
                yield from ((f"{name} {below}", parser) for below, parser in verbs(verb))
            else:
                yield name, verb


@pytest.mark.parametrize("name, verb", [*verbs(make_parser())], ids=lambda value: value if isinstance(value, str) else "")
def test_the_help_of(name, verb):
    """It says what the verb does, and its examples are command lines that are understood."""
    assert len(verb.description) > 60 and verb.description.endswith(".")
    assert max(map(len, verb.description.splitlines())) <= 100
    title, *examples = verb.epilog.splitlines()
    assert title in ("example:", "examples:") and examples
    for example in examples:
        words = shlex.split(example)
        arguments = make_parser().parse_args(words[words.index("accessory") + 1 :])
        assert words[words.index("accessory") + 1 :][: len(name.split())] == name.split() and arguments.run


def test_the_help_of_all():
    text = make_parser().format_help()
    assert "Finetune Mixture-of-Experts language models" in text and "accessory VERB --help" in text
