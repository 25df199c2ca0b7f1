"""PEFT's adapter of the experts' gate and up has one A: here w3 is tied to that of w1, in training, saved and exported."""

import json
from dataclasses import replace

import pytest
import torch
from jobs import command
from models import weights
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from safetensors.torch import load_file
from slips import make_home
from test_convert import cli
from test_transformers import ARGS
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from accessory.certify.harness import Tensors
from accessory.model.build import build_model
from accessory.model.moe.layouts import LAYOUTS
from accessory.parallel.mesh import make_mesh
from accessory.settings import LoraSection, TuningSection
from accessory.tuning.spec import resolve

ONE = replace(ARGS, n_layers=1)
RANK, ALPHA, E = 3, 2.0, ONE.moe.num_experts
EXPERTS = "layers.0.feed_forward.experts."


def tied_adapters():
    """As a run has them that goes on from PEFT's."""
    section = TuningSection(lora=LoraSection(rank=RANK, alpha=ALPHA, targets=("experts",)))
    adapters = dict(resolve(section, ONE).logical.adapters)
    given = {name: replace(adapter, tied=name.endswith("w3")) for name, adapter in adapters.items()}
    return resolve(section, ONE, given=given)


def run_ours(w, x, probe, size):
    """The output of the experts' layer in both layouts over ``size`` ranks, and this rank's parts of gradients."""
    tuning, mesh = tied_adapters(), make_mesh(size)
    results = {}
    for layout in LAYOUTS.values():
        options = {"dtype": torch.float64, "device": torch.device("cpu"), "trains": tuning.trains}
        model = build_model(tuning.logical, layout, Tensors(w), mesh=mesh, **options)
        out, _ = model.layers[0].feed_forward(x)
        (out * probe).sum().backward()
        parts = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                region = model.cuts[name].region(mesh.mp.rank, size)
                parts[name] = region, parameter.grad.view([s.stop - s.start for s in region])
        results[layout.name] = out.detach(), parts
    return results


class Layer(nn.Module):
    """transformers' experts, by themselves: its router and norms compute in fp32 whatever they are given."""

    def __init__(self, w):
        super().__init__()
        config = MixtralConfig(
            hidden_size=ONE.dim, intermediate_size=ONE.hidden_dim, num_local_experts=E, experts_implementation="eager"
        )
        self.experts = MixtralExperts(config).double()
        self.experts.gate_up_proj.data.copy_(torch.cat([w[f"{EXPERTS}w1"], w[f"{EXPERTS}w3"]], 1))
        self.experts.down_proj.data.copy_(w[f"{EXPERTS}w2"])

    def forward(self, x, index, share):
        return self.experts(x, index, share)


def as_peft(t):
    """Our adapters (or their gradients) as PEFT has them."""
    b = torch.cat([t[f"{EXPERTS}w1_lora_b"], t[f"{EXPERTS}w3_lora_b"]], 1)
    head = "base_model.model.experts."
    return {
        f"{head}base_layer.lora_A.default.weight": t[f"{EXPERTS}w1_lora_a"].flatten(0, 1),
        f"{head}base_layer.lora_B.default.weight": b.permute(1, 2, 0).flatten(1),
        f"{head}lora_A.default.weight": t[f"{EXPERTS}w2_lora_a"].flatten(0, 1),
        f"{head}lora_B.default.weight": t[f"{EXPERTS}w2_lora_b"].permute(1, 2, 0).flatten(1),
    }


def run_peft(w, x, probe):
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_peft_model(Layer(w), config).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = as_peft(w)
    assert {name: p.shape for name, p in parameters.items()} == {name: t.shape for name, t in expected.items()}
    for name, parameter in parameters.items():
        parameter.data.copy_(expected[name])
    share, index = (x @ w["layers.0.feed_forward.gate.weight"].T).softmax(-1).topk(ONE.moe.num_experts_per_tok)
    out = model(x, index, share / share.sum(-1, keepdim=True))
    (out * probe).sum().backward()
    return out.detach(), {name: p.grad for name, p in parameters.items()}


