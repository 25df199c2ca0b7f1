"""The preset ``llava`` is transformers' LlavaForConditionalGeneration with a Mixtral: read, run, trained and written."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import check_close
from test_oracle import wholly_double  # noqa: F401  (transformers computes all in fp64)

from accessory.certify.harness import assemble, build, gradients
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.huggingface import model_tiles
from accessory.checkpoint.open import Checkpoint
from accessory.data.loader import Batch, collate
from accessory.data.placement import PLACE
from accessory.data.store import Sample
from accessory.model.head import Logits
from accessory.model.logical import LogicalModel, region_shape, whole_region
from accessory.parallel.mesh import Axis
from accessory.train.objective import NextToken
from accessory.visual.views import normalised

CPU = torch.device("cpu")
IMAGE, WORDS = 63, 4
SIDES = {"clip": 28, "siglip": 30}
"""Of images: SigLIP leaves a rest of them."""
SAMPLES = [([1, 5, PLACE, 9, 11, 12], 4), ([1, 7, 8, 30, 4], 2), ([1, PLACE, 3, PLACE, 21, 22, 23], 5)]
"""Tokens, of which the place of an image stands for all its words, and how many of them are a prompt."""


@pytest.fixture(scope="module", params=SIDES)
def tower(request):
    """What they see with."""
    return request.param


@pytest.fixture(scope="module")
def theirs(tower):
    """Their model in fp64."""
    text = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        max_position_embeddings=64,
    )
    made, strategy = {
        "clip": (transformers.CLIPVisionConfig, "default"),
        "siglip": (transformers.SiglipVisionConfig, "full"),
    }[tower]
    vision = made(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDES[tower],
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_select_strategy=strategy
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").double()
    model.set_experts_implementation("eager")
    model.model.vision_tower.config._attn_implementation = "sdpa"  # the other takes its softmax in fp32
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 6
    return model


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llava") / "theirs"
    theirs.save_pretrained(directory)
    return directory


def spread(tokens, place):
    """Each place of an image as those of all its words."""
    return [t for token in tokens for t in ([place] * WORDS if token == PLACE else [token])]


def batch(tower):
    images, side = sum(tokens.count(PLACE) for tokens, _ in SAMPLES), SIDES[tower]
    pixels = torch.randint(0, 256, (images, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    samples = []
    for tokens, prompt in SAMPLES:
        ids = spread(tokens, PLACE)
        trained = [False] * len(spread(tokens[:prompt], PLACE)) + [True] * len(tokens[prompt:])
        samples.append(Sample(ids, trained))
    made: Batch = collate(samples, pixels=pixels)
    return made


def run_theirs(model, pixels):
    """(logits of all samples, mean loss), which carries gradient."""
    logits, losses, image = [], [], 0
    for tokens, prompt in SAMPLES:
        ids, count = torch.tensor(spread(tokens, IMAGE)), tokens.count(PLACE)
        own = pixels[image : image + count]
        squares = normalised(own, torch.float64) if SIDES["clip"] == own.shape[-1] else own.double() / 127.5 - 1
        squares = squares if count else None
        out = model(input_ids=ids[None], pixel_values=squares).logits[0]
        assert out.dtype == torch.float64
        start = len(spread(tokens[:prompt], PLACE))
        losses.append(F.cross_entropy(out[start - 1 : -1], ids[start:], reduction="sum"))
        logits.append(out)
        image += count
    return torch.cat(logits), sum(losses) / sum(len(tokens) - prompt for tokens, prompt in SAMPLES)


def ours(checkpoint, layout="mixtral"):
    model = build(checkpoint.logical, layout, checkpoint)
    model.vision = checkpoint.vision(Axis(), torch.float64, CPU)
    return model


@pytest.mark.parametrize("layout", ["mixtral", "mixtral_sparse"])
def test_logits_loss_and_gradients_are_theirs_in_fp64(layout, tower, theirs, saved):
    checkpoint, plain = Checkpoint(saved), batch(tower)
    assert checkpoint.args.visual.words == WORDS and checkpoint.args.visual.image_token == IMAGE
    model = ours(checkpoint, layout)
    seen = plain.on(model)
    expected, expected_loss = run_theirs(theirs, plain.images.pixels)
    with torch.no_grad():
        logits, _ = model(seen.inputs(), Logits())
    check_close({"logits": logits}, {"logits": expected}, 1e-10)
    loss = NextToken().loss(model, seen).loss_sum / seen.target_tokens
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    loss.backward()
    theirs.zero_grad()
    expected_loss.backward()
    stored = {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            name = name.replace("model.language_model.", "model.").replace("model.multi_modal", "multi_modal")
            stored[name] = parameter.grad
    found = {}
    for tile in model_tiles(LogicalModel(checkpoint.args), fused=True):
        found[tile.name] = tile.read(stored[tile.key], whole_region(region_shape(tile.region)))
    check_close(assemble([gradients(model)], checkpoint.logical.shapes)[0], found, 1e-10)


def test_what_comes_back_is_what_they_saved(theirs, saved, tmp_path):
    first = Checkpoint(saved)
    convert(first, tmp_path / "sparse", Target("mixtral_sparse", 2))
    convert(Checkpoint(tmp_path / "sparse"), tmp_path / "pth", Target("mixtral", 2, suffix="pth"))
    convert(Checkpoint(tmp_path / "pth"), tmp_path / "back", Target("hf"))
    back = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "back", dtype=torch.float64, attn_implementation="eager"
    )
    given, returned = theirs.state_dict(), back.state_dict()
    given = {name: tensor for name, tensor in given.items() if "vision_tower.head." not in name}  # which no LLaVA looks at
    assert given.keys() == returned.keys()
    assert all(torch.equal(given[name], returned[name]) for name in given)
    assert Checkpoint(tmp_path / "back").args == first.args


@pytest.mark.parametrize(
    ("key", "value"),
    [("vision_feature_layer", -1), ("vision_feature_select_strategy", "all"), ("projector_hidden_act", "relu")],
)
def test_what_is_not_done_is_refused(key, value, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(Exception, match=f"{key} is '?{value}'?, this program does"):
        Checkpoint(saved, tmp_path / "config.json")
