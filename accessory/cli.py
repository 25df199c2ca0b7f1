"""The ``accessory`` command: a verb a feature. ``python -m accessory`` is the same, for torchrun and srun."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accessory import __version__
from accessory.errors import UserError

# Read when torch is imported: a lost peer is a sentence of the watchdog's, and not pages of C++ frames before it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def main() -> None:
    """Parse the command line and run a verb; a UserError is one sentence and exit code 1."""
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except UserError as error:
        sys.exit(f"accessory: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="accessory", description=__doc__.split(".")[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add_verbs in (_training_verbs, _using_verbs, _checkpoint_verbs, _certify_verb, _data_verbs):
        add_verbs(verbs)
    return parser


Verbs = Any  # what argparse's add_subparsers returns


def _training_verbs(verbs: Verbs) -> None:
    verb = verbs.add_parser("finetune", help="train a model as a run's YAML file says (with torchrun, srun, or plain)")
    verb.add_argument("config", type=Path, help="run YAML, e.g. configs/finetune/quickstart.yaml")
    verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a setting of the file")
    verb.set_defaults(run=_finetune)

    verb = verbs.add_parser("pretrain", help="the same with packing on: for texts, from random weights or a checkpoint")
    verb.add_argument("config", type=Path, help="run YAML, e.g. configs/pretrain/tiny.yaml")
    verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a setting of the file")
    verb.set_defaults(run=_pretrain)


def _using_verbs(verbs: Verbs) -> None:
    verb = verbs.add_parser("generate", help="continue prompts with a trained model (with torchrun, srun, or plain)")
    verb.add_argument("checkpoint", type=Path, help="directory")
    verb.add_argument("--adapter", type=Path, action="append", default=[], help="directory laid over it; can be repeated")
    verb.add_argument("prompts", nargs="+", metavar="PROMPT")
    verb.add_argument("--layout", choices=["mixtral", "mixtral_sparse"], help="default: the checkpoint's own")
    verb.add_argument("--raw", action="store_true", help="continue the text as it is, without a template")
    verb.add_argument("--template", default="dialog", help="as the model was trained with; default: %(default)s")
    verb.add_argument("--precision", default="bf16", choices=["bf16", "fp32", "fp64"], help="default: %(default)s")
    verb.add_argument("--max-gen-len", type=int, default=512, help="tokens; default: %(default)s")
    verb.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token; default: %(default)s")
    verb.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    verb.set_defaults(run=_generate)

    verb = verbs.add_parser("compare", help="loss curves, perplexity and expert load of runs, side by side")
    verb.add_argument("runs", nargs="+", type=Path, help="run directories")
    verb.add_argument("--png", type=Path, default=Path("compare.png"), help="picture; default: %(default)s")
    verb.set_defaults(run=_compare)


def _checkpoint_verbs(verbs: Verbs) -> None:
    verb = verbs.add_parser("convert", help="write a checkpoint of any format in another one")
    verb.add_argument("sources", nargs="+", type=Path, help="directory, or several in order: a base, then what changes it")
    verb.add_argument("destination", type=Path, help="directory to write")
    formats = ["hf", "mistral", "mixtral", "mixtral_sparse"]
    verb.add_argument("--to", required=True, choices=[*formats, "peft"], help="format; peft: the adapter alone")
    verb.add_argument("--mp", type=int, default=1, metavar="N", help="model-parallel parts; default: %(default)s")
    _conversion_options(verb)
    verb.set_defaults(run=_in("accessory.checkpoint.tools", "run_convert"))

    verb = verbs.add_parser("merge", help="fold an adapter into its base")
    verb.add_argument("sources", nargs=2, type=Path, metavar="DIR", help="the base, and the adapter")
    verb.add_argument("destination", type=Path, help="directory to write")
    verb.add_argument("--to", choices=formats, help="format; default: the base's")
    verb.add_argument("--mp", type=int, metavar="N", help="model-parallel parts; default: as the base")
    _conversion_options(verb)
    verb.set_defaults(run=_in("accessory.checkpoint.tools", "run_merge"))

    verb = verbs.add_parser("inspect", help="what a checkpoint is: format, shape, sizes, and whether it is whole")
    verb.add_argument("paths", nargs="+", type=Path, help="directory, or several in order")
    verb.add_argument("--config", type=Path, help="another config.json than the directory's")
    verb.set_defaults(run=_in("accessory.checkpoint.tools", "run_inspect"))

    verb = verbs.add_parser("verify", help="whether two checkpoints of any formats are the same model; exit code 1 if not")
    verb.add_argument("a", type=Path, help="directory")
    verb.add_argument("b", type=Path, help="directory")
    verb.add_argument("--tolerance", type=float, default=0.0, help="of each tensor's largest value; default: %(default)s")
    verb.set_defaults(run=_in("accessory.checkpoint.tools", "run_verify"))


def _certify_verb(verbs: Verbs) -> None:
    verb = verbs.add_parser("certify", help="prove on this machine that no layout or parallel size changes the numbers")
    verb.add_argument("--model", type=Path, metavar="CONFIG_JSON", help="its shape, as it is; default: a small model")
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
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    verb.add_argument("--html", type=Path, metavar="FILE", help="write the table as a page")
    verb.set_defaults(run=_in("accessory.certify.command", "run_certify"))


def _data_verbs(verbs: Verbs) -> None:
    data = verbs.add_parser("data", help="make, check and show training data").add_subparsers(required=True, metavar="WHAT")
    for name, text in (
        ("check", "validate every record of a mix: a table of sources, a picture of lengths, the bad records"),
        ("show", "print samples, with what is trained in colour"),
    ):
        verb = data.add_parser(name, help=text)
        verb.add_argument("mix", type=Path, help="YAML data mix, or a run's YAML file")
        verb.add_argument("--tokenizer", type=Path, help="default: the run's")
        verb.add_argument("--max-seq-len", type=int, help="tokens; default: the run's, or 4096")
        if name == "show":
            verb.add_argument("-n", type=int, default=3, help="samples of each source; default: %(default)s")
            verb.set_defaults(run=_in("accessory.train.data_check", "show"))
        else:
            verb.add_argument("-n", type=int, default=10, help="bad and dropped records to list; default: %(default)s")
            verb.add_argument("--png", type=Path, default=Path("lengths.png"), help="picture; default: %(default)s")
            verb.add_argument(
                "--world", type=int, default=1, help="processes of the run, for its steps; default: %(default)s"
            )
            verb.add_argument("--tokens-per-s", type=float, help="for the run's duration; default: as its last run's")
            verb.set_defaults(run=_in("accessory.train.data_check", "check"))
    verb = data.add_parser("stdlib", help="a corpus from the documentation of Python's standard library")
    verb.add_argument("out", type=Path, help="directory for dialog.jsonl, instruction.jsonl and mix.yaml")
    verb.set_defaults(run=_stdlib)
    verb = data.add_parser("tokenizer", help="train a byte-fallback BPE SentencePiece tokenizer on a mix")
    verb.add_argument("mix", type=Path, help="YAML data mix")
    verb.add_argument("out", type=Path, help="tokenizer.model to write")
    verb.add_argument("--vocab-size", type=int, default=4096, help="pieces; default: %(default)s")
    verb.set_defaults(run=_tokenizer)


def _conversion_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "fp64"], help="default: each tensor's own")
    verb.add_argument("--format", choices=["safetensors", "pth"], default="safetensors", help="default: %(default)s")
    verb.add_argument("--shard-gb", type=float, default=5, help="largest file of --to hf, GB; default: %(default)s")
    verb.add_argument("--config", type=Path, help="another config.json than the source's")
    verb.add_argument("--force", action="store_true", help="go on if files and config.json, or adapter and base, do not fit")


def _finetune(arguments: argparse.Namespace) -> None:
    from accessory.parallel.launch import run_job
    from accessory.settings import ParallelSection, RunConfig
    from accessory.train.loop import finetune

    def config() -> RunConfig:
        return RunConfig.load(arguments.config, arguments.overrides)

    try:
        start_timeout_s = config().parallel.stall_timeout_s
    except UserError:  # one rank says it, when all are there
        start_timeout_s = ParallelSection.stall_timeout_s
    run_job(lambda launch: finetune(config(), launch), start_timeout_s)


def _pretrain(arguments: argparse.Namespace) -> None:
    arguments.overrides = ["data.packing=true", *arguments.overrides]
    _finetune(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    from accessory.infer.chat import answer
    from accessory.parallel.launch import run_job
    from accessory.settings import ParallelSection

    run_job(lambda launch: answer(arguments, launch), ParallelSection.stall_timeout_s)


def _compare(arguments: argparse.Namespace) -> None:
    from accessory.train.report import History, compare_table, load_table, plot

    runs = [History.load(directory) for directory in arguments.runs]
    print(compare_table(runs))
    for run in runs:
        print(f"\nexpert load of {run.name}, 1.00 = a fair share\n{load_table(run.loads)}")
    plot(runs, arguments.png)
    print(f"\npicture: {arguments.png}")


def _in(module: str, function: str) -> Callable[[argparse.Namespace], None]:
    """A verb whose function lies in ``module``, which is imported only if the verb is used."""

    def run(arguments: argparse.Namespace) -> None:
        getattr(importlib.import_module(module), function)(arguments)

    return run


def _stdlib(arguments: argparse.Namespace) -> None:
    from accessory.data.stdlib import write_corpus

    for name, count in write_corpus(arguments.out).items():
        print(f"{arguments.out / name}: {count} records")


def _tokenizer(arguments: argparse.Namespace) -> None:
    from accessory.data.mix import mix_texts
    from accessory.data.tokenizer import Tokenizer, train_tokenizer

    out = train_tokenizer(mix_texts(arguments.mix), arguments.out, arguments.vocab_size)
    print(f"{out}: {Tokenizer(out).n_words} pieces")
