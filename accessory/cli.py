"""The ``accessory`` command: a verb a feature. ``python -m accessory`` is the same, for torchrun and srun to launch."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Literal

from accessory import __version__
from accessory.config import nearest
from accessory.errors import Stopped, UserError, sentence, stop_on_signals
from accessory.verbs.checkpoints import checkpoint_verbs, conversion_options
from accessory.verbs.data import data_verbs
from accessory.verbs.options import Run, a_count, a_path
from accessory.verbs.proof import certify_verbs
from accessory.verbs.training import training_verbs
from accessory.verbs.using import using_verbs

# Read when torch is imported: a lost peer is a sentence of the watchdog's, and not pages of C++ frames before it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

ABOUT = """
Finetune Mixture-of-Experts language models of the Mixtral family on many GPUs, in either of two parallel layouts that give
the same numbers, and convert, compare and use what comes out.
"""
READ_ON = "accessory VERB --help says what a verb does, needs and writes. README.md begins with a run of five minutes."


def main() -> None:
    """Parse the command line and run a verb."""
    parser = make_parser()
    arguments, left = parser.parse_known_args()
    if "overrides" in arguments and not any(word.startswith("-") for word in left):
        arguments.overrides += left  # argparse takes only those before the first option
    elif left:
        verb: argparse.ArgumentParser = arguments.verb
        wrong = next((word.partition("=")[0] for word in left if word.startswith("--")), None)
        known = re.findall(r"--[\w-]+", verb.format_usage())
        verb.error(f"unknown option {wrong}{nearest(wrong, known)}" if wrong else f"not expected: {' '.join(left)}")
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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="accessory", description=ABOUT, epilog=READ_ON)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add_verbs in (training_verbs, using_verbs, checkpoint_verbs, certify_verbs, data_verbs):
        add_verbs(verbs)
    return parser


def split(layout: Literal["mixtral", "mixtral_sparse"], name: str) -> None:
    """The scripts ``tools/split.py`` and ``tools/split_sparse.py``, which users of the reference project know."""
    from accessory.checkpoint.tools import run_convert

    parser = argparse.ArgumentParser(description=f"Cut a checkpoint of any format for the layout '{layout}'.")
    parser.add_argument("source", nargs="?", type=a_path, default=Path(), help="directory; default: this one")
    parser.add_argument("destination", nargs="?", type=a_path, default=Path(name), help="default: %(default)s")
    parser.add_argument("--mp", type=a_count, default=8, metavar="N", help="model-parallel parts; default: %(default)s")
    conversion_options(parser)
    arguments = parser.parse_args()
    arguments.sources, arguments.to = [arguments.source], layout
    _report(run_convert, arguments)
