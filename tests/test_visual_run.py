"""A run on images, as a user types it: what it saves can be used and trained further, with the encoders it began with."""

import json

import pytest
import torch
import yaml
from jobs import command
from pictures import noise
from seeing import MODEL, saved_in, seeing, write_run
from transformers import LlavaForConditionalGeneration

from accessory.checkpoint.open import Checkpoint
from accessory.model.logical import whole_region
from accessory.visual.vision import vision_shapes

ARGS = seeing("clip", MODEL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("seeing"), ARGS)


def run(home, *overrides, ranks=2):
    codes, out, err = command("finetune", home / "run.yaml", *overrides, ranks=ranks)
    assert codes == [0] * ranks, err
    return out


@pytest.fixture(scope="module")
def saved(home):
    """The model of a first run."""
    run(home)
    return saved_in(home / "first")


def encoders(checkpoint):
    shapes = vision_shapes(checkpoint.args.visual)
    return {name: checkpoint.encoders.read(name, whole_region(shape)) for name, shape in shapes.items()}


def whole(checkpoint):
    return {name: checkpoint.read(name, checkpoint.logical.whole(name)) for name in checkpoint.logical.shapes}


def test_a_run_saves_what_it_sees_with_and_goes_on_in_the_other_layout(home, saved):
    first = Checkpoint(saved)
    assert first.args == ARGS
    # stage 1: the connector alone, over model-parallel ranks
    overrides = ["model.layout=mixtral_sparse", "parallel.model_parallel=2", "tuning.train=[connector]"]
    out = run(home, f"model.checkpoint={saved}", *overrides, f"out={home}/second", "save.only_trainable=true")
    assert "connector" in out
    second = saved_in(home / "second")
    both, before, after = Checkpoint([saved, second]), whole(first), None
    after = whole(both)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("connector.")}
    for ours, theirs in zip(encoders(first).values(), encoders(both).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert (saved / "visual.safetensors").samefile(home / "first/visual.safetensors"), "the same bytes on the disk"


def test_a_text_model_learns_to_see_with_encoders_of_their_own_directory(home, saved):
    text = home / "text.json"
    text.write_text(json.dumps(MODEL.to_dict()))
    (home / "words.json").write_text(json.dumps([{"instruction": "a list", "output": "of words"}] * 4))
    (home / "words.yaml").write_text(yaml.safe_dump({"META": [{"path": str(home / "words.json")}]}))
    run(home, f"model.config={text}", f"data.mix={home}/words.yaml", f"out={home}/base", ranks=1)
    base = saved_in(home / "base")
    alone = home / "encoders"
    alone.mkdir()
    (alone / "visual.safetensors").write_bytes((saved / "visual.safetensors").read_bytes())
    (alone / "visual.json").write_text(json.dumps(ARGS.visual.to_dict()))
    run(home, f"model.checkpoint=[{base}, {alone}]", "tuning.train=[connector]", f"out={home}/third")
    third = saved_in(home / "third")
    checkpoint = Checkpoint(third)
    assert checkpoint.args.visual == ARGS.visual
    ours, theirs = whole(checkpoint), whole(Checkpoint(base))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert set(ours) - set(theirs) == {name for name in ours if name.startswith("connector.")}


def test_calibrated_with_what_images_show(home, saved):
    """The same texts beside other images are other rows to round for."""
    others, codes = home / "others", []
    others.mkdir()
    for image in home.glob("*.png"):
        noise(30, 40, seed=100 + int(image.stem)).save(others / image.name)
    for root in (home, others):
        mix, written = root / "calibrate.yaml", root / "int4"
        mix.write_text(yaml.safe_dump({"META": [{"path": str(home / "data.json"), "root": str(root)}]}))
        ended, out, err = command("quantise", saved, written, "--experts", "int4-8", "--calibrate", mix)
        assert ended == [0] and "samples" in out, err
        codes.append(whole(Checkpoint(written)))
    assert codes[0].keys() == codes[1].keys()
    differ = {name for name, tensor in codes[0].items() if not torch.equal(tensor, codes[1][name])}
    assert differ and all(".experts." in name for name in differ), differ


def test_a_run_on_a_llava_saves_what_transformers_loads(home):
    """And in LLaMA2-Accessory's .pth files, as in Hugging Face's, the encoders are among the model's own tensors."""
    described = home / "llava.json"
    described.write_text(json.dumps(seeing("llava", MODEL, image_token=299).to_dict()))
    seen = {}
    for format in ("hf", "pth"):
        ranks = ["parallel.model_parallel=2", f"save.format={format}", f"out={home}/{format}"]
        run(home, f"model.config={described}", *ranks)
        saved = saved_in(home / format)
        assert not (saved / "visual.safetensors").exists()
        seen[format] = Checkpoint(saved)
    for ours, theirs in zip(*(encoders(one).values() for one in seen.values()), strict=True):
        assert torch.equal(ours, theirs)
    directory = seen["hf"].directories[0].directory
    model, told = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(told.values()), told
    tower = model.model.vision_tower.state_dict()
    assert torch.equal(tower["embeddings.class_embedding"], encoders(seen["hf"])["clip.visual.class_embedding"])
