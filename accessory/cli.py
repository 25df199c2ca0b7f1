"""The ``accessory`` command: a verb a feature. ``python -m accessory`` is the same, for torchrun and srun to launch."""

import argparse
import os
import sys
from pathlib import Path
from typing import Literal

from accessory import __version__
from accessory.config import NonNegative, Positive, Text, WholeNumber
from accessory.errors import Stopped, UserError, sentence, stop_on_signals
from accessory.options import (
    Run,
    Verbs,
    a_count,
    a_path,
    add_verb,
    checked,
    evaluation_arguments,
    function_of,
    model_arguments,
    pieces_count,
    sampling_arguments,
)

# Read when torch is imported: a lost peer is a sentence of the watchdog's, and not pages of C++ frames before it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

ABOUT = """
Finetune Mixture-of-Experts language models of the Mixtral family on many GPUs, in either of two parallel layouts that give
the same numbers, and convert, compare and use what comes out.
"""
READ_ON = "accessory VERB --help says what a verb does, needs and writes. README.md begins with a run of five minutes."
FORMATS = ["hf", "mistral", "mixtral", "mixtral_sparse"]


def main() -> None:
    """Parse the command line and run a verb."""
    arguments = _parser().parse_args()
    _report(arguments.run, arguments)


def _report(run: Run, arguments: argparse.Namespace) -> None:
    """Run it; what the user can mend is one sentence and exit code 1."""
    stop_on_signals()
    try:
        run(arguments)
        sys.stdout.flush()
    except Stopped as stop:
        print(f"accessory: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except BrokenPipeError:  # whoever read the output has seen enough
        _settle_output()
        sys.exit(0)
    except (UserError, OSError) as error:
        text = sentence(error)
        if text is None:
            raise
        _settle_output()
        sys.exit(f"accessory: error: {text}")


def _settle_output() -> None:
    """If output cannot be written, the rest of it goes nowhere: Python would try it once more as it ends, and say so."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="accessory", description=ABOUT, epilog=READ_ON)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add_verbs in (_training_verbs, _using_verbs, _checkpoint_verbs, _certify_verb, _data_verbs):
        add_verbs(verbs)
    return parser


def _training_verbs(verbs: Verbs) -> None:
    start = "Start it with torchrun or srun, a process for each GPU, or plainly for a single one."
    writes = (
        "It writes the run directory OUT: the model (accessory convert gives it any format), states to resume from, "
        "metrics.jsonl, report.png. Ctrl-C and SIGTERM end it after the step at hand, with a state to resume from."
    )
    finetune = add_verb(
        verbs,
        "finetune",
        function_of("accessory.train.loop", "run_finetune"),
        "train a model as a run's YAML file says (with torchrun, srun, or plain)",
        "Train a model, all of it or LoRA, biases, norms or chosen parts, on a mix of conversations, instructions and "
        "texts. It needs a run file, which names the checkpoint to start from and the data mix; accessory config lists what "
        f"else can stand in it. {start} {writes}",
        "accessory finetune configs/finetune/quickstart.yaml parallel.model_parallel=1",
        "torchrun --nproc-per-node 2 -m accessory finetune configs/finetune/quickstart.yaml",
        "accessory finetune RUN.yaml resume=auto model.layout=mixtral_sparse",
    )
    pretrain = add_verb(
        verbs,
        "pretrain",
        function_of("accessory.train.loop", "run_pretrain"),
        "the same with packing on: for texts, from random weights or a checkpoint",
        "Train on texts, cut to data.max_seq_len and packed into whole rows, from random weights or a checkpoint. It is "
        f"finetune with data.packing=true. {start} {writes}",
        "accessory pretrain configs/pretrain/tiny.yaml data.mix=MIX.yaml model.tokenizer=tokenizer.model",
    )
    for verb in (finetune, pretrain):
        verb.add_argument("config", type=a_path, help="run YAML, e.g. configs/finetune/quickstart.yaml")
        verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a setting of the file")

    verb = add_verb(
        verbs,
        "config",
        function_of("accessory.listing", "run_config"),
        "list every setting of a run, with its default and what it means",
        "Print every setting that a run file can hold, as YAML: its value, its default where that is another, and what it "
        "means. With a run file (and settings to change) it checks that file, shows its values, and ends with those that "
        "differ from the defaults.",
        "accessory config",
        "accessory config configs/finetune/quickstart.yaml optim.lr=1e-4",
    )
    verb.add_argument("config", nargs="?", type=a_path, help="run YAML; default: none, the defaults alone")
    verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a setting of the file")


def _using_verbs(verbs: Verbs) -> None:
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
    )
    model_arguments(verb)
    about = "a text; or @FILE: lines of text, or .jsonl with a prompt or messages each"
    verb.add_argument("texts", nargs="+", type=checked(Text), metavar="PROMPT", help=about)
    verb.add_argument("--out", type=a_path, help="write the answers there, a line of JSON each, in place of printing them")
    verb.add_argument("--raw", action="store_true", help="continue the text as it is, without a template")
    sampling_arguments(verb, temperature=0.0)

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
    model_arguments(verb)
    evaluation_arguments(verb)

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


def _checkpoint_verbs(verbs: Verbs) -> None:
    tools = "accessory.checkpoint.tools"
    verb = add_verb(
        verbs,
        "convert",
        function_of(tools, "run_convert"),
        "write a checkpoint of any format in another one",
        "Write a model in another format, layout, number of parts or dtype: a directory of any format (recognised from "
        "its files), or a base and what changes it. One tensor at a time is in memory. DESTINATION appears when it is "
        "whole, with tokenizer and generation settings; nothing is left behind if it fails.",
        "accessory convert runs/quickstart/model/epoch5 hf --to hf",
        "accessory convert SRC DST --to mixtral_sparse --mp 8 --dtype bf16",
        "accessory convert BASE ADAPTER DST --to peft",
    )
    verb.add_argument("sources", nargs="+", type=a_path, help="directory, or several in order: a base, then what changes it")
    verb.add_argument("destination", type=a_path, help="directory to write")
    verb.add_argument("--to", required=True, choices=[*FORMATS, "peft"], help="format; peft: the adapter alone")
    verb.add_argument("--mp", type=a_count, default=1, metavar="N", help="model-parallel parts; default: %(default)s")
    _conversion_options(verb)

    verb = add_verb(
        verbs,
        "merge",
        function_of(tools, "run_merge"),
        "fold an adapter into its base",
        "Write a base model with an adapter folded in, W + scaling x B A, as a whole model in the base's format or another. "
        "The adapter is this program's, PEFT's or LLaMA2-Accessory's, and must belong to the base.",
        "accessory merge BASE ADAPTER DST --to hf",
    )
    verb.add_argument("sources", nargs=2, type=a_path, metavar="DIR", help="the base, and the adapter")
    verb.add_argument("destination", type=a_path, help="directory to write")
    verb.add_argument("--to", choices=FORMATS, help="format; default: the base's")
    verb.add_argument("--mp", type=a_count, metavar="N", help="model-parallel parts; default: as the base")
    _conversion_options(verb)

    verb = add_verb(
        verbs,
        "inspect",
        function_of(tools, "run_inspect"),
        "what a checkpoint is: format, shape, sizes, and whether it is whole",
        "Print a checkpoint's format, shape, tokenizer, fingerprint, adapters, the sizes it can run at, and the parameters "
        "of each part; then read all values. Exit code 1 if a tensor is missing, misshapen or unexpected, or a value NaN or "
        "infinite.",
        "accessory inspect hf",
        "accessory inspect BASE ADAPTER",
    )
    verb.add_argument("paths", nargs="+", type=a_path, help="directory, or several in order")
    verb.add_argument("--config", type=a_path, help="another config.json than the directory's")

    verb = add_verb(
        verbs,
        "verify",
        function_of(tools, "run_verify"),
        "whether two checkpoints of any formats are the same model; exit code 1 if not",
        "Compare two checkpoints tensor by tensor, in whatever formats, layouts and parts they are: bit for bit, or once "
        "rounded to the narrower dtype, or within --tolerance. It prints what differs. Exit code 1 if something does.",
        "accessory verify runs/quickstart/model/epoch5 hf",
    )
    verb.add_argument("a", type=a_path, help="directory")
    verb.add_argument("b", type=a_path, help="directory")
    verb.add_argument(
        "--tolerance", type=checked(NonNegative), default=0.0, help="of each tensor's largest value; default: %(default)s"
    )


def _conversion_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "fp64"], help="default: each tensor's own")
    verb.add_argument("--format", choices=["safetensors", "pth"], default="safetensors", help="default: %(default)s")
    verb.add_argument(
        "--shard-gb", type=checked(Positive), default=5, help="largest file of --to hf, GB; default: %(default)s"
    )
    verb.add_argument("--config", type=a_path, help="another config.json than the source's")
    verb.add_argument("--force", action="store_true", help="go on if files and config.json, or adapter and base, do not fit")


def _certify_verb(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "certify",
        function_of("accessory.certify.command", "run_certify"),
        "prove on this machine that no layout or parallel size changes the numbers",
        "Train one small model in many ways (layouts, model and data parallel sizes, accumulation, packing, full and LoRA), "
        "as real processes, and compare loss, router counts, gradients and weights of each with one plain process; pass "
        "checkpoints through every format. It prints a table; exit code 1 if a cell fails. docs/certify.md reads it.",
        "accessory certify --quick",
        "accessory certify --only mp=2 tuning=lora layout=mixtral",
        "accessory certify --device cuda --world 1,2,4,8 --html certificate.html",
    )
    verb.add_argument("--model", type=a_path, metavar="CONFIG_JSON", help="its shape, as it is; default: a small model")
    verb.add_argument("--world", metavar="N,N", help="numbers of processes; default: 1,2,4, or 1,2 with --quick")
    verb.add_argument("--quick", action="store_true", help="fewer cells: under a minute on two cores")
    verb.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    verb.add_argument(
        "--precision", choices=["fp64", "fp32", "bf16"], help="default: fp64; against hf: fp32; bf16: piece by piece"
    )
    verb.add_argument(
        "--only", nargs="+", default=[], metavar="SETTING=VALUE", help="the cells with these in their line, e.g. mp=2"
    )
    verb.add_argument("--against", choices=["hf"], help="compare with transformers instead of the plain reference")
    verb.add_argument("--json", type=a_path, metavar="FILE", help="write the table as JSON")
    verb.add_argument("--html", type=a_path, metavar="FILE", help="write the table as a page")


def _data_verbs(verbs: Verbs) -> None:
    line = "make, check and show training data"
    about = f"{line.capitalize()}: data/README.md says what records and mixes look like."
    data = verbs.add_parser("data", help=line, description=about).add_subparsers(required=True, metavar="WHAT")
    check = add_verb(
        data,
        "check",
        function_of("accessory.train.data_check", "check"),
        "validate every record of a mix: a table of sources, a picture of lengths, the bad records",
        "Read every record of a mix as a run would, and print what there is of each source, what is truncated, dropped or "
        "bad (file and line), and, of a run's file, its steps and duration. Exit code 1 if a record is bad. It writes the "
        "picture of lengths, and the cache of tokenised samples, which the run finds again.",
        "accessory data check configs/finetune/quickstart.yaml --world 8",
        "accessory data check MIX.yaml --tokenizer tokenizer.model",
    )
    show = add_verb(
        data,
        "show",
        function_of("accessory.train.data_check", "show"),
        "print samples, with what is trained in colour",
        "Print the first samples of each source as the model will see them: template, special tokens, and in colour (or "
        "between [[ ]] where there is none) what is trained.",
        "accessory data show configs/finetune/quickstart.yaml -n 1",
    )
    for verb, most, what in ((check, 10, "bad and dropped records to list"), (show, 3, "samples of each source")):
        verb.add_argument("mix", type=a_path, help="YAML data mix, or a run's YAML file")
        verb.add_argument("--tokenizer", type=a_path, help="default: the run's")
        verb.add_argument("--max-seq-len", type=a_count, help="tokens; default: the run's, or 4096")
        verb.add_argument("-n", type=checked(WholeNumber), default=most, help=f"{what}; default: %(default)s")
    check.add_argument("--png", type=a_path, default=Path("lengths.png"), help="picture; default: %(default)s")
    check.add_argument("--world", type=a_count, default=1, help="processes of the run, for its steps; default: %(default)s")
    check.add_argument("--tokens-per-s", type=checked(Positive), help="for the run's duration; default: as its last run's")

    verb = add_verb(
        data,
        "stdlib",
        _stdlib,
        "a corpus from the documentation of Python's standard library",
        "Write a corpus that every machine with Python holds: questions and answers on the functions and classes of the "
        "standard library, from its sources, and a mix that names them.",
        "accessory data stdlib runs/stdlib",
    )
    verb.add_argument("out", type=a_path, help="directory for dialog.jsonl, instruction.jsonl and mix.yaml")
    verb = add_verb(
        data,
        "tokenizer",
        _tokenizer,
        "train a byte-fallback BPE SentencePiece tokenizer on a mix",
        "Train a tokenizer on the texts of a mix, and write it as a tokenizer.model.",
        "accessory data tokenizer runs/quickstart/data/later.yaml tokenizer.model --vocab-size 2048",
    )
    verb.add_argument("mix", type=a_path, help="YAML data mix")
    verb.add_argument("out", type=a_path, help="tokenizer.model to write")
    verb.add_argument("--vocab-size", type=pieces_count, default=4096, help="pieces; default: %(default)s")


def _stdlib(arguments: argparse.Namespace) -> None:
    from accessory.data.stdlib import write_corpus

    for name, count in write_corpus(arguments.out).items():
        print(f"{arguments.out / name}: {count} records")


def _tokenizer(arguments: argparse.Namespace) -> None:
    from accessory.data.mix import mix_texts
    from accessory.data.tokenizer import Tokenizer, train_tokenizer

    out = train_tokenizer(mix_texts(arguments.mix), arguments.out, arguments.vocab_size)
    print(f"{out}: {Tokenizer(out).n_words} pieces")


def split(layout: Literal["mixtral", "mixtral_sparse"], name: str) -> None:
    """The scripts ``tools/split.py`` and ``tools/split_sparse.py``, which users of the reference project know."""
    from accessory.checkpoint.tools import run_convert

    parser = argparse.ArgumentParser(description=f"Cut a checkpoint of any format for the layout '{layout}'.")
    parser.add_argument("source", nargs="?", type=a_path, default=Path(), help="directory; default: this one")
    parser.add_argument("destination", nargs="?", type=a_path, default=Path(name), help="default: %(default)s")
    parser.add_argument("--mp", type=a_count, default=8, metavar="N", help="model-parallel parts; default: %(default)s")
    _conversion_options(parser)
    arguments = parser.parse_args()
    arguments.sources, arguments.to = [arguments.source], layout
    _report(run_convert, arguments)
