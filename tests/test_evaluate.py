"""``accessory evaluate``: lm-evaluation-harness's own ``hf`` model on the same weights, and a run's validation, are the
judges."""

import itertools
import json
import os
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import yaml
from jobs import command
from models import TINY, WORDS, make_tokenizer, weights
from ranks import run_ranks
from sentencepiece import SentencePieceProcessor
from slips import make_home
from transformers import AutoModelForCausalLM, AutoTokenizer

from accessory.certify import formats
from accessory.checkpoint.training import Training
from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.infer.meta import MetaModel
from accessory.infer.scoring import score
from accessory.train.evaluate import table

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
ARGS = replace(TINY, vocab_size=300, sliding_window=None, rope_scaling=None, max_seq_len=400)
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": [" some", "is t"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCS = 6


def write_models(home):
    """A model as Hugging Face has it, with the template of its training; and another one."""
    tokenizer = make_tokenizer(home / "tokenizer.model")
    pieces = map(SentencePieceProcessor(model_file=str(tokenizer)).id_to_piece, range(300))
    is_other = [not piece.startswith("\u2581") for piece in pieces]
    for name, seed in (("hf", 0), ("other", 1)):
        w = weights(ARGS, seed, dtype=torch.float32)
        w["output.weight"][is_other] *= 0.05  # whole words are the likeliest
        formats.write(home / name, w, ARGS, "hf")
        shutil.copy(tokenizer, home / name / "tokenizer.model")
        assert write_tokenizer_json(tokenizer, home / name)
        Training("vicuna").write(home / name, Tokenizer(tokenizer))


def write_tasks(home):
    """Tasks on data of this directory: short and long texts, and what the model itself would say."""
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(home / "hf")
    model = AutoModelForCausalLM.from_pretrained(home / "hf", dtype=torch.float32)
    records = []
    for number in range(DOCS):
        question = " ".join(rng.choices(WORDS, k=200 if number == DOCS - 1 else rng.randint(1, 12)))
        asked = tokenizer(question, return_tensors="pt")
        likeliest = tokenizer.decode(model.generate(**asked, max_new_tokens=1)[0, -1:]).strip()
        written = tokenizer.decode(model.generate(**asked, max_new_tokens=16)[0, asked["input_ids"].shape[1] :])
        choices = [likeliest or "the", "not", *(" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(2))]
        text = " ".join(rng.choices(WORDS, k=rng.choice((3, 20, 300))))
        record = {"question": question, "choices": choices, "answer": rng.randrange(4), "text": text, "written": written}
        records.append(json.dumps(record))
    (home / "tasks").mkdir()
    (home / "docs.jsonl").write_text("\n".join(records))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(home / "docs.jsonl")}, "cache_dir": str(home / "datasets")}
        described = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (home / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(described | task))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("evaluate")
    write_models(home)
    write_tasks(home)
    return home


