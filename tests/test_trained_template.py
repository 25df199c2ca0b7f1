"""The template that a model was trained with travels with it: transformers makes the tokens of training of it, and
generation takes it unasked."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import command, run_each
from models import WORDS, make_tokenizer
from slips import make_home
from test_convert import cli
from texts import MARKS, add_token
from transformers import AutoTokenizer

from accessory.checkpoint.training import Training
from accessory.data.records import Conversation, Turn
from accessory.data.templates import PROMPTS, TEMPLATES
from accessory.data.tokenizer import Tokenizer
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.model.meta import MetaModel

CHAT = [name for name in TEMPLATES if name != "plain"]
RUNS = [("prepended" if name == "chatml" else "model", name) for name in CHAT if name not in PROMPTS]
"""Those that a model is trained with (PROMPTS are as alpaca is), and the kind of tokenizer:
tokenizer.model, or a tokenizer.json that puts SentencePiece's blank before every text."""
WRITTEN = [("metaspace", name) for name in CHAT]
"""Of a tokenizer.json that puts it before the first text alone, as newer ones do."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each kind of tokenizer, and what is put beside the newer one for each template."""
    home = make_home(tmp_path_factory.mktemp("templates"))
    for kind in ("model", "prepended", "metaspace"):
        (home / kind).mkdir()
        make_tokenizer(home / kind / "tokenizer.model", 300)
        if kind != "model":
            (home / kind / "tokenizer_config.json").write_text(json.dumps({"legacy": kind == "prepended"}))
            assert write_tokenizer_json(home / kind / "tokenizer.model", home / kind)
            (home / kind / "tokenizer.model").unlink()
            for mark in MARKS:
                add_token(home / kind / "tokenizer.json", mark)
            config = json.loads((home / kind / "tokenizer_config.json").read_text())
            old = {"chat_template": "{{ messages }}"}  # of the model that training changed
            (home / kind / "tokenizer_config.json").write_text(json.dumps(config | old))
    for kind, name in WRITTEN:
        shutil.copytree(home / kind, home / f"{kind}-{name}-hf")
        Training(name).write(home / f"{kind}-{name}-hf", Tokenizer(home / kind / "tokenizer.json"))
    return home


@pytest.fixture(scope="module")
def home(written, tmp_path_factory):
    """Beside these, a model trained with each template, and the same as Hugging Face's."""
    lines = []
    for kind, name in RUNS:
        (written / f"{name}.yaml").write_text(f"META: [{{path: talks.jsonl, template: {name}}}]")
        file = written / kind / ("tokenizer.model" if kind == "model" else "tokenizer.json")
        words = f"data.mix={written}/{name}.yaml model.tokenizer={file} data.max_seq_len=256 out={written}/{kind}-{name}"
        lines.append((["finetune", written / "run.yaml", *words.split()], ""))
    ran = run_each(lines, tmp_path_factory.mktemp("ran"))
    assert not [err for code, _, err in ran if code], ran
    for kind, name in RUNS:
        (saved,) = (written / f"{kind}-{name}").glob("epoch*")
        saved.rename(written / f"{kind}-{name}-model")
        assert cli("convert", written / f"{kind}-{name}-model", written / f"{kind}-{name}-hf", "--to", "hf") == 0
    return written


TEXT = st.lists(st.sampled_from([*WORDS, "Why?", "42", "é", "\n", "  "]), min_size=1, max_size=5).map(" ".join)


