"""LLaMA2-Accessory's directories of models that see: the names and shapes of its encoders, and the way there and back."""

import json

import pytest
import torch
from models import TINY, weights
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from seeing import seeing

from accessory.certify.harness import Tensors, build
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.encoders import write_encoders
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.verify import compare
from accessory.errors import UserError
from accessory.model.logical import LogicalModel, whole_region
from accessory.model.visual import VisualArgs
from accessory.parallel.mesh import Axis
from accessory.train.save import save_model
from accessory.visual.vision import RandomEncoders, make_vision, vision_shapes

COUNTS = {  # tensors and numbers that the reference's model has, without those that it does not use
    "qformer.": (729, 1_091_114_496),
    "clip.visual.": (296, 303_966_208),
    "openclip_convnext_xxl.": (378, 843_398_016),
    "dinov2_vitg14.": (566, 1_136_480_768 - 1536),
}
SHAPES = {
    "clip.visual.class_embedding": (1024,),
    "clip.visual.positional_embedding": (257, 1024),
    "clip.visual.proj": (1024, 768),
    "clip.visual.conv1.weight": (1024, 3, 14, 14),
    "clip.visual.ln_pre.bias": (1024,),
    "clip.visual.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
    "clip.visual.transformer.resblocks.0.attn.out_proj.bias": (1024,),
    "clip.visual.transformer.resblocks.5.mlp.c_fc.weight": (4096, 1024),
    "openclip_convnext_xxl.stem.0.weight": (384, 3, 4, 4),
    "openclip_convnext_xxl.stages.1.downsample.1.weight": (768, 384, 2, 2),
    "openclip_convnext_xxl.stages.2.blocks.29.conv_dw.weight": (1536, 1, 7, 7),
    "openclip_convnext_xxl.stages.3.blocks.2.mlp.fc1.weight": (12288, 3072),
    "openclip_convnext_xxl.stages.0.blocks.2.gamma": (384,),
    "openclip_convnext_xxl.head.norm.weight": (3072,),
    "dinov2_vitg14.cls_token": (1, 1, 1536),
    "dinov2_vitg14.pos_embed": (1, 1370, 1536),
    "dinov2_vitg14.patch_embed.proj.bias": (1536,),
    "dinov2_vitg14.blocks.39.mlp.w12.weight": (8192, 1536),
    "dinov2_vitg14.blocks.0.mlp.w3.weight": (1536, 4096),
    "dinov2_vitg14.blocks.0.ls1.gamma": (1536,),
    "dinov2_vitg14.norm.weight": (1536,),
    "qformer.query_tokens": (1, 32, 768),
    "qformer.vision_model.embeddings.class_embedding": (1, 1, 1408),
    "qformer.vision_model.embeddings.position_embedding": (1, 257, 1408),
    "qformer.vision_model.encoder.layers.38.self_attn.qkv.weight": (4224, 1408),
    "qformer.vision_model.encoder.layers.0.mlp.fc2.bias": (1408,),
    "qformer.vision_model.post_layernorm.weight": (1408,),
    "qformer.qformer.layernorm.weight": (768,),
    "qformer.qformer.encoder.layer.10.crossattention.attention.key.weight": (768, 1408),
    "qformer.qformer.encoder.layer.11.intermediate_query.dense.weight": (3072, 768),
    "qformer.qformer.encoder.layer.11.output_query.LayerNorm.bias": (768,),
}
ARGS = seeing("ens", TINY)
CPU = torch.device("cpu")