@pytest.fixture(scope="module")
def theirs(home):
    """What lm-eval finds of each task with its own model: plainly, and in the chat template."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(str(home / "hf"), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
    return [
        simple_evaluate(model, tasks=list(TASKS), task_manager=manager, apply_chat_template=chat, num_fewshot=shots)
        for chat, shots in ((False, None), (True, 1))
    ]


def evaluate(home, world):
    from accessory.infer.lm_eval import find_tasks, run_tasks

    options = {"mp_group": dist.group.WORLD, "dtype": torch.float32, "device": "cpu", "max_seq_len": ARGS.max_seq_len}
    model = MetaModel.from_pretrained(home / "hf", "mixtral_sparse", **options)
    manager = find_tasks(list(TASKS), str(home / "tasks"))
    return [
        run_tasks(model, list(TASKS), manager, shots, None, chat, log_samples=True)
        for chat, shots in ((False, None), (True, 1))
    ]


def numbers(results, task):
    return {name: value for name, value in results[task].items() if isinstance(value, float)}


@pytest.mark.parametrize("world", [1, 2])
def test_scores_are_those_of_lm_evals_own_model(home, theirs, world):
    greedy = []
    for ours, expected in zip(run_ranks(world, evaluate, home, world)[0], theirs, strict=True):
        for task in TASKS:
            assert numbers(ours["results"], task) == pytest.approx(numbers(expected["results"], task), rel=1e-4)
        for task, samples in expected["samples"].items():
            for found, sample in zip(ours["samples"][task], samples, strict=True):
                assert found["doc_hash"] == sample["doc_hash"]
                for (answer,), (their_answer,) in zip(found["resps"], sample["resps"], strict=True):
                    if task == "choices":
                        assert answer[0] == pytest.approx(their_answer[0], abs=1e-4)
                        assert answer[1] == their_answer[1]
                        greedy.append(answer[1])
                    else:
                        assert answer == (their_answer if task == "answers" else pytest.approx(their_answer, abs=1e-3))
    assert 0 < sum(greedy) < len(greedy)


def measure(seen, token):
    """A model that sees the sum of what came before."""
    return -(3 * sum(seen) + token) % 11 / 7, float((sum(seen) + token) % 2)


def run_plan(plan):
    ends = list(itertools.accumulate(plan.lengths))
    assert len(plan.tokens) == ends[-1] <= 40 or len(ends) == 1
    found = []
    for row, target in zip(plan.rows, plan.targets, strict=True):
        begin = max(end for end in (0, *ends) if end <= row)
        found.append(measure(plan.tokens[begin : row + 1], target))
    return torch.tensor(found, dtype=torch.float64).T


def test_scores_depend_on_nothing_that_is_scored_beside():
    rng = random.Random(0)
    pairs = [([rng.randrange(3)] * rng.randint(1, 30), [rng.randrange(9)] * rng.randint(1, 20)) for _ in range(99)]
    found = dict(score(pairs, run_plan, most_tokens=40))
    for number, (context, continuation) in enumerate(pairs):
        each = [measure([*context, *continuation[:n]], token) for n, token in enumerate(continuation)]
        assert found[number] == pytest.approx((sum(x for x, _ in each), all(y for _, y in each)))


def test_the_command_compares_two_models(home, theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a directory that is in no repository
    what = ("--tasks", "texts,choices", "--include", home / "tasks", "--against", home / "other", "--precision", "fp32")
    codes, out, err = command("evaluate", home / "hf", *what, "--mp", 2, "--out", tmp_path / "scores.json")
    assert codes == [0] and "Traceback" not in err and "fatal" not in err, err
    before, after = json.loads((tmp_path / "scores.json").read_text())["models"]
    assert (before["checkpoint"], after["checkpoint"]) == ([str(home / "other")], [str(home / "hf")])
    for task in ("texts", "choices"):
        assert numbers(after["results"], task) == pytest.approx(numbers(theirs[0]["results"], task), rel=1e-4)
        assert numbers(after["results"], task) != numbers(before["results"], task)
    measured = [(str(home / name), found["results"]) for name, found in (("other", before), ("hf", after))]
    assert out.endswith(f"{table(measured)}\n")


def test_a_table():
    results = {"texts": {"alias": "texts", "sample_len": 3, "ppl,none": 7.0, "ppl_stderr,none": "N/A"}}
    after = {"texts": {"ppl,none": 5.25}, "a": {"acc,none": 0.5, "acc_stderr,none": 0.125, "acc,strict": 1.2e10}}
    assert table([("x", results)]) == "task   metric   value  stderr\ntexts  ppl     7.0000"
    assert table([("old", results), ("new", after)]).splitlines() == [
        "task   metric           old  stderr      new  stderr  difference",
        "texts  ppl           7.0000           5.2500             -1.7500",
        "a      acc                            0.5000  0.1250",
        "       acc (strict)                  1.2e+10",
    ]
    assert table([("same", results), ("same", results)]).splitlines()[1].split() == [
        "texts",
        "ppl",
        "7.0000",
        "7.0000",
        "+0.0000",
    ]


def test_data_is_measured_as_a_run_does(tmp_path):
    home = make_home(tmp_path)
    codes, _, err = command("finetune", home / "run.yaml", "optim.lr=0.01", "data.packing=true")
    assert codes == [0], err
    rows = [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    expected = [row["val_loss"] for row in rows if "val_loss" in row]
    (saved,) = (home / "run").glob("epoch*")
    what = ("--data", home / "run/config.yaml", "--precision", "fp32", "--out", tmp_path / "data.json")
    codes, out, err = command("evaluate", saved, "--mp", 2, *what)
    assert codes == [0], err
    (model,) = json.loads((tmp_path / "data.json").read_text())["models"]
    (found,) = model["results"].values()
    assert found["loss,none"] == pytest.approx(expected[-1], rel=1e-6) and len(expected) == 2
    assert "held-out samples" in out and set(found) == {"loss,none", "perplexity,none", "token_accuracy,none"}


def test_options_mean_what_they_say_of_data(tmp_path):
    """Samples are cut where the command line says, whatever the run's file has; what is of tasks alone is refused."""
    home = make_home(tmp_path)
    words = ("evaluate", home / "ckpt", "--precision", "fp32", "--data")
    mean = []
    for more in ((), ("--max-seq-len", 180)):
        codes, out, err = command(*words, home / "run.yaml", *more)
        assert codes == [0], err
        samples, tokens = re.search(r" (\d+) held-out samples, ([\d,]+) tokens", out).groups()
        mean.append(int(tokens.replace(",", "")) / int(samples))
    assert mean[1] <= 180 < mean[0] <= 192
    for option in (("--limit", 2), ("--num-fewshot", 0), ("--apply-chat-template",), ("--include", home)):
        codes, _, err = command(*words, home / "mix.yaml", *option)
        assert codes == [1] and f"{option[0]} says how --tasks are asked, and there are none" in err
