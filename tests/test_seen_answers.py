"""Answers about images: each as if computed alone and anew, whatever runs beside it, in any cut, by any way of asking."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from models import TINY, Tensors, build, make_tokenizer, weights
from pictures import data_uri, file_bytes, noise
from ranks import run_ranks
from seeing import seeing

from accessory.certify import reference
from accessory.data.placement import PLACE
from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError
from accessory.infer.engine import Engine
from accessory.infer.meta import MetaModel
from accessory.infer.prompts import read_image
from accessory.infer.sights import SeenImages
from accessory.model.visual import Images
from accessory.parallel.mesh import make_mesh
from accessory.visual.views import normalised, padded_resize
from accessory.visual.vision import RandomEncoders, make_vision

CPU = torch.device("cpu")
STEPS = 6
ARGS = replace(TINY, vocab_size=300, max_seq_len=256, sliding_window=None)
PICTURES = [noise(40, 30, seed=seed) for seed in range(3)]
ASKED = [  # text, images, as (preset) writes it
    ("the list", [0]),
    ("a", []),
    ("then <image> is not <image> made", [1, 2]),
    ("every answer of words", [1]),
    ("the list", [2]),
    ("tokens", [0, 0]),
]


@functools.cache
def tensors(preset):
    w = weights(seeing(preset, ARGS))
    w["output.weight"][3:259] *= 0.3
    w["output.weight"][2] *= 0.0
    return w


class Counting:
    """Encoders that tell how many images they were given."""

    def __init__(self, vision):
        self.vision, self.count = vision, 0

    def __call__(self, images):
        self.count += len(images.pixels)
        return self.vision(images)


def make_model(preset, layout, mesh, tokenizer):
    args = seeing(preset, ARGS)
    model = build(args, layout, Tensors(tensors(preset)), mesh=mesh)
    model.vision = Counting(make_vision(args.visual, RandomEncoders(args.visual, 0), mesh.mp, torch.float64, CPU))
    return MetaModel(model, Tokenizer(tokenizer), 256)


def seen_alone(model, tokens, images):
    """What the plain reference is given of a prompt's images."""
    args, places = model.llma.args, [n for n, token in enumerate(tokens) if token == PLACE]
    vision, seen = model.llma.vision.vision, []
    for place, image in zip(places[:: args.visual.words], images, strict=True):
        pixels = padded_resize(image.convert("RGB"), args.visual.size)[None]
        features = vision(Images(torch.zeros(0, dtype=torch.int64), pixels)).features
        seen.append((place, [group[0] for group in features]))
    return seen


def continued(model, preset, prompt, images):
    """The greedy answer, the whole sequence computed anew for each token by the plain reference."""
    tokens, answer = list(prompt), []
    seen = seen_alone(model, tokens, images)
    for _ in range(STEPS):
        ids = torch.tensor([0 if token == PLACE else token for token in tokens + answer])
        answer.append(int(reference.forward(tensors(preset), model.llma.args, ids, seen=seen)[0][-1].argmax()))
    return model.tokenizer.decode(answer)


def answer(preset, layouts, tokenizer):
    mesh, told = make_mesh(dist.get_world_size()), {}
    texts, images = [text for text, _ in ASKED], [[PICTURES[n] for n in numbers] or None for _, numbers in ASKED]
    for layout in layouts:
        model = make_model(preset, layout, mesh, tokenizer)
        # prompts in chunks that end within images, and so few pages that requests wait
        model.__dict__["engine"] = Engine(model.llma, model.tokenizer, max_seq_len=256, cache_tokens=400, chunk_tokens=7)
        told[layout] = model.generate(texts, images, max_gen_len=STEPS, temperature=0)
        encoded, count = model.llma.vision.count, model.engine.shared_tokens
        again = model.generate(texts, images, max_gen_len=STEPS, temperature=0)
        told[layout, "again"] = again == told[layout], model.llma.vision.count == encoded == 3
        told[layout, "shared"] = model.engine.shared_tokens - count
        if mesh.mp.size == 1:
            prompts = model._prompts(texts, images, True, False)
            told["alone"] = [continued(model, preset, p.tokens, own or ()) for p, own in zip(prompts, images, strict=True)]
    return told


