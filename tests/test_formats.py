"""Files in the forms of other projects, made small: each is used whole, or refused by name, through the commands."""

import json
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from models import make_tokenizer
from texts import MARKS, add_token

from accessory.cli import main
from accessory.data.tokenizer_json import write_tokenizer_json

SAMPLES = Path(__file__).parents[1] / "data/samples"
TEMPLATE = """{%- for tool in tools or [] %}{{- 'TOOL ' + tool.function.name }}{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + ' ' + (m.content or '') }}
    {%- for c in m.tool_calls or [] %}{{- 'CALL ' + c.function.name + (c.function.arguments | tojson) }}{%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' }}{%- endif %}
"""
CHAT = {"template": "chat_template"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    home = tmp_path_factory.mktemp("formats")
    make_tokenizer(home / "tokenizer.model", 360)
    assert write_tokenizer_json(home / "tokenizer.model", home)
    for name in MARKS:
        add_token(home / "tokenizer.json", name)
    (home / "chat_template.jinja").write_text(TEMPLATE)
    return home / "tokenizer.json"


def turns(*texts, keys=("from", "value"), names=("human", "gpt")):
    return [dict(zip(keys, (names[number % 2], text), strict=True)) for number, text in enumerate(texts)]


def openai(*texts):
    return turns(*texts, keys=("role", "content"), names=("user", "assistant"))


def system(text):
    return {"from": "system", "value": text, "weight": None}


F = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
CALLED = [
    *openai("1+1?"),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]
OPENAI_TOOLS = {"messages": CALLED, "tools": [{"type": "function", "function": F}], "parallel_tool_calls": False}
SHAREGPT_TOOLS = {
    "conversations": [
        *turns("1+1?"),
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "It is 2."},
    ],
    "system": "Count.",
    "tools": json.dumps([F]),
}
TRAINED_TOOLS = ['CALL add{"a": 1, "b": 1}', "It is 2."]
GSM8K = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
QA = {"columns": {"instruction": "question", "output": "answer"}}
PROMPT = {"columns": {"instruction": "prompt", "output": "completion"}}
LLAVA = {"id": "1", "image": "cat.jpg", "conversations": turns("<image>\nWhat is it?", "A cat.")}
DPO = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
ULTRAFEEDBACK = {
    "prompt": "Why?",
    "prompt_id": "f0e",
    "chosen": openai("Why?", "Because."),
    "rejected": openai("Why?", "No."),
    "messages": openai("Why?", "Because."),
    "score_chosen": 8.5,
    "score_rejected": 2.0,
}
KTO = {"prompt": "Why?", "completion": "No.", "label": False}

