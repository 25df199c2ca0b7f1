#!/usr/bin/env python
"""A page to talk with a model, which runs in processes of its own, one for each GPU.

python demos/multi_turn.py --n_gpus 2 --pretrained_path runs/quickstart/merged
"""

import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from common import ask, draw_load, launch, parser, sampling, sampling_controls, serve_words
from matplotlib.figure import Figure
from worker import Worker


def make_page(worker: Worker, most_tokens: int) -> gr.Blocks:
    async def answer(
        message: str, history: list[dict[str, Any]], system: str, *values: float
    ) -> AsyncIterator[tuple[str, Figure | None]]:
        if worker.url is None:
            raise gr.Error(worker.status)
        messages = [{"role": "system", "content": system}] if system.strip() else []
        messages += [{"role": turn["role"], "content": turn["content"]} for turn in history]
        messages.append({"role": "user", "content": message})
        text, load = "", None
        async for piece in ask(worker.url, "chat/completions", messages=messages, **sampling(values)):
            text += piece["delta"].get("content", "")
            load = piece.get("expert_load")
            yield text, None
        yield text, draw_load(load) if load else None

    with gr.Blocks(title="Accessory", fill_height=True) as page, gr.Row():
        with gr.Column(scale=1, min_width=320):
            status = gr.Markdown(worker.status, elem_id="status")
            gr.Timer(1).tick(lambda: worker.status, None, status, show_progress="hidden")
            system = gr.Textbox(label="System prompt", lines=2, placeholder="the template's own")
            controls = sampling_controls(most_tokens)
            picture = gr.Plot(show_label=False)
        with gr.Column(scale=3):
            gr.ChatInterface(
                answer,
                chatbot=gr.Chatbot(height="75vh", buttons=["copy"], feedback_options=None),
                additional_inputs=[system, *controls],
                additional_outputs=[picture],
                analytics_enabled=False,
            )
    return page


def main() -> None:
    options = parser(__doc__)
    gpus = options.add_mutually_exclusive_group()
    gpus.add_argument("--n_gpus", type=int, default=1, help="GPUs that hold the model together (without any: processes)")
    gpus.add_argument("--gpu_ids", type=int, nargs="+", default=[], help="these GPUs")
    arguments = options.parse_args()
    count = len(arguments.gpu_ids) or arguments.n_gpus
    worker = Worker([*serve_words(arguments), "--mp", str(count)], arguments.gpu_ids)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        if not worker.wait():
            sys.exit(1)
        page = make_page(worker, arguments.model_max_seq_len)
        launch(page, arguments)
        ended.wait()
        page.close(verbose=False)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
