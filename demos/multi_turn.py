#!/usr/bin/env python
"""A chat page. The model runs in processes of its own, one for each GPU.

python demos/multi_turn.py --n_gpus 2 --pretrained_path runs/quickstart/merged
"""

import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from boxes import drawn
from common import ask, draw_load, image_part, launch, parser, refusal, sampling, sampling_controls, serve_words, shown
from matplotlib.figure import Figure
from worker import Worker


def parts_of(content: Any) -> list[dict[str, Any]]:
    """The content of a turn on the page as OpenAI's parts: images before their text."""
    files = [image_part(path) for path in files_in(content)]
    if isinstance(content, dict):  # from the input box
        content = content["text"]
    several = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else part.get("text") for part in several]
    return files + [{"type": "text", "text": text} for text in texts if text is not None]


def together(turns: list[tuple[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Join turns to messages: the page has several turns for one question with images."""
    messages: list[dict[str, Any]] = []
    for role, parts in turns:
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += parts
        else:
            messages.append({"role": role, "content": parts})
    return messages


def files_in(content: Any) -> list[str]:
    """The paths of a turn's images, from the input box or from an earlier turn."""
    if isinstance(content, dict):
        return list(content["files"])
    parts = [part for part in content if isinstance(part, dict)]
    return [part.get("file", part)["path"] for part in parts if "file" in part or "path" in part]


def make_page(worker: Worker, most_tokens: int, sees: bool = False) -> gr.Blocks:
    async def answer(
        message: str | dict[str, Any], history: list[dict[str, Any]], system: str, *values: float
    ) -> AsyncIterator[tuple[Any, ...]]:
        if worker.url is None:
            raise refusal(worker.status)
        messages = [{"role": "system", "content": system}] if system.strip() else []
        messages += together([(turn["role"], parts_of(turn["content"])) for turn in history] + [("user", parts_of(message))])
        text, load = "", None
        async for piece in ask(worker.url, "chat/completions", messages=messages, **sampling(values)):
            text += piece["delta"].get("content", "")
            load = piece.get("expert_load")
            yield (text, None, None) if sees else (text, None)
        figure: Figure | None = draw_load(load) if load else None
        if not sees:
            yield text, figure
            return
        files = [file for content in (*(turn["content"] for turn in history), message) for file in files_in(content)]
        yield text, figure, drawn(shown(files[-1]), text) if files else None

    with gr.Blocks(title="Accessory", fill_height=True) as page, gr.Row():
        with gr.Column(scale=1, min_width=320):
            status = gr.Markdown(worker.status, elem_id="status")
            gr.Timer(1).tick(lambda: worker.status, None, status, show_progress="hidden")
            system = gr.Textbox(label="System prompt", lines=2, placeholder="the template's own")
            controls = sampling_controls(most_tokens)
            outputs: list[Any] = [gr.Plot(show_label=False)]
            if sees:
                outputs.append(gr.Image(label="Where it says that things are", elem_id="boxes", interactive=False))
        with gr.Column(scale=3):
            gr.ChatInterface(
                answer,
                multimodal=sees,
                textbox=gr.MultimodalTextbox(file_types=["image"], file_count="multiple") if sees else None,
                chatbot=gr.Chatbot(height="75vh", buttons=["copy"], feedback_options=None),
                additional_inputs=[system, *controls],
                additional_outputs=outputs,
                analytics_enabled=False,
            )
    return page


def main(about: str | None = __doc__, sees: bool = False) -> None:
    options = parser(about)
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
        page = make_page(worker, arguments.model_max_seq_len, sees)
        launch(page, arguments)
        ended.wait()
        page.close(verbose=False)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
