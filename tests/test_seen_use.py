"""Images in what users start: the commands, the server with OpenAI's own client, and the pages of the demos."""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import gradio_client
import openai
import pytest
import torch
from jobs import command
from models import Tensors, build, make_tokenizer, weights
from pictures import data_uri, file_bytes, noise
from PIL import Image
from ranks import run_ranks
from seeing import seeing
from test_chat import ARGS, Terminal
from test_demo import Demo
from test_server import serving

from accessory.checkpoint.encoders import write_encoders
from accessory.errors import UserError
from accessory.model.meta import MetaModel
from accessory.parallel.mesh import Axis
from accessory.train.save import save_model
from accessory.visual.vision import RandomEncoders, make_vision

sys.path.append(str(Path(__file__).parents[1] / "demos"))

SEES = seeing("ens", ARGS)
QUESTION = "the list of tokens"
PICTURES = [noise(40, 30, seed=seed) for seed in range(2)]
GREEDY = {"model": "model", "temperature": 0, "max_tokens": 8}


def write_seeing(home):
    """A model that sees, with two images; what it answers about each, and about none."""
    tokenizer = make_tokenizer(home / "tokenizer.model")
    w = weights(SEES)
    w["output.weight"][3:259] *= 0.3
    w["output.weight"][2] *= 0.0
    vision = make_vision(SEES.visual, RandomEncoders(SEES.visual, 0), Axis(), torch.float64, torch.device("cpu"))
    write_encoders(home / "visual.safetensors", vision, torch.float64)
    companions = {"tokenizer.model": tokenizer, "visual.safetensors": home / "visual.safetensors"}
    save_model(build(SEES, "mixtral", Tensors(w)), home / "model", companions, torch.float64, "safetensors")
    for number, picture in enumerate(PICTURES):
        (home / f"{number}.png").write_bytes(file_bytes(picture))
    model = MetaModel.from_pretrained(home / "model", dtype=torch.float64, device="cpu", with_visual=True)
    talks = [[{"role": "user", "content": parts(image)}] for image in PICTURES]
    assert model.chat([talks[0], QUESTION], "plain", 8) == [  # a model of texts and captions goes on with them
        model.generate([QUESTION], [image], 8)[0] for image in (PICTURES[0], None)
    ]
    talks.append([*talks[0], {"role": "assistant", "content": "words"}, {"role": "user", "content": "and then"}])
    return [answer.strip() for answer in model.chat([*talks, QUESTION], max_gen_len=8, temperature=0)]


def parts(image, kind="image"):
    shown = {"type": "image", "image": image} if kind == "image" else {"type": "image_url", "image_url": {"url": image}}
    return [shown, {"type": "text", "text": QUESTION}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("seeing")


@pytest.fixture(scope="module")
def answers(home):
    (answers,) = run_ranks(1, write_seeing, home)
    assert len(set(answers)) == 4
    return answers


def test_the_commands_show_images(home, answers, tmp_path):
    options = ("--precision", "fp64", "--max-gen-len", 8)
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": c}]}) + "\n" for c in (parts(str(home / "1.png")), QUESTION)
        )
    )
    for ranks in (1, 2):
        codes, _, err = command(
            "generate", home / "model", f"@{asked}", *options, "--out", tmp_path / "out.jsonl", ranks=ranks
        )
        assert codes == [0] * ranks, err
        told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [one["answer"] for one in told] == [answers[1], answers[3]]
    codes, out, err = command("generate", home / "model", QUESTION, "--image", home / "0.png", *options)
    assert codes == [0] and out.rstrip().endswith(f"\n{answers[0]}"), err
    codes, _, err = command("generate", home / "model", QUESTION, "--image", home / "model", *options)
    assert codes == [1] and f"error: image {home}/model: a directory; expected an image" in err
    codes, out, err = command("generate", home / "model", QUESTION, "--text-only", *options)
    assert codes == [0] and out.rstrip().endswith(f"\n{answers[3]}"), err
    codes, _, err = command("generate", home / "model", QUESTION, "--text-only", "--image", home / "0.png", *options)
    assert codes == [1] and f"error: it has an image ({home}/0.png), and this model reads text only" in err


def test_a_question_that_is_refused_keeps_the_image_for_the_next(home, answers):
    with Terminal(home / "model", "--precision", "fp64", "--max-gen-len", 8, "--temperature", 0) as chat:
        chat.until("> ")
        assert "no such file" in chat.say("/image nowhere.png") and chat.say(f"/image {home}/0.png") == ""
        os.write(chat.file, b"<image><image>a\n")
        assert "stands 3 times" in chat.until("each must have its own\r\n> ")
        assert chat.say(QUESTION) == answers[0]
        assert chat.say("/reset") == "" and chat.say(QUESTION) == answers[3]