@pytest.mark.parametrize("preset", ["clip", "ens5", "llava"])
def test_what_is_answered_together_is_what_is_answered_alone(preset, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer.model")
    (one,) = run_ranks(1, answer, preset, ["mixtral"], tokenizer)
    assert one["mixtral"] == one["alone"] and len(set(one["alone"])) > 3
    assert one["alone"][0] != one["alone"][4], "another image, another answer"
    assert one["mixtral", "again"] == (True, True) and one["mixtral", "shared"] > 0
    for told in run_ranks(2, answer, preset, ["mixtral", "mixtral_sparse"], tokenizer):
        for layout in ("mixtral", "mixtral_sparse"):
            assert told[layout] == one["alone"] and told[layout, "again"] == (True, True)


def ask_in_every_way(tokenizer, folder):
    model = make_model("ens", "mixtral", make_mesh(1), tokenizer)
    image, size = PICTURES[0], model.llma.args.visual.size
    (folder / "a.png").write_bytes(file_bytes(image))
    transformed = normalised(padded_resize(image, size))  # by the reference's transforms
    options = {"max_gen_len": STEPS, "temperature": 0}
    expected = model.generate(["a list"], [image], **options)
    for shown in (folder / "a.png", str(folder / "a.png"), file_bytes(image), data_uri(image), [image], transformed):
        assert model.generate(["a list"], [shown], **options) == expected
    assert model.generate(["a list"], transformed[None], **options) == expected
    assert torch.equal(read_image(transformed.half().float(), model.llma.args.visual), padded_resize(image, size))
    for shown in (image, transformed[None]):
        assert [*model.stream_generate("a list", shown, **options)][-1] == {"text": expected[0], "end_of_content": True}
    # in a conversation, in the model's template
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "a list"}]
    uri = [{"type": "image_url", "image_url": {"url": data_uri(image)}}, parts[1]]
    talks = [[{"role": "user", "content": content}] for content in (parts, uri, "a list")]
    seen, sent, blind = model.chat(talks, **options)
    assert seen == sent != blind
    # what an image shows counts in scores, and is not scored
    scores = model.evaluate_examples(["a list of words"] * 2, images=[image, PICTURES[1]])
    assert scores["log_likelihood"][0] != scores["log_likelihood"][1]
    logits, plain = model.compute_logits(["a list"] * 2, [image, None])
    assert len(logits) == len(plain) + model.llma.args.visual.words and not torch.equal(logits[-1], plain[-1])
    assert len(scores["non_context_logits"][0]) == len(model.tokenizer.encode("a list of words", False, False))
    refused = {
        "an image's tensor must be [3, 64, 64] for this model, found [3, 5, 5]": [torch.zeros(3, 5, 5)],
        "images must be a list with an entry for each of the 1 prompts": image,
        "an image's tensor must be uint8, or normalised": [torch.zeros(3, 64, 64, dtype=torch.int64)],
        "image nowhere.png: no such file": ["nowhere.png"],
    }
    calls = {sentence: functools.partial(model.generate, ["a"], images) for sentence, images in refused.items()}
    calls["<image> stands 1 times in it, and it has 2 images"] = lambda: model.generate(["<image>"], [[image, image]])
    calls["<image> stands 1 times in it, and it has 0 images"] = lambda: model.generate(["<image>"])
    words = model.llma.args.visual.words
    calls[f"a prompt with 1 images must have {words} places for them, found 0"] = lambda: model.generate([[1]], [image])
    calls["leaves no room to answer in max_seq_len 256"] = lambda: model.generate(["a"], [[image] * 30])
    for sentence, call in calls.items():
        with pytest.raises(UserError) as told:
            call()
        assert sentence in str(told.value), str(told.value)
    model.llma.vision = None
    with pytest.raises(UserError, match="images are given, and this model reads text only"):
        model.generate(["a"], [image])
    assert model.generate(["a"]), "texts are still answered"


def test_every_way_to_show_an_image_is_the_same(tmp_path):
    run_ranks(1, ask_in_every_way, make_tokenizer(tmp_path / "tokenizer.model"), tmp_path)


class Encoders:
    """Of nothing: features that say which image it is."""

    def __call__(self, images):
        made = images.pixels[:, 0, 0, 0].double()
        return Images(images.rows, features=(made[:, None, None, None].expand(-1, 1, 4, 16),))


def limited():
    model = build(seeing("llava", ARGS), "mixtral", Tensors(tensors("llava")), mesh=make_mesh(1))
    model.vision = Encoders()
    size = model.args.visual.size
    images = [torch.full((3, size, size), n, dtype=torch.uint8) for n in range(5)]
    seen = SeenImages(model, most_bytes=2 * 4 * 16 * 8)
    prompts = [seen.numbered([1] + [PLACE] * 4, [image]) for image in images]

    def step(*numbers):
        documents = [prompts[n][0] for n in numbers]
        pixels = {number: image for n in numbers for number, image in prompts[n][1].items()}
        new = seen.missing(documents)
        seen.receive(documents, new, pixels)
        _, shown = seen.shown(documents, [0] * len(numbers))
        assert shown.features[0][:, 0, 0, 0].tolist() == [float(n) for n in dict.fromkeys(numbers)]
        return len(new)

    return [step(0), step(1), step(0), step(2), step(1), step(0, 1, 2, 3), step(3, 2), step(4), step(3)]


def test_the_newest_images_are_kept():
    (new,) = run_ranks(1, limited)
    assert new == [1, 1, 0, 1, 1, 2, 0, 1, 1]
