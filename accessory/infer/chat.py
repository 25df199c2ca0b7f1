"""The verbs ``generate`` and ``classify``."""

import argparse

import torch.distributed as dist

from accessory.console import say
from accessory.data.templates import get_template
from accessory.dtypes import get_dtype
from accessory.infer.meta import MetaModel
from accessory.parallel.launch import Launch, run_job
from accessory.settings import ParallelSection


def run_generate(arguments: argparse.Namespace) -> None:
    """The ``generate`` verb."""
    run_job(lambda launch: answer(arguments, launch), ParallelSection.stall_timeout_s)


def answer(arguments: argparse.Namespace, launch: Launch) -> None:
    """Load a checkpoint over all ranks of the job and print an answer to each prompt."""
    if arguments.template not in (None, "chat_template"):
        get_template(arguments.template)  # a name that is none is told before the model is read
    model = _load(arguments, launch)
    options = (arguments.max_gen_len, arguments.temperature, arguments.top_p)
    if arguments.raw:
        texts = model.generate(arguments.texts, None, *options)
    else:
        texts = model.chat(arguments.texts, arguments.template, *options)
    for prompt, text in zip(arguments.texts, texts, strict=True):
        say(f"> {prompt}\n{text.strip()}\n")


def run_classify(arguments: argparse.Namespace) -> None:
    """The ``classify`` verb."""
    run_job(lambda launch: classify(arguments, launch), ParallelSection.stall_timeout_s)


def classify(arguments: argparse.Namespace, launch: Launch) -> None:
    """Load a classifier over all ranks of the job and print the labels of each text, the likeliest first."""
    for text, shares in zip(arguments.texts, _load(arguments, launch).classify(arguments.texts), strict=True):
        say(f"> {text}\n{', '.join(f'{label} {share:.1%}' for label, share in shares.items())}\n")


def _load(arguments: argparse.Namespace, launch: Launch) -> MetaModel:
    return MetaModel.from_pretrained(
        [arguments.checkpoint, *arguments.adapter],
        arguments.layout,
        mp_group=dist.group.WORLD,
        dtype=get_dtype(arguments.precision),
        device=launch.device,
    )
