"""The verbs for training data."""

import argparse
from pathlib import Path

from accessory.config import Positive, WholeNumber
from accessory.errors import UserError
from accessory.verbs.options import (
    Verbs,
    a_count,
    a_path,
    add_verb,
    checked,
    function_of,
    pieces_count,
)


def data_verbs(verbs: Verbs) -> None:
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
        verb.add_argument("--config", type=a_path, help="config.json of the model, if it sees images; default: the run's")
        verb.add_argument("--max-seq-len", type=a_count, help="tokens; default: the run's, or 4096")
        verb.add_argument("-n", type=checked(WholeNumber), default=most, help=f"{what}; default: %(default)s")
    check.add_argument("--png", type=a_path, default=Path("lengths.png"), help="picture; default: %(default)s")
    check.add_argument("--images", action="store_true", help="decode every image, and list those that are damaged")
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

    if arguments.out.is_file():  # models may have been trained with it
        raise UserError(f"{arguments.out}: exists already; name another file, or remove it")
    out = train_tokenizer(mix_texts(arguments.mix), arguments.out, arguments.vocab_size)
    print(f"{out}: {Tokenizer(out).n_words} pieces")
