"""The verbs that use what was trained."""

import argparse
from pathlib import Path
from typing import Annotated

from accessory.config import Bounds, NonNegative, Positive, Text, WholeNumber
from accessory.verbs.options import (
    Verbs,
    a_count,
    a_path,
    add_verb,
    checked,
    function_of,
    model_arguments,
    sampling_arguments,
)

Port = Annotated[int, Bounds(least=0, most=65535)]


def _named(text: str) -> tuple[str, Path]:
    name, found, directory = text.partition("=")
    if not (name and found and directory):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, found {text!r}")
    return name, Path(directory)


def using_verbs(verbs: Verbs) -> None:
    for add in (_generate, _chat, _serve, _classify, _evaluate, _compare):
        add(verbs)


def _generate(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "generate",
        function_of("accessory.infer.chat", "run_generate"),
        "answer prompts with a trained model",
        "Answer each prompt with a model: a checkpoint of any format, with adapters laid over it. The prompt is put into "
        "the template that the model was trained with. All prompts are answered together. It prints the answers, or writes "
        "them to a file.",
        'accessory generate runs/quickstart/merged "What does json.dumps do?"',
        'accessory generate BASE --adapter ADAPTER "Why?" --temperature 0.7 --top-p 0.9',
        "accessory generate BASE @questions.jsonl --out answers.jsonl --mp 4",
        'accessory generate SPHINX "What is on the table?" --image a.jpg',
    )
    model_arguments(verb)
    about = "a text; or @FILE: lines of text, or .jsonl with a prompt or messages each"
    verb.add_argument("texts", nargs="+", type=checked(Text), metavar="PROMPT", help=about)
    verb.add_argument("--out", type=a_path, help="write the answers there, a line of JSON each, in place of printing them")
    verb.add_argument("--image", type=a_path, action="append", default=[], help="shown with every prompt; can be repeated")
    verb.add_argument("--raw", action="store_true", help="continue the text as it is, without a template")
    sampling_arguments(verb, temperature=0.0)
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=a_path, metavar="FILE", help="answers are JSON that this schema allows")
    form.add_argument("--regex", type=checked(Text), help="answers are what this matches as a whole")


def _chat(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "chat",
        function_of("accessory.infer.terminal", "run_chat"),
        "a conversation with a trained model, in the terminal",
        "Talk with a model: a checkpoint of any format, with adapters laid over it, in the template that it was trained "
        "with. Answers appear as they grow. /help says what else can be done, such as taking a turn back or saving all.",
        "accessory chat runs/quickstart/merged",
        "accessory chat BASE --adapter ADAPTER --mp 2 --system 'Answer in one sentence.'",
    )
    model_arguments(verb)
    verb.add_argument("--system", type=checked(Text), metavar="TEXT", help="system prompt; default: the template's own")
    sampling_arguments(verb, temperature=0.7)


def _serve(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "serve",
        function_of("accessory.infer.server", "run_serve", with_extra="serve"),
        "OpenAI's API over HTTP",
        "Serve a model to many clients at once: chat/completions, completions, embeddings and models as OpenAI has them, "
        "/health, and /metrics under vLLM's names. It is a checkpoint of any format, with adapters laid over it. Where "
        "ACCESSORY_API_KEY is set, clients must send it; it must be, unless they come from this machine alone. SIGTERM or "
        "Ctrl-C lets the answers that were begun end, the second one does not. docs/serving.md says more.",
        "accessory serve runs/quickstart/merged",
        "accessory serve BASE --lora mine=ADAPTER --lora yours=OTHER --mp 4 --port 8080",
    )
    model_arguments(verb)
    verb.add_argument("--template", help="default: as the model was trained with, else its chat template, else dialog")
    verb.add_argument("--name", type=checked(Text), help="what clients call the model; default: its directory's name")
    verb.add_argument(
        "--lora",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an adapter to be asked for; can be repeated",
    )
    verb.add_argument("--host", type=checked(Text), default="127.0.0.1", help="default: %(default)s, this machine alone")
    verb.add_argument("--port", type=checked(Port), default=8000, help="0: one that is free; default: %(default)s")
    verb.add_argument(
        "--allow-image-host",
        type=checked(Text),
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images from there; can be repeated; default: they must come with the request, as data: URIs",
    )
    verb.add_argument("--cache-tokens", type=a_count, help="of all that runs at a time; default: what the GPU has room for")
    verb.add_argument("--max-waiting", type=a_count, default=256, help="requests; others get 429; default: %(default)s")
    verb.add_argument("--timeout", type=checked(Positive), default=600, help="seconds of an answer; default: %(default)s")
    verb.add_argument("--grace", type=checked(NonNegative), default=30, help="seconds to end in; default: %(default)s")


def _classify(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "classify",
        function_of("accessory.infer.chat", "run_classify"),
        "the labels of texts, by a classifier",
        "Say how likely each label is for each text, by a model that a run with model.labels has trained, or transformers. "
        "It is a checkpoint of any format, with adapters laid over it. It prints the labels and writes nothing.",
        'accessory classify BASE --adapter runs/classify/epoch3 "How can I turn a list into JSON?"',
    )
    model_arguments(verb)
    verb.add_argument("texts", nargs="+", type=checked(Text), metavar="TEXT")


def _evaluate(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "evaluate",
        function_of("accessory.train.evaluate", "run_evaluate"),
        "scores on tasks and data, of one model or of two side by side",
        "Measure a model: a checkpoint of any format, with adapters laid over it. --tasks are those of "
        "lm-evaluation-harness, with its numbers; --data is a data mix, of which it tells loss, perplexity and token "
        "accuracy as a run's validation does. It prints a table, with --against of two models and their difference.",
        "accessory evaluate runs/quickstart/merged --data runs/quickstart/data/later.yaml",
        "accessory evaluate hf --tasks arc_easy,hellaswag --mp 4 --out scores.json",
        "accessory evaluate BASE --adapter ADAPTER --against BASE --tasks my_task --include TASKS --data RUN.yaml",
    )
    model_arguments(verb, max_seq_len=None)
    verb.add_argument(
        "--against", type=a_path, nargs="+", metavar="DIR", help="compare with that model: a base, then what changes it"
    )
    verb.add_argument("--tasks", type=checked(Text, lambda text: text.split(",")), metavar="TASK,TASK", help="by name")
    verb.add_argument("--include", type=a_path, metavar="DIR", help="YAML files of further tasks")
    verb.add_argument("--data", type=a_path, metavar="FILE", help="data mix, or a run's file: what that run holds out")
    verb.add_argument("--num-fewshot", type=checked(WholeNumber), metavar="N", help="examples; default: the task's own")
    verb.add_argument("--limit", type=a_count, metavar="N", help="the first N questions of each task")
    verb.add_argument("--apply-chat-template", action="store_true", help="ask as the model was trained to be asked")
    verb.add_argument("--out", type=a_path, metavar="FILE", help="write the results as JSON")


def _compare(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "compare",
        function_of("accessory.train.report", "run_compare"),
        "loss curves, validation and expert load of runs, side by side",
        "Print the losses of several runs side by side with their largest difference, their validation before and after, "
        "their speed, and each one's load by layer and expert; draw them. It needs run directories of finetune or pretrain.",
        "accessory compare runs/quickstart/mixtral runs/quickstart/mixtral_sparse --png compare.png",
    )
    verb.add_argument("runs", nargs="+", type=a_path, help="run directories")
    verb.add_argument("--png", type=a_path, default=Path("compare.png"), help="picture; default: %(default)s")