USED = {  # name: (record, the rest of the mix entry, what is shown, what of it is trained)
    "GSM8K": (GSM8K, QA, ["### Instruction:\nHow many?\n"], [GSM8K["answer"]]),
    "MATH": (
        {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": "$2$"},
        {"columns": {"instruction": "problem", "output": "solution"}, "template": "vicuna"},
        ["USER: 1+1? ASSISTANT:"],
        [" $2$"],
    ),
    "prompt and completion": ({"prompt": "Why?", "completion": "So."}, PROMPT, ["### Instruction:\nWhy?\n"], ["So."]),
    "Dolly": (
        {"instruction": "Sum up.", "context": "A text.", "response": "Short.", "category": "summarization"},
        {"columns": {"input": "context", "output": "response"}},
        ["### Input:\nA text.\n"],
        ["Short."],
    ),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "Be kind.", "question": "Why?", "response": "So."},
        {"columns": {"system": "system_prompt", "instruction": "question", "output": "response"}, "template": "dialog"},
        ["Be kind.\n\n### Human: Why?"],
        [" So.\n###"],
    ),
    "Alpaca": (
        {
            "instruction": "Sum.",
            "input": "1 2",
            "output": "3",
            "text": "Below is ...\nSum.\n### Input:\n1 2\n### Response:\n3",
        },
        {},
        ["### Instruction:\nSum.\n\n### Input:\n1 2\n"],
        ["3"],
    ),
    "Alpaca with history": (
        {"instruction": "And?", "input": "", "output": "3", "history": [["One?", "1"], ["Two?", "2"]]},
        {},
        ["### Instruction:\nOne?\n", "\n\n### Instruction:\nTwo?\n", "\n\n### Instruction:\nAnd?\n"],
        ["1", "2", "3"],
    ),
    "Alpaca with history and system": (
        {"instruction": "And?", "output": "3", "history": [["One?", "1"]], "system": "Count.", "tools": ""},
        {"template": "dialog"},
        ["Count.\n\n### Human: One?"],
        [" 1\n###", " 3\n###"],
    ),
    "ShareGPT": (
        {"id": "x_0", "conversations": turns("Why?", "So.", "Really?", "Yes.")},
        {},
        ["### Human: Why?"],
        [" So.\n###", " Yes.\n###"],
    ),
    "SlimOrca": (
        {"conversations": [system("Be kind."), {"weight": 0.0} | turns("Why?")[0], {"weight": 1.0} | turns("", "So.")[1]]},
        {},
        ["Be kind.\n\n### Human: Why?"],
        [" So.\n###"],
    ),
    "UltraChat": (
        {"prompt": "Why?", "prompt_id": "a1", "messages": openai("Why?", "So.")},
        {"template": "vicuna"},
        ["USER: Why?"],
        [" So."],
    ),
    "OpenAI with weights": (
        {"messages": [*openai("Why?"), {"role": "assistant", "content": "Bad.", "weight": 0}, *openai("So?", "Good.")]},
        {},
        ["### Assistant: Bad."],
        [" Good.\n###"],
    ),
    "OpenAI with tools": (OPENAI_TOOLS, CHAT, ["TOOL add", "tool 2"], TRAINED_TOOLS),
    "ShareGPT with tools": (SHAREGPT_TOOLS, CHAT, ["TOOL add", "system Count.", "tool 2"], TRAINED_TOOLS),
    "tools that are written out": (
        {"conversations": [*turns("1+1?", "<tool_call>add"), {"from": "tool", "value": "2"}, *turns("", "It is 2.")[1:]]},
        {"template": "chatml"},
        ["tool\n2"],
        ["<tool_call>add", "It is 2."],
    ),
    "the same with its tools in the system prompt": (
        SHAREGPT_TOOLS | {"conversations": [system("add(a, b)"), *turns("1+1?", "add(1, 1)")], "system": ""},
        {"ignore": ["tools"]},
        ["add(a, b)\n\n### Human"],
        [" add(1, 1)\n###"],
    ),
    "FineWeb": (
        {"text": "A page.", "id": "u", "dump": "CC", "url": "http://a", "date": "2020", "file_path": "s3", "token_count": 3}
        | {"language": "en", "language_score": 0.9},
        {},
        [],
        ["A page."],
    ),
    "documents with labels that are not to be learnt": (
        {"text": "A page.", "label": 3},
        {"ignore": ["label"]},
        [],
        ["A page."],
    ),
    "the better answer of a pair": (
        DPO,
        {"columns": {"instruction": "prompt", "output": "chosen"}, "ignore": ["rejected"]},
        ["Why?"],
        ["Because."],
    ),
    "the better conversation of a pair": (
        ULTRAFEEDBACK,
        {"columns": {"messages": "chosen"}, "ignore": ["messages", "rejected", "score_chosen", "score_rejected"]},
        ["### Human: Why?"],
        [" Because.\n###"],
    ),
    "a form of several": (OPENAI_TOOLS | {"text": "1+1? 2"}, {"kind": "text", "ignore": ["tools"]}, [], ["1+1? 2"]),
}

