"""Images in training data: where they stand among the tokens, what a batch has of them, and every way they can be bad."""

import itertools
import json
import os
import re
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from models import make_tokenizer
from pictures import data_uri, file_bytes, noise
from seeing import visual
from test_data import lines, write_mix
from texts import TWO, talk

from accessory.cli import main
from accessory.data.image_reader import ImageReader, one_ahead
from accessory.data.loader import BatchPlan
from accessory.data.mix import load_mix, tokenise_mix
from accessory.data.packing import Rows
from accessory.data.placement import PLACE, encode_placed, images_set_apart
from accessory.data.records import read_record
from accessory.data.templates import default_template
from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError
from accessory.visual.images import open_image
from accessory.visual.views import padded_resize

CLIP, ENS, LLAVA = visual("clip"), visual("ens"), visual("llava")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300))


def encoded(tokenizer, raw, sees):
    """Tokens and trained of a record as a mix makes them, [n, 2]."""
    record, images = images_set_apart(read_record(raw), sees)
    return list(zip(*encode_placed(tokenizer, default_template(record).render(record), len(images), sees), strict=True))


def blocks(tokens):
    """How long the stretches of images and of text are, an image's as negative numbers."""
    return [
        len(list(group)) * (-1 if is_image else 1) for is_image, group in itertools.groupby(t == PLACE for t, _ in tokens)
    ]


@pytest.mark.parametrize("sees", [CLIP, ENS], ids=["clip", "ens"])
@pytest.mark.parametrize("question", ["Why?", "<image>\nWhy?", "Why?\n<image>"])
def test_an_image_stands_beside_the_beginning_as_in_the_reference(sees, question, tokenizer):
    """The words around it are those without it, whatever the record's text says of its place."""
    alone = encoded(tokenizer, TWO, None)
    start = {"before_bos": 0, "after_bos": 1}[sees.place]
    raw = talk(question, "Because.", "Really?", "Yes.", image="a.png")
    assert encoded(tokenizer, raw, sees) == [*alone[:start], *[(PLACE, False)] * sees.words, *alone[start:]]
    assert encoded(tokenizer, TWO, sees) == alone, "a text is a text"
    two = encoded(tokenizer, TWO | {"images": ["a.png", "b.png"]}, sees)
    assert two == [*alone[:start], *[(PLACE, False)] * 2 * sees.words, *alone[start:]]


def test_images_stand_where_the_text_says(tokenizer):
    """Each is one of the places; the text between two is encoded by itself, as LLaVA's own code does it."""
    words = LLAVA.words
    raw = talk("<image>\nWhy <image> so?", "Because.", image="a.png", images=["b.png"])
    for sees in (LLAVA, ENS):
        tokens = encoded(tokenizer, raw, sees)
        before, one, between, other, behind = blocks(tokens)
        assert one == other == -sees.words and before > 0
        text = [token for token, _ in tokens if token != PLACE]
        start = before
        assert text[start : start + between] == tokenizer.encode("\nWhy ", bos=False, eos=False)
        assert text[start + between :][:3] == tokenizer.encode(" so?\n### Assistant:", bos=False, eos=False)[:3]
        assert len(text[start + between :]) == behind
    unsaid = encoded(tokenizer, talk("Why?", "Because.", image="a.png"), LLAVA)
    assert unsaid == encoded(tokenizer, talk("<image>\nWhy?", "Because.", image="a.png"), LLAVA)
    caption = encoded(tokenizer, {"image": "a.png", "caption": "A cat."}, LLAVA)
    assert blocks(caption) == [1, -words, len(tokenizer.encode("A cat.", bos=False, eos=True))]
    assert [trained for _, trained in caption] == [False] * (1 + words) + [True] * (len(caption) - 1 - words)


