"""Building blocks of the command line: verbs, and options whose values are checked on parsing."""

import argparse
import importlib
import textwrap
import typing
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from accessory.config import Bounds, Count, Fraction, NonNegative, Positive, Text, WholeNumber
from accessory.errors import UserError, extra, needs
from accessory.settings import OffloadSection, QuantiseSection

Verbs = Any  # what argparse's add_subparsers returns
Run = Callable[[argparse.Namespace], None]


def checked(alias: Any, make: Callable[[Any], Any] = lambda value: value) -> Callable[[str], Any]:
    """A parser for an option's text: checks it against the bounds of one of config.py's aliases, then applies ``make``."""
    kind, limits = typing.get_args(alias)

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, found {text!r}") from error
        if objection := limits.objection(value):
            raise argparse.ArgumentTypeError(objection)
        try:
            return make(value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def of_section(section: Any, name: str) -> Callable[[str], Any]:
    """A parser of an option's text into a section of settings. Errors drop the section's name, since argparse names the
    option."""

    def make(text: str) -> Any:
        try:
            return section.read(text)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{name}: ")) from error

    return checked(Text, make)


a_path, a_count, a_fraction = checked(Text, Path), checked(Count), checked(Fraction)
# at least the 256 bytes, the three special tokens and a letter
pieces_count = checked(Annotated[int, Bounds(least=260, below=10_000_000)])


def add_verb(verbs: Verbs, name: str, run: Run, line: str, about: str, *examples: str) -> argparse.ArgumentParser:
    """Add a verb.

    Args:
        line: its line in the list of verbs. about: what it does, needs and writes. examples: command lines.
    """
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=line,
        description=textwrap.fill(" ".join(about.split()), 100),
        epilog="\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(run=run, verb=verb)
    return verb


def function_of(module: str, function: str, with_extra: str | None = None) -> Run:
    """The function of a verb, from ``module``, which is imported only when the verb is used.

    ``with_extra``: the extra of this package that the module needs.
    """

    def run(arguments: argparse.Namespace) -> None:
        with needs("this verb", extra(with_extra)) if with_extra else nullcontext():
            imported = importlib.import_module(module)
        getattr(imported, function)(arguments)

    return run


def model_arguments(verb: argparse.ArgumentParser, max_seq_len: int | None = 4096) -> None:
    """Add the options for the model that a verb uses."""
    verb.add_argument("checkpoint", type=a_path, help="directory")
    verb.add_argument("--adapter", type=a_path, action="append", default=[], help="directory laid over it; can be repeated")
    verb.add_argument(
        "--mp",
        type=a_count,
        default=1,
        metavar="N",
        help="hold it in N processes (GPUs); or use torchrun, srun",
    )
    verb.add_argument("--layout", choices=["mixtral", "mixtral_sparse"], help="default: the checkpoint's own")
    verb.add_argument("--config", type=a_path, help="another config.json than the checkpoint's")
    verb.add_argument("--tokenizer", type=a_path, help="another tokenizer.model or tokenizer.json")
    told = "%(default)s" if max_seq_len else "the model's own"
    verb.add_argument(
        "--max-seq-len", type=a_count, default=max_seq_len, help=f"tokens of prompt and answer; default: {told}"
    )
    verb.add_argument(
        "--quantise",
        type=of_section(QuantiseSection, "quantise"),
        metavar="NAME",
        help="hold experts and attention as nf4, int4, int3, int2 or int8; or experts=nf4,attention=int8; default: as "
        "the checkpoint is",
    )
    verb.add_argument(
        "--offload",
        type=of_section(OffloadSection, "offload"),
        metavar="experts=N",
        help="have only N experts of each layer on the device; or device_memory=14GB: as many as fit (docs/offloading.md)",
    )
    verb.add_argument("--text-only", action="store_true", help="load a model that sees without its encoders, for texts")
    verb.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "fp32", "fp64"], help="default: %(default)s")


def sampling_arguments(verb: argparse.ArgumentParser, temperature: float) -> None:
    """Add the options for prompts and sampling."""
    verb.add_argument("--template", help="default: as the model was trained with, else its chat template, else dialog")
    verb.add_argument("--max-gen-len", type=a_count, default=512, help="tokens; default: %(default)s")
    verb.add_argument(
        "--temperature", type=checked(NonNegative), default=temperature, help="0: the likeliest token; default: %(default)s"
    )
    verb.add_argument("--top-p", type=a_fraction, default=0.95, help="default: %(default)s")
    verb.add_argument("--top-k", type=checked(WholeNumber), default=0, help="choose among so many; default: all")
    verb.add_argument("--min-p", type=a_fraction, default=0.0, help="least probability, as a share of the likeliest's")
    verb.add_argument("--repetition-penalty", type=checked(Positive), default=1.0, help="default: %(default)s")
    verb.add_argument(
        "--seed", type=checked(Annotated[int, Bounds()]), help="the same answers again; default: others each time"
    )