REFUSED = {  # name: (record, the rest of the mix entry, the sentence)
    "GSM8K": (GSM8K, {}, "it has 'question', 'answer'; read it with columns: {instruction: question, output: answer} in"),
    "prompt and completion": (
        KTO | {"label": None},
        {},
        "columns: {instruction: prompt, output: completion} in the mix entry",
    ),
    "OpenAI with tools": (OPENAI_TOOLS, {}, "the template 'dialog' has no place for a tool's call: name the model's own in"),
    "ShareGPT with tools": (SHAREGPT_TOOLS, {}, "the template 'dialog' has no place for a tool's call"),
    "tools that are never called": (
        SHAREGPT_TOOLS | {"conversations": turns("Hi", "Hello")},
        {"template": "chatml"},
        "the template 'chatml' has no place for a list of tools",
    ),
    "Alpaca with system": (
        {"instruction": "a", "output": "b", "system": "c"},
        {},
        "'alpaca' has no place for a system prompt",
    ),
    "LLaVA": (LLAVA, {}, "it has an image (cat.jpg), and this model reads text only"),
    "LLaVA, online": (
        LLAVA | {"image": "https://a/cat.jpg"},
        {},
        "it has an image (https://a/cat.jpg), and this model reads",
    ),
    "several images": (
        {"messages": openai("What?", "Cats."), "images": ["http://a/1.png", "2.png"]},
        {},
        "it has an image (http://a/1.png), and this model reads text only",
    ),
    "OpenAI with an image": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                *openai("", "A cat.")[1:],
            ]
        },
        {},
        "it has an image (x), and this model reads text only",
    ),
    "video": ({"conversations": turns("What?", "Cats."), "video": "cats.mp4"}, {}, "nothing here uses 'video'"),
    "DPO": (DPO, {}, "it is a preference record ('chosen' and 'rejected'), and there is no such objective yet"),
    "DPO of ShareGPT": (
        {"conversations": turns("Why?"), "chosen": turns("", "So.")[1], "rejected": turns("", "No.")[1]},
        {},
        "it is a preference record",
    ),
    "UltraFeedback": (ULTRAFEEDBACK, {}, "it is a preference record"),
    "UltraFeedback without the pair": (
        ULTRAFEEDBACK,
        {"ignore": ["chosen", "rejected"]},
        "nothing here uses 'score_chosen', 'score_rejected': leave them out with ignore: [score_chosen, score_rejected]",
    ),
    "KTO": (KTO, {}, "it is a KTO record (its label says whether the answer is good)"),
    "KTO with columns": (KTO, PROMPT, "it is a KTO record (its label says whether the answer is good)"),
    "KTO of LLaMA-Factory": ({"messages": openai("Why?", "No."), "kto_tag": False}, {}, "it is a KTO record"),
    "classification": (
        {"text": "A page.", "label": 3},
        {},
        "it has a label ('3'), but the run trains next-token prediction",
    ),
    "answers with a score": (
        {"conversations": turns("Why?", "So."), "source": "x", "score": 2.5},
        {},
        "nothing here uses 'score': leave it out with ignore: [score] in the mix entry, or say with columns what it should",
    ),
    "answers with a rating": ({"instruction": "a", "output": "b", "rating": "bad"}, {}, "nothing here uses 'rating'"),
    "answers that are marked": (
        {"messages": [{"toxic": False} | openai("Why?")[0], {"toxic": True} | openai("", "So.")[1]]},
        {},
        "turn 1: nothing here uses 'toxic'",
    ),
    "thoughts": (
        {"messages": [*openai("Why?"), {"role": "assistant", "content": "So.", "reasoning_content": "Well ..."}]},
        {},
        "turn 2: nothing here uses 'reasoning_content'",
    ),
    "a history where none belongs": (
        {"conversations": turns("Why?", "So."), "history": [["a", "b"]]},
        {},
        "nothing here uses 'history'",
    ),
    "a system prompt under another name": (
        {"conversations": turns("Why?", "So."), "system_prompt": "Be kind."},
        {},
        "nothing here uses 'system_prompt'",
    ),
    "two forms": ({"text": "a", "messages": openai("Why?", "So.")}, {}, "nothing here uses 'text'"),
}

WRONG = {  # name: (the rest of the mix entry, the sentence)
    "a column that is not there": (
        {"columns": {"instruction": "questoin", "output": "answer"}},
        "mix.yaml: a.jsonl: columns: no record has 'questoin'; did you mean 'question'?",
    ),
    "an optional column that is not there": (
        QA["columns"] | {"system": "persona"},
        "columns: no record has 'persona'; known: answer, question",
    ),
    "a key that nothing reads": (
        {"columns": {"instructon": "question"}},
        "META entry 1: unknown key 'columns.instructon'; did you mean 'columns.instruction'?",
    ),
    "a column for two keys": (
        {"columns": {"instruction": "question", "output": "question"}},
        "META entry 1: columns.instruction: 'question' is named twice",
    ),
    "a column that is ignored": (QA | {"ignore": ["answer"]}, "'answer' is named under columns and under ignore; keep one"),
    "columns as a list": ({"columns": ["question"]}, "META entry 1: columns: expected a group of keys"),
}