def load_where_there_is_memory_for_texts(home):
    """What is said of images, where the encoders are too much; and with which of them left out the model is loaded."""
    weights, encoders = (
        sum(p.stat().st_size for p in home.glob(files)) for files in ("model/c*.safetensors", "v*.safetensors")
    )
    with mock.patch("accessory.model.memory.memory_of", lambda _: weights + encoders // 2):
        options = {"dtype": torch.float64, "device": "cpu"}
        with pytest.raises(UserError, match="the model does not fit"):
            MetaModel.from_pretrained(home / "model", **options)
        model = MetaModel.from_pretrained(home / "model", **options, with_visual=False)
    assert model.llma.vision is None
    for ask in (model.generate, model.compute_logits):
        with pytest.raises(UserError, match="images are given, and this model reads text only"):
            ask(["a"], [PICTURES[0]])
    return [answer.strip() for answer in model.chat([QUESTION], max_gen_len=8)]


def test_without_encoders_a_model_takes_less_memory_and_answers_texts(home, answers):
    assert run_ranks(1, load_where_there_is_memory_for_texts, home) == [answers[3:]]


def test_openais_client_sends_an_image(home, answers):
    with serving(home, "--allow-image-host", "127.0.0.2") as (_, address), client_of(address) as client:

        def ask(content, before=()):
            messages = [*before, {"role": "user", "content": content}]
            return client.chat.completions.create(messages=messages, **GREEDY)

        for number, picture in enumerate(PICTURES):
            answer = ask(parts(data_uri(picture, "BMP"), "image_url"))
            assert answer.choices[0].message.content == answers[number]
            assert answer.usage.prompt_tokens > SEES.visual.words
        before = [
            {"role": "user", "content": parts(data_uri(PICTURES[0]), "image_url")},
            {"role": "assistant", "content": "words"},
        ]
        assert ask("and then", before).choices[0].message.content == answers[2], "it stays with its turn"
        assert ask(QUESTION).choices[0].message.content == answers[3]
        refused = {
            "images on other machines are not fetched (http://127.0.0.1:1/a.png)": parts(
                "http://127.0.0.1:1/a.png", "image_url"
            ),
            "cannot be fetched": parts("http://127.0.0.2:1/a.png", "image_url"),
            "must be a data: URI with its bytes, found 'file:///etc/passwd'": parts("file:///etc/passwd", "image_url"),
            "must be a data: URI with its bytes": parts(str(home / "0.png"), "image_url"),
            'an image must be {"type": "image_url"': parts(str(home / "0.png")),
            "no image, or of another format": parts("data:image/png;base64,aGVsbG8=", "image_url"),
            "not base64": parts("data:image/png;base64,!", "image_url"),
        }
        for sentence, content in refused.items():
            with pytest.raises(openai.BadRequestError) as told:
                ask(content)
            assert sentence in told.value.message, told.value.message
        with pytest.raises(openai.APIStatusError, match="a request may have"):
            ask(parts("data:image/png;base64," + "A" * 33 * 2**20, "image_url"))


def client_of(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_pages_show_images(home, answers, tmp_path):
    """A talk whose image stays with its turn."""
    words = ("demos/multi_turn_mm.py", "--pretrained_path", home / "model", "--dtype", "fp64")
    sampling = ("", 8, 0, 1.0, 0, 1.0)
    with (
        Demo(*words, log=tmp_path / "log") as demo,
        contextlib.closing(gradio_client.Client(demo.url, verbose=False)) as page,
    ):
        message = {"text": QUESTION, "files": [gradio_client.handle_file(str(home / "0.png"))]}
        told = page.predict(message, *sampling, api_name="/answer")
        assert told[0].strip() == answers[0] and "Figure" in str(told[1]) and told[2] is None
        with pytest.raises(gradio_client.exceptions.AppError, match="no image, or of another format"):
            bad = tmp_path / "bad.png"
            bad.write_text("hello")
            page.predict({"text": QUESTION, "files": [gradio_client.handle_file(str(bad))]}, *sampling, api_name="/answer")


def test_boxes_are_drawn_where_they_are_in_the_padded_square():
    import boxes

    text = "<p>the cat</p>[0.25,0.5,0.5,0.75;0.5,.5,1,1] and <p>a nose</p> [0.5,0.5], <p>no</p>[x,y] <p>none</p>"
    cat, other, nose = boxes.places_in(text)
    assert cat == ("the cat", (0.25, 0.5, 0.5, 0.75)) and other.at == (0.5, 0.5, 1, 1) and nose == ("a nose", (0.5, 0.5))
    # 200 x 100 lies in the middle of a square of 200: its rows 50 to 150
    assert boxes.in_image(cat.at, 200, 100) == [50, 50, 100, 99] and boxes.in_image(nose.at, 100, 200) == [50, 100]
    image = Image.new("RGB", (200, 100), "white")
    drawn = boxes.drawn(image, text)
    assert drawn.getpixel((50, 70)) == (255, 0, 0) and drawn.getpixel((100, 50)) == (0, 0, 255)
    assert image.getpixel((50, 70)) == (255, 255, 255) and boxes.drawn(image, "nothing [0.1,0.2]") is None