@pytest.fixture
def folder(tmp_path):
    """Ten small pictures, and a damaged one."""
    (tmp_path / "pictures").mkdir()
    for number in range(10):
        (tmp_path / f"pictures/{number}.png").write_bytes(file_bytes(noise(9 + number, 12, seed=number)))
    (tmp_path / "pictures/cut.png").write_bytes(file_bytes(noise(64, 64))[:3000])
    return tmp_path


def asked(*images, answer="a list"):
    return talk("which words?", answer, images=list(images)) if images else talk("which words?", answer)


def rows_of(data, width=None):
    lengths = data.training.lengths
    order = data.epoch(0)
    return Rows.packed(order, lengths, width) if width else Rows.alone(order)


@pytest.mark.parametrize("width", [None, 300])
def test_every_rank_has_the_pixels_of_its_samples(width, folder, tokenizer):
    """Of a mix of samples with none, one and two images, from a root, a table and a URI; each step in any cut."""
    records = [asked(), asked("0.png"), asked("1.png", "2.png", answer="a token"), asked(answer="every list of tokens")]
    records += [asked(data_uri(noise(9, 9, seed=50))), *(asked(f"{n}.png", answer="list " * n) for n in range(3, 9))]
    table = [{"conversations": TWO["conversations"], "image": {"bytes": file_bytes(noise(7, 7, seed=51)), "path": "x.png"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "b.parquet")
    entries = {"path": "a.jsonl", "root": "pictures", "type": "image_text"}, {"path": "b.parquet"}
    mix = write_mix(folder, *entries, a_jsonl=lines(*records))
    data = load_mix(mix, tokenizer, 300, 0, visual=ENS)
    assert len(data.training) == 12 and data.count("images") == 11 and data.count("dropped") == 0
    reader, rows = ImageReader(16), rows_of(data, width)
    expected = {}
    for number in range(len(data.training)):
        images = data.training[number].images
        assert all(name.startswith("data:") or name.startswith(str(folder / "pictures")) for name in images)
        expected[number] = [padded_resize(open_image(name), 16) for name in images]
    steps = {}
    for world, accumulation in ((1, 1), (2, 2), (3, 1)):
        seen = []
        for rank in range(world):
            plan = BatchPlan(2, accumulation, rank, world, images=reader)
            for batch in itertools.chain.from_iterable(one_ahead(plan.epoch(data.training, rows))):
                numbers = batch.sample_keys.tolist()
                pixels = [image for number in numbers for image in expected[number]]
                assert batch.images.pixels.dtype == torch.uint8 and len(batch.images.pixels) == len(pixels)
                assert all(map(torch.equal, batch.images.pixels, pixels))
                assert len(batch.images.rows) == len(pixels) * ENS.words and (batch.tokens[batch.images.rows] == 0).all()
                samples = [data.training[number] for number in numbers]
                tokens = np.concatenate([sample.tokens for sample in samples] or [np.zeros(1, int)])
                assert torch.equal(batch.images.rows, torch.from_numpy((tokens == PLACE).nonzero()[0]))
                assert (batch.tokens < tokenizer.n_words).all()
                seen += numbers
        steps[world] = sorted(seen)
    assert all(seen == list(range(12)) for seen in steps.values())


def test_no_sample_is_cut_in_front_of_an_image(folder, tokenizer, capsys, monkeypatch):
    text = [asked("0.png", answer="every list of tokens " * 20), asked(), asked("0.png", "1.png")]
    late = talk("which words? " * 20 + "<image> <image>", "a list", images=["0.png", "1.png"])
    mix = write_mix(folder, {"path": "a.jsonl", "root": "pictures"}, a_jsonl=lines(*text, late))
    width = len(encoded(tokenizer, text[2], ENS))
    data = load_mix(mix, tokenizer, width, 0, visual=ENS)
    assert [len(sample.images) for sample in data.training] == [1, 0, 2]
    assert len(data.training[0].tokens) == width and data.count("truncated") == 2 and data.count("unseen") == 1
    (source,) = data.sources
    assert list(source.dropped()) == [f"{folder}/a.jsonl:4: dropped: an image does not fit within {width} tokens"]
    with pytest.raises(UserError, match=f"max_seq_len {ENS.words + 2} has no room for an image of {ENS.words} words"):
        tokenise_mix(mix, tokenizer, ENS.words + 2, visual=ENS)


def test_equal_texts_of_other_images_are_no_duplicates(folder, tokenizer):
    records = asked("0.png"), asked("1.png"), asked("0.png"), asked()
    mix = write_mix(folder, {"path": "a.jsonl", "root": "pictures"}, a_jsonl=lines(*records))
    (store,) = tokenise_mix(mix, tokenizer, 200, visual=ENS)[0].stores
    one, other, again, none = store.digests
    assert one == again and len({one, other, none}) == 3
    # the words of another model's images are others
    assert tokenise_mix(mix, tokenizer, 200, visual=CLIP)[0].stores[0].key != store.key


def test_an_epoch_takes_one_of_an_images_captions_and_the_next_another(folder, tokenizer):
    """Through as many epochs as there are, each once; as the seed says; a text beside them comes every time."""
    ways = [1 + number % 3 for number in range(10)]
    captions = [{"image": f"{n}.png", "caption": [f"list {way}" for way in range(ways[n])]} for n in range(10)]
    entries = {"path": "a.jsonl", "root": "pictures"}, {"path": "b.jsonl"}
    mix = write_mix(folder, *entries, a_jsonl=lines(*captions), b_jsonl=lines(asked(), {"text": "tokens " * 300}))

    def epochs(seed=0, **entry):
        write_mix(folder, entries[0] | entry, entries[1])
        data = load_mix(mix, tokenizer, 200, seed, visual=CLIP)
        assert len(data.training) - sum(ways) > 2, "the parts of a long text are samples of one record, too"
        for epoch in range(6):
            taken = np.asarray(data.epoch(epoch)[:])
            assert sorted(taken[taken >= sum(ways)]) == [*range(sum(ways), len(data.training))]
            yield taken[taken < sum(ways)].tolist()

    begins = np.cumsum([0, *ways])
    owner = np.searchsorted(begins, np.arange(sum(ways)), side="right") - 1

    def by_image(rounds):
        told = [[] for _ in ways]
        for taken in rounds:
            for number in taken:
                told[owner[number]].append(number - begins[owner[number]])
        return told

    once = list(epochs())
    assert all(sorted(owner[taken]) == [*range(10)] for taken in once)
    assert all(
        sorted(told[:count]) == [*range(count)] and told[count:] == told[: len(told) - count]
        for told, count in zip(by_image(once), ways, strict=True)
    )
    assert list(epochs()) == once and by_image(epochs(seed=1)) != by_image(once)
    assert len({told[0] for told in by_image(once)}) == 3, "not all begin with their first"
    for entry, times in (({"epochs": 2}, 12), ({"epochs": 0.5}, 3), ({"ratio": 1.0}, 6)):
        for told, count in zip(by_image(epochs(**entry)), ways, strict=True):
            often = [told.count(way) for way in range(count)]
            assert sum(often) == times and max(often) - min(often) <= 1


BAD = {  # name: (record, the sentence)
    "not there": (asked("lost.png"), "image HOME/pictures/lost.png: no such file; expected an image"),
    "a folder": (asked("."), "image HOME/pictures: a directory; expected an image"),
    "no image": (asked("../a.jsonl"), "no image, or of another format than PNG, JPEG, WEBP, GIF, BMP"),
    "on the web": (asked("https://a.b/c.png"), "image https://a.b/c.png: images on the web are not fetched"),
    "too long a name": (asked("x" * 5000), "cannot be read: File name too long"),
    "no base64": (asked("data:image/png;base64,!"), "image data:image/png;base64,!: not base64"),
    "fewer marks": (
        talk("<image> Why?", "So.", images=["0.png", "1.png"]),
        "<image> stands 1 times in it, and it has 2 images: each must have its own",
    ),
    "more marks": (talk("<image><image>", "So.", image="0.png"), "<image> stands 2 times in it, and it has 1 images"),
    "a mark alone": (talk("<image> Why?", "So."), "<image> stands 1 times in it, and it has 0 images"),
    "a mark in an answer": (talk("Why?", "So <image>.", image="0.png"), "<image> stands in what is no question"),
}


def test_every_bad_image_is_a_sentence_with_its_line(folder, tokenizer):
    records = [record for record, _ in BAD.values()]
    mix = write_mix(folder, {"path": "a.jsonl", "root": "pictures"}, a_jsonl=lines(asked(), *records))
    told = list(tokenise_mix(mix, tokenizer, 200, visual=ENS)[0].bad())
    for number, ((_, sentence), line) in enumerate(zip(BAD.values(), told, strict=True), 2):
        assert line.startswith(f"{folder}/a.jsonl:{number}: ") and sentence.replace("HOME", str(folder)) in line
        assert "\n" not in line and len(line) < 600
    # what has been mended since is tokenised again
    (folder / "pictures/lost.png").write_bytes(file_bytes(noise(4, 4)))
    assert len(list(tokenise_mix(mix, tokenizer, 200, visual=ENS)[0].bad())) == len(BAD) - 1


def test_an_image_that_is_damaged_in_its_middle_is_told_where_it_is_decoded(folder, tokenizer, capsys):
    """The run ends; or nothing is learnt of that record, and all else is as it was."""
    mix = write_mix(folder, {"path": "a.jsonl", "root": "pictures"}, a_jsonl=lines(asked("0.png"), asked("cut.png")))
    data = load_mix(mix, tokenizer, 200, 0, visual=ENS)
    plan, rows = BatchPlan(2, 1, 0, 1, images=ImageReader(16)), Rows.alone(np.arange(2))
    with pytest.raises(UserError, match=rf"{re.escape(str(folder))}/a.jsonl:2: image .*cut.png: damaged or cut off"):
        plan.step(data.training, rows, 0)
    (batch,) = BatchPlan(2, 1, 0, 1, images=ImageReader(16, skips_bad=True)).step(data.training, rows, 0)
    assert "cut.png: damaged or cut off" in capsys.readouterr().out
    alone, _ = (
        BatchPlan(1, 1, rank, 2, images=ImageReader(16, skips_bad=True)).step(data.training, rows, 0)[0] for rank in range(2)
    )
    assert batch.target_tokens == alone.target_tokens > 0 and len(batch.images.pixels) == 2
    assert batch.real_tokens == 2 * alone.real_tokens and not batch.images.pixels[1].any()


def test_the_commands_show_images(folder, tokenizer, monkeypatch, capsys):
    records = asked("0.png", "1.png"), asked("cut.png"), asked()
    mix = write_mix(folder, {"path": "a.jsonl", "root": "pictures"}, a_jsonl=lines(*records))
    (folder / "config.json").write_text(json.dumps({"visual": ENS.to_dict(), "max_seq_len": 200}))

    def run(*words):
        words = ["data", *words, mix, "--tokenizer", tokenizer.path, "--config", folder / "config.json"]
        words += ["--png", folder / "lengths.png"] if words[1] == "check" else []
        monkeypatch.setattr(sys, "argv", ["accessory", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return str(end.code), capsys.readouterr().out
        return None, capsys.readouterr().out

    code, told = run("check")
    assert code is None and f"3 images of {ENS.words} words each; 0 samples dropped" in told
    code, told = run("check", "--images")
    assert code == "0 bad records, 1 in which an image is damaged"
    assert f"{folder}/a.jsonl:2: image {folder}/pictures/cut.png: damaged or cut off" in told
    _, told = run("show")
    shown = f"<image {folder}/pictures/0.png><image {folder}/pictures/1.png>"
    assert f"{shown}A chat between" in told and "[[ a list\n###]]" in told and str(PLACE) not in told
    assert os.path.exists(folder / "lengths.png")
