#!/usr/bin/env python
"""A page to ask a model one question at a time. Each process holds a part of the model; the first one serves the page.

torchrun --nproc-per-node 2 demos/single_turn.py --pretrained_path runs/quickstart/merged
"""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from boxes import drawn
from common import ask, draw_load, image_part, launch, parser, refusal, sampling, sampling_controls, serve_words, shown

from accessory.cli import make_parser
from accessory.infer.server import serve
from accessory.parallel.launch import run_job
from accessory.settings import ParallelSection

TEMPLATE, TEXT = "asked in the model's template", "gone on with as it is"


def make_page(url: str, most_tokens: int, sees: bool = False) -> gr.Blocks:
    async def about(
        image: str | None, question: str, given: str, how: str, *values: float
    ) -> AsyncIterator[tuple[Any, ...]]:
        async for text, figure in asked_about(image, question, given, how, *values):
            yield text, figure, drawn(shown(image), text) if image and figure else None

    async def answer(question: str, given: str, how: str, *values: float) -> AsyncIterator[tuple[Any, ...]]:
        async for told in asked_about(None, question, given, how, *values):
            yield told

    async def asked_about(
        image: str | None, question: str, given: str, how: str, *values: float
    ) -> AsyncIterator[tuple[Any, ...]]:
        prompt = f"{question}\n\n{given}" if given.strip() else question
        if image and how == TEXT:
            raise refusal("An image is asked about in the model's template.")
        content = [image_part(image), {"type": "text", "text": prompt}] if image else prompt
        asked: dict[str, Any] = {"prompt": prompt} if how == TEXT else {"messages": [{"role": "user", "content": content}]}
        text, load = "", None
        async for piece in ask(url, "completions" if how == TEXT else "chat/completions", **asked, **sampling(values)):
            text += piece["text"] if how == TEXT else piece["delta"].get("content", "")
            load = piece.get("expert_load")
            yield text, None
        yield text, draw_load(load) if load else None

    with gr.Blocks(title="Accessory") as page:
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", type="filepath", elem_id="image") if sees else None
                question = gr.Textbox(label="Question", lines=4)
                given = gr.Textbox(label="What it is about (may be empty)", lines=4)
                how = gr.Radio([TEMPLATE, TEXT], value=TEMPLATE, label="The question is")
                controls = sampling_controls(most_tokens)
            with gr.Column():
                with gr.Row():
                    run, stop = gr.Button("Run", variant="primary"), gr.Button("Stop")
                text = gr.Textbox(label="Answer", lines=12, buttons=["copy"], elem_id="answer")
                outputs: list[Any] = [text, gr.Plot(show_label=False)]
                if sees:
                    outputs.append(gr.Image(label="Where it says that things are", elem_id="boxes", interactive=False))
        inputs = [question, given, how, *controls]
        asking = run.click(about, [image, *inputs], outputs) if image else run.click(answer, inputs, outputs)
        stop.click(None, None, None, cancels=[asking])
    return page


def main(about: str | None = __doc__, sees: bool = False) -> None:
    arguments = parser(about).parse_args()
    serving = make_parser().parse_args(serve_words(arguments))

    def show(url: str) -> None:
        launch(make_page(url, arguments.model_max_seq_len, sees), arguments)

    run_job(lambda launch: serve(serving, launch, show), ParallelSection.stall_timeout_s)


if __name__ == "__main__":
    main()
