"""Shared by the demos: LLaMA2-Accessory's command line, requests to a server, and the look of a page."""

import argparse
import base64
import io
import json
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import httpx
from matplotlib.figure import Figure
from PIL import Image

from accessory.errors import UserError
from accessory.visual.images import open_image

refusal = partial(gr.Error, print_exception=False)
"""An error that is shown on the page only, without a traceback in the terminal."""


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options of LLaMA2-Accessory's demos that have a meaning here."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--pretrained_path", nargs="+", required=True, help="a checkpoint, and what is laid over it")
    parser.add_argument("--llama_type", choices=["mixtral", "mixtral_sparse"], help="layout; default: the checkpoint's own")
    parser.add_argument("--llama_config", help="config.json; default: the checkpoint's own")
    parser.add_argument("--tokenizer_path", help="tokenizer.model or tokenizer.json; default: the checkpoint's own")
    parser.add_argument("--model_max_seq_len", type=int, default=4096, help="tokens; default: %(default)s")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "fp64"], default="bf16", help="default: %(default)s")
    parser.add_argument("--quant", nargs="?", const="nf4", metavar="NAME", help="hold matrices so; default: nf4")
    parser.add_argument(
        "--offload", metavar="experts=N", help="experts on the device, the others off it (docs/offloading.md)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, for this machine alone")
    parser.add_argument("--port", type=int, help="of the page; default: the first that is free from 7860")
    parser.add_argument("--share", action="store_true", help="a public link through gradio's servers")
    return parser


def serve_words(arguments: argparse.Namespace) -> list[str]:
    """The command line of ``accessory serve`` for a demo's arguments."""
    base, *over = arguments.pretrained_path
    words = ["serve", base, "--name", "model", "--port", "0", "--precision", arguments.dtype]
    words += ["--max-seq-len", str(arguments.model_max_seq_len)]
    words += [word for directory in over for word in ("--adapter", directory)]
    given = {"--layout": arguments.llama_type, "--config": arguments.llama_config, "--tokenizer": arguments.tokenizer_path}
    given |= {"--quantise": arguments.quant, "--offload": arguments.offload}
    return words + [word for name, value in given.items() if value for word in (name, value)]


async def ask(url: str, path: str, **body: Any) -> AsyncIterator[dict[str, Any]]:
    """Stream the pieces of an answer. Closing this generator ends the answer on the server, too.

    Raises:
        refusal: the request is refused, or the server is lost.
    """
    body |= {"model": "model", "stream": True, "expert_load": True}
    try:
        async with httpx.AsyncClient(timeout=None) as client, client.stream("POST", f"{url}/v1/{path}", json=body) as answer:
            if answer.is_error:
                raise refusal(json.loads(await answer.aread())["error"]["message"])
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise refusal(event["error"]["message"])
                yield event["choices"][0]
    except httpx.HTTPError as error:
        raise refusal("The model is lost in the middle of its answer; ask again when it is back.") from error


def shown(path: str) -> Image.Image:
    """Open an image that a user put into the page."""
    try:
        return open_image(path)
    except UserError as error:
        raise refusal(str(error)) from error


def image_part(path: str) -> dict[str, Any]:
    """An image as a part of a message to the server, with its bytes."""
    stream = io.BytesIO()
    shown(path).save(stream, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"},
    }


def sampling_controls(most: int) -> list[gr.Slider]:
    """max_tokens, temperature, top_p, top_k, repetition_penalty, in this order."""
    return [
        gr.Slider(1, most, min(1024, most), step=1, label="Longest answer, tokens"),
        gr.Slider(0, 2, 0.7, label="Temperature (0: always the likeliest token)"),
        gr.Slider(0.01, 1, 0.95, label="Top p"),
        gr.Slider(0, 200, 0, step=1, label="Top k (0: all)"),
        gr.Slider(0.5, 2, 1.0, label="Repetition penalty"),
    ]


def sampling(values: tuple[float, ...]) -> dict[str, float]:
    """The values of the controls by the server's names."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    whole = ("max_tokens", "top_k")
    return {name: int(value) if name in whole else value for name, value in zip(names, values, strict=True)}


def draw_load(load: list[list[int]]) -> Figure:
    """A heat map of an answer's expert load, [layers][experts], as shares of each layer's tokens."""
    shares = [[count / max(1, sum(layer)) for count in layer] for layer in load]
    figure = Figure(figsize=(5, 1.4 + 0.2 * min(len(shares), 40)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="expert", ylabel="layer", xticks=range(len(shares[0])), title="Where the tokens went")
    figure.colorbar(image, format=lambda share, _: f"{share:.0%}")
    return figure


def launch(page: gr.Blocks, arguments: argparse.Namespace, **options: Any) -> str:
    """Open the page and print its address."""
    page.queue(default_concurrency_limit=None)  # sessions do not wait for one another: the engine batches them
    # installed fonts: none are downloaded
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, local, public = page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share,
        quiet=True,
        footer_links=[],
        theme=theme,
        ssr_mode=False,
        prevent_thread_lock=True,
        **options,
    )
    print(f"The page is at {public or local} - Ctrl-C ends it.", flush=True)
    return local