@pytest.mark.parametrize(("kind", "name"), RUNS + WRITTEN)
def test_transformers_makes_the_tokens_of_training(kind, name, request):
    home = request.getfixturevalue("written" if (kind, name) in WRITTEN else "home")
    (trained,) = (path for f in ("tokenizer.model", "tokenizer.json") if (path := home / kind / f).is_file())
    trained, template = Tokenizer(trained), TEMPLATES[name]
    theirs = AutoTokenizer.from_pretrained(home / f"{kind}-{name}-hf")

    @given(st.none() | TEXT, st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
    @settings(max_examples=25, deadline=None)
    def holds(system, texts):
        texts = [text.strip() or "no" for text in texts]
        turns = [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
        system = None if name in ("alpaca", "shortqa", "qg", "bare") else system
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": turn.role, "content": turn.text} for turn in turns]
        expected = trained.encode_segments(template.render(Conversation(system, tuple(turns))))[0]
        assert theirs.apply_chat_template(messages, return_dict=False) == expected
        asked = trained.encode_segments(template.prompt(Conversation(system, tuple(turns[:-1]))))[0]
        assert theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False) == asked

    holds()


def test_an_instructions_input(home):
    turns = (Turn("user", "Count.", context="a list of"), Turn("assistant", "Two."))
    messages = [{"role": "user", "content": "Count.", "input": "a list of"}, {"role": "assistant", "content": "Two."}]
    segments = TEMPLATES["alpaca"].render(Conversation(None, turns))
    expected = Tokenizer(home / "model/tokenizer.model").encode_segments(segments)
    theirs = AutoTokenizer.from_pretrained(home / "model-alpaca-hf")
    assert theirs.apply_chat_template(messages, return_dict=False) == expected[0]


@pytest.mark.parametrize("form", ["model", "hf"])
def test_generation_takes_it_unasked(form, home):
    """A template that is named still wins."""
    options = {"dtype": torch.float32, "device": "cpu"}
    for name in ("vicuna", "mixtral-instruct"):
        model = MetaModel.from_pretrained(str(home / f"model-{name}-{form}"), **options)
        assert model.template is TEMPLATES[name]
        given_ids = []
        model.generate = lambda prompts, *_, seen=given_ids: seen.append(prompts) or ["" for _ in prompts]
        model.chat(["the list", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]])
        model.chat(["the list"], "dialog")
        conversations = [Conversation(None, (Turn("user", "the list"),)), Conversation("Be kind.", (Turn("user", "a"),))]
        own, other = (
            [model.tokenizer.encode_segments(TEMPLATES[t].prompt(c))[0] for c in conversations] for t in (name, "dialog")
        )
        assert given_ids == [own, other[:1]]


def test_the_command_takes_it_unasked(home):
    outs = []
    for words in ([], ["--template", "vicuna"], ["--template", "dialog"]):
        words = ["generate", home / "model-vicuna-hf", "the list", "--precision", "fp32", "--max-gen-len", 12, *words]
        codes, out, err = command(*words)
        assert codes == [0], err
        outs.append(out)
    assert outs[0] == outs[1] != outs[2]


def test_what_serves_a_model_of_chatml_knows_where_an_answer_ends(home):
    settings = json.loads((home / "prepended-chatml-hf/generation_config.json").read_text())
    special = Tokenizer(home / "prepended/tokenizer.json").special
    assert settings["eos_token_id"] == [special["</s>"], special["<|im_end|>"]]


def test_a_mix_of_several_templates(home, tmp_path):
    """The model's own is that of most conversations; texts beside them have none."""
    (home / "texts.jsonl").write_text("\n".join(json.dumps({"text": "the list of words"}) for _ in range(99)))
    (home / "few.jsonl").write_text("\n".join((home / "talks.jsonl").read_text().splitlines()[:9]))
    entries = "{path: few.jsonl, template: vicuna}, {path: talks.jsonl, template: alpaca}, {path: texts.jsonl}"
    (home / "several.yaml").write_text(f"META: [{entries}]")
    codes, out, err = command("finetune", home / "run.yaml", f"data.mix={home}/several.yaml", f"out={tmp_path}/run")
    assert codes == [0], err
    assert "templates: plain for 99 samples, alpaca for 24 samples, vicuna for 9 samples; the model's own," in out
    assert json.loads((tmp_path / "run/epoch0-iter1/training.json").read_text())["template"] == "alpaca"


def test_verify_says_what_would_train_differently(home, tmp_path, capsys):
    base = home / "model-vicuna-model"
    assert cli("verify", base, home / "model-vicuna-hf") == 0
    assert "differently" not in capsys.readouterr().out
    shutil.copytree(base, tmp_path / "other")
    for file, change in (("config.json", {"load_balancing_weight": 0.02}), ("training.json", {"balance": "hf"})):
        values = json.loads((tmp_path / "other" / file).read_text())
        (tmp_path / "other" / file).write_text(json.dumps(values | change))
    assert cli("verify", base, tmp_path / "other") == 0
    said = capsys.readouterr().out
    assert "load_balancing_weight: 0.1 | 0.02" in said and "train.balance: document | hf" in said
    assert "they would train differently" in said and "the same model" in said
