#!/usr/bin/env python
"""A page that asks a model one question at a time. Each process holds a part of the model; the first one shows the page.

torchrun --nproc-per-node 2 demos/single_turn.py --pretrained_path runs/quickstart/merged
"""

from collections.abc import AsyncIterator

import gradio as gr
from common import ask, draw_load, launch, parser, sampling, sampling_controls, serve_words
from matplotlib.figure import Figure

from accessory.cli import make_parser
from accessory.infer.server import serve
from accessory.parallel.launch import run_job
from accessory.settings import ParallelSection

TEMPLATE, TEXT = "asked in the model's template", "gone on with as it is"


def make_page(url: str, most_tokens: int) -> gr.Blocks:
    async def answer(question: str, given: str, how: str, *values: float) -> AsyncIterator[tuple[str, Figure | None]]:
        prompt = f"{question}\n\n{given}" if given.strip() else question
        asked = {"prompt": prompt} if how == TEXT else {"messages": [{"role": "user", "content": prompt}]}
        text, load = "", None
        async for piece in ask(url, "completions" if how == TEXT else "chat/completions", **asked, **sampling(values)):
            text += piece["text"] if how == TEXT else piece["delta"].get("content", "")
            load = piece.get("expert_load")
            yield text, None
        yield text, draw_load(load) if load else None

    with gr.Blocks(title="Accessory") as page:
        with gr.Row():
            with gr.Column():
                question = gr.Textbox(label="Question", lines=4)
                given = gr.Textbox(label="What it is about (may be empty)", lines=4)
                how = gr.Radio([TEMPLATE, TEXT], value=TEMPLATE, label="The question is")
                controls = sampling_controls(most_tokens)
            with gr.Column():
                with gr.Row():
                    run, stop = gr.Button("Run", variant="primary"), gr.Button("Stop")
                text = gr.Textbox(label="Answer", lines=12, buttons=["copy"], elem_id="answer")
                picture = gr.Plot(show_label=False)
        asking = run.click(answer, [question, given, how, *controls], [text, picture])
        stop.click(None, None, None, cancels=[asking])
    return page


def main() -> None:
    arguments = parser(__doc__).parse_args()
    serving = make_parser().parse_args(serve_words(arguments))

    def show(url: str) -> None:
        launch(make_page(url, arguments.model_max_seq_len), arguments)

    run_job(lambda launch: serve(serving, launch, show), ParallelSection.stall_timeout_s)


if __name__ == "__main__":
    main()
