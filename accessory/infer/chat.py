"""The ``generate`` verb."""

import argparse

import torch.distributed as dist

from accessory.console import say
from accessory.data.templates import DIALOG_STOP, dialog_prompt
from accessory.dtypes import get_dtype
from accessory.model.meta import MetaModel
from accessory.parallel.launch import Launch


def answer(arguments: argparse.Namespace, launch: Launch) -> None:
    """Load a checkpoint over all ranks of the job and print an answer to each prompt."""
    model = MetaModel.from_pretrained(
        [arguments.checkpoint, *arguments.adapter],
        arguments.layout,
        mp_group=dist.group.WORLD,
        dtype=get_dtype(arguments.precision),
        device=launch.device,
    )
    texts = model.generate(
        arguments.prompts if arguments.raw else [dialog_prompt(question) for question in arguments.prompts],
        max_gen_len=arguments.max_gen_len,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        additional_stop_symbols=() if arguments.raw else (DIALOG_STOP,),
    )
    for prompt, text in zip(arguments.prompts, texts, strict=True):
        say(f"> {prompt}\n{text.strip()}\n")