def run(monkeypatch, capsys, home, tokenizer, verb, entry, *records):
    """``accessory data check`` or ``show`` of a mix of one file; its exit code (None: all is well) and what it prints."""
    (home / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_file(monkeypatch, capsys, home, tokenizer, verb, {"path": "a.jsonl"} | entry)


def run_file(monkeypatch, capsys, home, tokenizer, verb, entry):
    (home / "mix.yaml").write_text(yaml.safe_dump({"META": [entry]}))
    return data(monkeypatch, capsys, home, tokenizer, verb)


def data(monkeypatch, capsys, home, tokenizer, verb):
    words = ["data", verb, home / "mix.yaml", "--tokenizer", tokenizer]
    monkeypatch.setattr(
        sys, "argv", ["accessory", *map(str, words), *(["--png", f"{home}/l.png"] if verb == "check" else [])]
    )
    try:
        main()
        code = None
    except SystemExit as end:
        code = str(end.code)
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", USED)
def test_a_file_is_used_whole(name, tmp_path, tokenizer, monkeypatch, capsys):
    record, entry, shown, trained = USED[name]
    code, _ = run(monkeypatch, capsys, tmp_path, tokenizer, "check", entry, record, record)
    assert code is None
    _, out = run(monkeypatch, capsys, tmp_path, tokenizer, "show", entry, record, record)
    samples = out.split("== ")[1:]
    assert len(samples) == 2
    for number, sample in enumerate(samples, 1):
        assert sample.startswith(f"{tmp_path}/a.jsonl:{number}: ")
        marked = re.findall(r"\[\[(.*?)(?:</s>)?\]\]", sample, re.S)
        assert [text.strip() for text in marked] == [text.strip() for text in trained]
        for text in shown:
            assert text in re.sub(r"\[\[|\]\]|</s>", "", sample)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_by_name(name, tmp_path, tokenizer, monkeypatch, capsys):
    record, entry, sentence = REFUSED[name]
    good = {"prompt": "a", "completion": "b"} if "columns" in entry else {"messages": openai("a", "b")}
    code, out = run(monkeypatch, capsys, tmp_path, tokenizer, "check", entry, good, record)
    (told,) = [line for line in out.splitlines() if line.startswith(f"{tmp_path}/a.jsonl")]
    assert told.startswith(f"{tmp_path}/a.jsonl:2: ") and sentence.replace("HOME", str(tmp_path)) in told
    assert code == "1 bad records"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_entry_is_one_sentence(name, tmp_path, tokenizer, monkeypatch, capsys):
    entry, sentence = WRONG[name]
    entry = entry if "columns" in entry else {"columns": entry}
    code, _ = run(monkeypatch, capsys, tmp_path, tokenizer, "check", entry, GSM8K)
    assert sentence in code and code.startswith("accessory: error: ") and "\n" not in code


def test_tables_have_columns_too(tmp_path, tokenizer, monkeypatch, capsys):
    """CSV; and parquet, where a column that other records have is null in this one."""
    (tmp_path / "a.csv").write_text('question,answer,notes\nWhy?,So.,\n"And, then?",No.,\n')
    code, out = run_file(monkeypatch, capsys, tmp_path, tokenizer, "show", {"path": "a.csv"} | QA)
    assert code is None and "And, then?" in out
    records = [OPENAI_TOOLS | {"score": None}, {"messages": openai("Hi", "Hello"), "score": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    code, out = run_file(monkeypatch, capsys, tmp_path, tokenizer, "show", {"path": "b.parquet"} | CHAT)
    assert code is None and "[[Hello]]" in out and f"[[{TRAINED_TOOLS[0]}]]" in out


def test_the_examples_of_the_documentation_are_true(tmp_path, tokenizer, monkeypatch, capsys):
    """data/README.md: its mixes of the samples, and the entries for files of other projects."""
    text = (SAMPLES.parent / "README.md").read_text()
    shutil.copytree(SAMPLES, tmp_path, dirs_exist_ok=True)
    mixes = re.findall(r"```yaml\n(META:.*?)```", text, re.S)
    assert len(mixes) == 2
    for mix in (*mixes, (SAMPLES / "mix.yaml").read_text()):
        (tmp_path / "mix.yaml").write_text(mix)
        code, out = data(monkeypatch, capsys, tmp_path, tokenizer, "check")
        assert code is None, out
    rows = re.findall(r"^\| .* \| (`columns: .*) \|$", text, re.M)
    entries = [{k: v for part in re.findall("`(.*?)`", row) for k, v in yaml.safe_load(part).items()} for row in rows]
    assert len(entries) == 6
    records = [{key: "x" for key in [*entry["columns"].values(), *entry.get("ignore", ())]} for entry in entries]
    records[3] |= {"instruction": "x"}  # which keeps its name
    for record, entry in zip(records, entries, strict=True):
        code, out = run(monkeypatch, capsys, tmp_path, tokenizer, "check", entry, record)
        assert code is None, out
