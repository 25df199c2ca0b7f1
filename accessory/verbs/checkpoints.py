"""The verbs for checkpoints."""

import argparse

from accessory.config import NonNegative, Positive, Text, WholeNumber
from accessory.verbs.options import (
    Verbs,
    a_count,
    a_path,
    add_verb,
    checked,
    function_of,
)

FORMATS = ["hf", "mistral", "mixtral", "mixtral_sparse"]
PACKED = ["gptq", "awq"]  # formats for matrices in 4 bits or fewer


def checkpoint_verbs(verbs: Verbs) -> None:
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
    verb.add_argument("--to", required=True, choices=[*FORMATS, *PACKED, "peft"], help="format; peft: the adapter alone")
    verb.add_argument("--mp", type=a_count, default=1, metavar="N", help="model-parallel parts; default: %(default)s")
    conversion_options(verb)

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
    conversion_options(verb)

    _quantise(verbs)

    verb = add_verb(
        verbs,
        "inspect",
        function_of(tools, "run_inspect"),
        "what a checkpoint or training state is: format, shape, sizes, and whether it is whole",
        "Print a checkpoint's format, shape, tokenizer, fingerprint, adapters, the sizes it can run at, and the parameters "
        "of each part; then read all values. Exit code 1 if a tensor is missing, misshapen or unexpected, or a value NaN or "
        "infinite. Of a training state it prints where the run stands, what is in it and with which settings it was saved; "
        "accessory verify reads that.",
        "accessory inspect hf",
        "accessory inspect BASE ADAPTER",
        "accessory inspect BASE --fit 24",
        "accessory inspect runs/quickstart/mixtral/states/step500",
    )
    verb.add_argument("paths", nargs="+", type=a_path, help="directory, or several in order")
    verb.add_argument("--config", type=a_path, help="another config.json than the directory's")
    about = "also say which ways to hold it (whole, int8, nf4, int3; over how many; experts offloaded) fit on such cards"
    verb.add_argument("--fit", type=checked(Positive), metavar="GB", help=about)

    verb = add_verb(
        verbs,
        "verify",
        function_of(tools, "run_verify"),
        "whether two checkpoints are the same model, or a training state is what was saved; exit code 1 if not",
        "Compare two checkpoints tensor by tensor, in whatever formats, layouts and parts they are: bit for bit, or once "
        "rounded to the narrower dtype, or within --tolerance. It prints what differs. Of one training state, read every "
        "byte and compare it with its checksum. Exit code 1 if something is not so.",
        "accessory verify runs/quickstart/model/epoch5 hf",
        "accessory verify runs/quickstart/mixtral/states/step500",
    )
    verb.add_argument("a", type=a_path, help="directory of a checkpoint, or of a training state")
    verb.add_argument("b", type=a_path, nargs="?", help="directory of the checkpoint to compare it with")
    verb.add_argument(
        "--tolerance", type=checked(NonNegative), default=0.0, help="of each tensor's largest value; default: %(default)s"
    )


def _quantise(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "quantise",
        function_of("accessory.checkpoint.tools", "run_quantise"),
        "write a model with its matrices in 8, 4 or fewer bits",
        "Write a model whose experts and attention are quantised: nf4, int4, int3 or int2, in blocks with a scale each, or "
        "int8, by rows; nf4-32: blocks of 32. It loads into either layout at any size that leaves blocks whole, as it is. "
        "Routers, norms, embeddings and output stay whole. docs/quantisation.md says more.",
        "accessory quantise BASE DST --experts nf4 --attention nf4",
        "accessory quantise BASE DST --experts int4 --attention int4 --calibrate MIX.yaml --to gptq",
    )
    verb.add_argument("sources", nargs="+", type=a_path, metavar="DIR", help="directory, or several: a base, then changes")
    verb.add_argument("destination", type=a_path, help="directory to write")
    verb.add_argument("--experts", type=checked(Text), metavar="NAME", help="how experts are held; default: whole")
    verb.add_argument("--attention", type=checked(Text), metavar="NAME", help="how attention is; default: whole")
    about = "round with the samples of a data mix in view (GPTQ), so that products with them change least"
    verb.add_argument("--calibrate", type=a_path, metavar="MIX", help=f"{about}; default: to the nearest")
    verb.add_argument("--tokens", type=a_count, default=2**17, help="of the mix; default: %(default)s")
    verb.add_argument("--seed", type=checked(WholeNumber), default=0, help="of their choice; default: %(default)s")
    layouts = ["mixtral", "mixtral_sparse"]
    verb.add_argument("--to", choices=[*layouts, *PACKED], default="mixtral", help="format; default: %(default)s")
    verb.add_argument("--mp", type=a_count, default=1, metavar="N", help="model-parallel parts; default: %(default)s")
    verb.add_argument("--config", type=a_path, help="another config.json than the source's")
    verb.add_argument("--force", action="store_true", help="go on if files and config.json, or adapter and base, do not fit")


def conversion_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "fp64"], help="default: each tensor's own")
    verb.add_argument("--format", choices=["safetensors", "pth"], default="safetensors", help="default: %(default)s")
    verb.add_argument(
        "--shard-gb", type=checked(Positive), default=5, help="largest file of Hugging Face's, GB; default: %(default)s"
    )
    verb.add_argument("--config", type=a_path, help="another config.json than the source's")
    verb.add_argument("--force", action="store_true", help="go on if files and config.json, or adapter and base, do not fit")