def test_the_encoders_have_the_references_names_and_shapes():
    shapes = vision_shapes(VisualArgs("ens"))
    for prefix, (tensors, numbers) in COUNTS.items():
        found = [torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(prefix)]
        assert (len(found), sum(found)) == (tensors, numbers), prefix
    assert {name: shapes[name] for name in SHAPES} == SHAPES
    assert "qformer.qformer.encoder.layer.1.crossattention.attention.key.weight" not in shapes
    clip = vision_shapes(VisualArgs("clip"))
    assert clip.items() == {(name, shape) for name, shape in shapes.items() if name.startswith("clip.")}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A directory as a run saves it."""
    home = tmp_path_factory.mktemp("own")
    run_ranks(1, save_own, home)
    return home / "own"


def save_own(home):
    model = build(LogicalModel(ARGS), "mixtral", Tensors(weights(ARGS)))
    vision = make_vision(ARGS.visual, RandomEncoders(ARGS.visual, 0), Axis(), torch.float64, CPU)
    write_encoders(home / "visual.safetensors", vision, torch.float64)
    save_model(model, home / "own", {"visual.safetensors": home / "visual.safetensors"}, torch.float64, "safetensors")


@pytest.mark.parametrize(("layout", "size"), [("mixtral", 1), ("mixtral_sparse", 2), ("mixtral", 4), ("mixtral_sparse", 4)])
def test_every_file_has_the_encoders_whole_and_all_comes_back(layout, size, own, tmp_path):
    convert(Checkpoint(own), tmp_path / "there", Target(layout, size, suffix="pth"))
    files = [torch.load(tmp_path / "there" / f"consolidated.{r:02d}-of-{size:02d}.model.pth")["model"] for r in range(size)]
    whole = {f"llma.{name}": shape for name, shape in vision_shapes(ARGS.visual).items()}
    whole |= {
        "llma.qformer_proj.0.weight": (32, 10),
        "llma.visual_proj.0.weight": (32, 16 + 32 + 20),
        "llma.visual_proj.1.bias": (32,),
        "llma.start_img": (1, 1, 32),
        "llma.end_img": (1, 1, 32),
    }
    for tensors in files:
        assert {name: tuple(tensors[name].shape) for name in whole} == whole
        assert not any("connector" in name for name in tensors)
    convert(Checkpoint(tmp_path / "there"), tmp_path / "back", Target("mixtral"))
    first, back = Checkpoint(own), Checkpoint(tmp_path / "back")
    assert first.args == back.args == ARGS
    for name in first.logical.shapes:
        assert torch.equal(first.read(name, first.logical.whole(name)), back.read(name, first.logical.whole(name))), name
    for name, shape in vision_shapes(ARGS.visual).items():
        region = whole_region(shape)
        assert torch.equal(first.encoders.read(name, region), back.encoders.read(name, region)), name


def test_what_the_reference_leaves_beside_its_encoders_is_tolerated_and_nothing_else(own, tmp_path):
    convert(Checkpoint(own), tmp_path / "there", Target("mixtral", suffix="pth"))
    (file,) = (tmp_path / "there").glob("*.pth")
    content = torch.load(file)
    left = {"clip.positional_embedding", "clip.logit_scale", "clip.token_embedding.weight", "dinov2_vitg14.mask_token"}
    left |= {"clip.transformer.resblocks.0.ln_1.weight", "clip.ln_final.bias", "clip.text_projection"}
    torch.save({"model": content["model"] | {f"llma.{name}": torch.zeros(2) for name in left}}, file)
    assert Checkpoint(tmp_path / "there").encoders
    torch.save({"model": content["model"] | {"llma.clip.visual.more": torch.zeros(2)}}, file)
    with pytest.raises(UserError, match=r"unexpected clip\.visual\.more"):
        Checkpoint(tmp_path / "there")


def test_what_the_reference_calls_a_model_says_how_it_sees(own, tmp_path):
    """Its config.json has no word for it: meta.json and the names of tensors have."""
    convert(Checkpoint(own), tmp_path / "there", Target("mixtral_sparse"))
    config = json.loads((tmp_path / "there/config.json").read_text())
    visual = config.pop("visual")
    (tmp_path / "there/config.json").write_text(json.dumps(config))
    for named, preset in (("mixtral_sparse_ens", "ens"), ("mixtral_sparse_ens5", "ens5"), ("mixtral_sparse", "ens")):
        (tmp_path / "there/meta.json").write_text(json.dumps({"llama_type": named}))
        (tmp_path / "visual.json").write_text(json.dumps({"visual": visual | {"preset": preset}}))
        checkpoint = Checkpoint(tmp_path / "there", [tmp_path / "there/config.json", tmp_path / "visual.json"])
        assert checkpoint.layout.name == "mixtral_sparse" and checkpoint.args.visual.preset == preset
        assert checkpoint.directories[0].visual == VisualArgs(preset)
    with pytest.raises(UserError, match="no architecture that sees as the preset ens"):
        convert(Checkpoint(own), tmp_path / "hf", Target("hf"))


def test_encoders_that_are_not_there_or_not_whole_are_told(own, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in own.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    file = copy / "visual.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()  # it is mapped
    save_file(tensors | {"clip.visual.ln_post.weight": tensors["clip.visual.ln_post.weight"] * 2}, file)
    differing = [found.name for found in compare(Checkpoint(own), Checkpoint(copy)) if not found.exact]
    assert differing == ["clip.visual.ln_post.weight"]
    file.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if name != "clip.visual.proj"}, file)
    with pytest.raises(UserError, match=r"visual.safetensors lacks clip.visual.proj: does visual of config.json"):
        Checkpoint(copy)
    file.unlink()
    with pytest.raises(UserError, match="the encoders that it sees with are not in it: name a directory"):
        Checkpoint(copy).vision(Axis(), torch.float64, CPU)