@pytest.mark.parametrize("size", [1, 2])
def test_its_gradient_is_the_sum_of_both_uses_as_pefts(size):
    tuning = tied_adapters()
    assert f"{EXPERTS}w3_lora_a" not in tuning.logical.shapes
    seeds = [tuning.logical.adapters[f"{EXPERTS}{matrix}"].seed for matrix in ("w1", "w2", "w3")]
    assert seeds[0] == seeds[2] != seeds[1]  # one A, of one dropout
    w = weights(ONE, scale=5.0, adapters=tuning.logical.adapters)
    generator = torch.Generator().manual_seed(3)
    x, probe = (torch.randn(23, ONE.dim, dtype=torch.float64, generator=generator) for _ in range(2))
    expected, gradients = run_peft(w, x, probe)
    ranks = run_ranks(size, run_ours, w, x, probe, size)
    for layout in LAYOUTS:
        whole = {}
        for rank in ranks:
            out, parts = rank[layout]
            assert (out - expected).abs().max() < 1e-12 * expected.abs().max()
            for name, (region, gradient) in parts.items():
                shape = tuning.logical.shapes[name]
                whole.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))[region] = gradient
        for name, gradient in as_peft(whole).items():
            assert (gradient - gradients[name]).abs().max() < 1e-12 * gradients[name].abs().max(), (layout, name)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run file, its base, and an adapter that PEFT saved."""
    home = make_home(tmp_path_factory.mktemp("tied"))
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = get_peft_model(MixtralForCausalLM.from_pretrained(home / "hf"), LoraConfig(r=4, lora_alpha=6, **targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(home / "peft")
    return home


def exported(home, *sources):
    destination = home / f"{sources[-1].name}-exported"
    assert cli("convert", home / "hf", *sources, destination, "--to", "peft") == 0
    config = json.loads((destination / "adapter_config.json").read_text())
    return load_file(destination / "adapter_model.safetensors"), config


def test_what_peft_saved_comes_back_as_it_was(home):
    tensors, config = exported(home, home / "peft")
    expected = load_file(home / "peft/adapter_model.safetensors")
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 6, {}, {})


@pytest.mark.parametrize(("layout", "ranks"), [("mixtral", 2), ("mixtral_sparse", 1)])
def test_a_run_that_goes_on_from_it_keeps_its_rank(layout, ranks, home):
    out = home / layout
    words = [f"model.checkpoint=[{home}/hf,{home}/peft]", "model.config=null", "model.tokenizer=null", f"out={out}"]
    lora = "tuning.lora={rank: 4, alpha: 6, targets: [wq, experts], dropout: 0.1}"
    codes, _, err = command(
        "finetune",
        home / "run.yaml",
        *words,
        lora,
        f"model.layout={layout}",
        f"parallel.model_parallel={ranks}",
        ranks=ranks,
    )
    assert codes == [0] * ranks, err
    saved = out / "epoch0-iter1"
    manifest = json.loads((saved / "adapter.json").read_text())
    assert {name for name, entry in manifest["adapters"].items() if entry["tied"]} == {
        name for name in manifest["adapters"] if name.endswith("w3")
    }
    assert not [name for name in manifest["tensors"] if name.endswith("w3_lora_a")]
    tensors, config = exported(home, saved.rename(home / f"{layout}-saved"))
    before = load_file(home / "peft/adapter_model.safetensors")
    assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in before.items()}
    assert not config["rank_pattern"] and not any(torch.equal(tensors[key], before[key]) for key in before)


def test_what_an_untied_export_costs_is_said(home, capsys):
    words = [f"model.checkpoint={home}/hf", "model.config=null", "model.tokenizer=null", f"out={home}/fresh"]
    codes, _, err = command("finetune", home / "run.yaml", *words, "tuning.lora={rank: 2, targets: [experts]}")
    assert codes == [0], err
    tensors, config = exported(home, home / "fresh/epoch0-iter1")
    assert "written at rank 4, not 2" in capsys.readouterr().out and config["rank_pattern"] == {r".*\.gate_up_proj": 4}
    b = next(tensor for key, tensor in tensors.items() if key.endswith("base_layer.lora_B.weight"))
    assert ((b == 0).sum() >= b.numel() // 2) and b.shape[1] == 4 * 4
