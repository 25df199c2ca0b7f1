"""What was trained, saved beside its base: reloaded, merged or exported the same model; what does not fit is refused."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from jobs import command
from models import Tensors, build, evaluate, make_tokenizer, weights
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_checkpoint import rank_file
from test_commands import rows
from test_convert import ARGS, TOKENS, cli, converts, hf_tensors, logical, transformers_model
from transformers import MixtralForCausalLM

from accessory.certify import reference
from accessory.checkpoint.adapter import digest
from accessory.checkpoint.merge import Merged
from accessory.checkpoint.open import Checkpoint
from accessory.model.build import build_model
from accessory.model.moe.layouts import get_layout
from accessory.parallel.mesh import make_mesh
from accessory.settings import LoraSection, TuningSection
from accessory.train.save import save_trainable
from accessory.tuning.spec import resolve

LAYOUTS = ("mixtral", "mixtral_sparse")
ALL_TARGETS = ("attention", "experts", "router", "embeddings", "output")
LORA = TuningSection(lora=LoraSection(rank=3, alpha=2.0, targets=ALL_TARGETS))
LORA_NORM = replace(LORA, train=("norms",))
UNION = replace(LORA_NORM, bias=True)


def spec_of(section):
    return resolve(section, ARGS)


def trained_tensors(section):
    """A base, and what training made of it: adapters that are not zero, norms that are not one."""
    base = logical(transformers_model().state_dict())
    spec = spec_of(section)
    tuned = weights(ARGS, seed=7, dtype=torch.float32, adapters=spec.logical.adapters)
    return base | {name: 1 + 0.1 * tuned[name] if name.endswith("norm.weight") else tuned[name] for name in spec.trains}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """transformers' model in its own format, with a tokenizer."""
    directory = tmp_path_factory.mktemp("base") / "hf"
    transformers_model().save_pretrained(directory)
    make_tokenizer(directory / "tokenizer.model")
    return directory


def save_all(base, home):
    """Save each kind of tuning from a model cut over all ranks; returns its logits."""
    world = torch.distributed.get_world_size()
    mesh = make_mesh(world)
    fingerprint = {"fingerprint": Checkpoint(base).fingerprint}
    logits = {}
    for name, section, layout in (
        ("lora", LORA, "mixtral"),
        ("lora-sparse", LORA, "mixtral_sparse"),
        ("lora-norm", LORA_NORM, "mixtral_sparse"),
        ("union", UNION, "mixtral"),
    ):
        spec = spec_of(section)
        tuning = {"adapters": spec.logical.adapters, "trains": spec.trains}
        model = build(ARGS, layout, Tensors(trained_tensors(section)), mesh=mesh, dtype=torch.float32, **tuning)
        logits[name] = evaluate(model, TOKENS)
        save_trainable(model, home / name, {}, fingerprint)
    return logits


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """The adapter directories, and the logits of the models they were saved from."""
    home = tmp_path_factory.mktemp("saved")
    ranks = run_ranks(2, save_all, base, home)
    for name, logits in ranks[0].items():
        section = {"lora-norm": LORA_NORM, "union": UNION}.get(name, LORA)
        tensors = {key: tensor.double() for key, tensor in trained_tensors(section).items()}
        assert_close(logits, reference.forward(tensors, ARGS, torch.tensor(TOKENS), 2 / 3)[0])
    return home, ranks[0]


def assert_close(ours, theirs):
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= 1e-5, error


def load_model(paths, layout, size):
    mesh = make_mesh(size)
    source = Checkpoint(paths)
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    return build_model(source.logical, get_layout(layout), source, mesh=mesh, trains=frozenset(), **options)


def reload_all(bases, saved, size):
    adapters = [None] if saved is None else sorted(saved.iterdir())
    return {
        (base.name, adapter and adapter.name, layout): evaluate(
            load_model([base, *([adapter] if adapter else [])], layout, size), TOKENS
        )
        for base in bases
        for adapter in adapters
        for layout in LAYOUTS
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_trained_equals_reloaded(size, base, saved, tmp_path):
    """Over any view of the base, in both layouts."""
    converts(base, tmp_path / "sparse", "--to", "mixtral_sparse", "--mp", 2)
    home, expected = saved
    for logits in run_ranks(size, reload_all, [base, tmp_path / "sparse"], home, size):
        for (_, adapter, _), ours in logits.items():
            assert_close(ours, expected[adapter])


def test_both_layouts_save_the_same_file(saved):
    first, second = (load_file(saved[0] / name / "adapter.safetensors") for name in ("lora", "lora-sparse"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    shapes = spec_of(LORA).logical.shapes
    assert {key: tuple(t.shape) for key, t in first.items()} == {key: shapes[key] for key in spec_of(LORA).trains}


@pytest.mark.parametrize("adapter", ["lora", "lora-norm"])
def test_trained_equals_merged(adapter, base, saved, tmp_path):
    """In every format, and in transformers' hands."""
    home, expected = saved
    assert cli("merge", base, home / adapter, tmp_path / "hf") == 0
    converts(base, home / adapter, tmp_path / "sparse", "--to", "mixtral_sparse", "--mp", 2)
    converts(tmp_path / "sparse", tmp_path / "mistral", "--to", "mistral")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert not any("lora" in key for key in hf_tensors(tmp_path / "hf"))
    with torch.no_grad():
        assert_close(model(torch.tensor([TOKENS])).logits[0], expected[adapter])
    (logits,) = run_ranks(1, reload_all, [tmp_path / "sparse", tmp_path / "mistral"], None, 1)
    for ours in logits.values():
        assert_close(ours, expected[adapter])
    assert cli("verify", tmp_path / "hf", tmp_path / "mistral") == 0


def test_biases_are_merged_where_there_is_room(base, saved, tmp_path):
    home, expected = saved
    message = cli("merge", base, home / "union", tmp_path / "out")
    assert "no place for biases" in message and "layers.0.attention.wq.weight" in message
    assert "no place for" in cli("convert", base, home / "union", tmp_path / "out", "--to", "mixtral_sparse")
    assert not (tmp_path / "out").exists()
    converts(base, home / "union", tmp_path / "peft", "--to", "mixtral", "--mp", 2, "--format", "pth")
    assert json.loads((tmp_path / "peft/meta.json").read_text())["llama_type"] == "mixtral_peft"
    for logits in run_ranks(2, reload_all, [tmp_path / "peft"], None, 2):
        for ours in logits.values():
            assert_close(ours, expected["union"])


def test_a_merge_that_changes_nothing_is_told(base, saved, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(saved[0] / "lora", adapter)
    tensors = load_file(adapter / "adapter.safetensors")
    name = "layers.1.feed_forward.experts.w2_lora_b"
    tensors[name].zero_()
    save_file(tensors, adapter / "adapter.safetensors")
    manifest = json.loads((adapter / "adapter.json").read_text())
    del manifest["tensors"][name]
    assert f"lacks {name}" in save_manifest(adapter, manifest, base)
    manifest["tensors"][name] = digest(tensors[name])
    (adapter / "adapter.json").write_text(json.dumps(manifest))
    assert cli("merge", base, adapter, tmp_path / "out") == 0
    assert "nothing changed in layers.1.feed_forward.experts.w2:" in capsys.readouterr().out


def test_a_merge_rounds_once():
    """A base in bf16 is not added to in bf16: the sum is in the adapter's precision, and nothing of it is rounded here."""
    args, generator = replace(ARGS, n_layers=1), torch.Generator().manual_seed(0)
    logical = resolve(LORA, args).logical
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in logical.shapes.items()}
    tensors = {name: t if "lora" in name else t.bfloat16() for name, t in drawn.items()}
    read = SimpleNamespace(logical=logical, base_model=logical, changed=[], read=lambda name, region: tensors[name][region])
    exact = reference.with_adapters({name: tensor.double() for name, tensor in tensors.items()}, 2 / 3)
    for name in logical.adapters:
        merged = Merged(read).read(name, logical.whole(name))
        largest = exact[name].abs().max().item()
        torch.testing.assert_close(merged.double(), exact[name], rtol=0, atol=1e-6 * largest, msg=name)


def save_manifest(adapter, manifest, base):
    (adapter / "adapter.json").write_text(json.dumps(manifest))
    return refusal(base, adapter)


def refusal(base, adapter):
    message = cli("merge", base, adapter, adapter.with_name("never"))
    assert isinstance(message, str) and "\n" not in message, message
    assert not adapter.with_name("never").exists()
    return message


# PEFT


def test_peft_loads_what_is_exported(base, saved, tmp_path):
    converts(base, saved[0] / "lora", tmp_path / "peft", "--to", "peft")
    model = PeftModel.from_pretrained(MixtralForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    with torch.no_grad():
        assert_close(model(torch.tensor([TOKENS])).logits[0], saved[1]["lora"])
    (logits,) = run_ranks(1, reload_all, [base], tmp_path, 1)  # and comes back
    for ours in logits.values():
        assert_close(ours, saved[1]["lora"])


def test_what_peft_has_no_place_for(base, saved, tmp_path):
    for adapter, sentence in (("union", "trained weights of the base"), ("lora-norm", "norm.weight")):
        message = cli("convert", base, saved[0] / adapter, tmp_path / "peft", "--to", "peft")
        assert sentence in message and not (tmp_path / "peft").exists()
    assert "no adapter" in cli("convert", base, tmp_path / "peft", "--to", "peft")


PEFT_CONFIGS = {
    "experts and attention": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "down_proj alone": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "gate_up_proj alone": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "rslora, one layer": {"target_modules": ["model.layers.1.self_attn.k_proj", "lm_head"], "use_rslora": True},
    "alpha by pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"v_proj": 11},
        "rank_pattern": {"v_proj": 2},
    },
}


@pytest.fixture(scope="module")
def from_peft(base, tmp_path_factory):
    """Adapters that PEFT itself saved, with values in A and B, and their logits."""
    home, expected = tmp_path_factory.mktemp("peft"), {}
    for number, (name, options) in enumerate(PEFT_CONFIGS.items()):
        torch.manual_seed(number)
        config = LoraConfig(r=4, lora_alpha=6, **options)
        model = get_peft_model(MixtralForCausalLM.from_pretrained(base), config).eval()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(0.0, 0.2)
        model.save_pretrained(home / name)
        with torch.no_grad():
            expected[name] = model(torch.tensor([TOKENS])).logits[0]
    return home, expected


@pytest.mark.parametrize("size", [1, 2])
def test_adapters_that_peft_saved(size, base, from_peft):
    home, expected = from_peft
    for logits in run_ranks(size, reload_all, [base], home, size):
        for (_, adapter, _), ours in logits.items():
            assert_close(ours, expected[adapter])


def test_peft_adapters_of_another_shape(base, from_peft, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(from_peft[0] / "gate_up_proj alone", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for layer in range(ARGS.n_layers):  # the axes as PEFT had them once
        stem = f"base_model.model.model.layers.{layer}.mlp.experts.lora_"
        tensors[f"{stem}A.weight"] = torch.rand(4 * 8, 2 * ARGS.hidden_dim)
        tensors[f"{stem}B.weight"] = torch.rand(ARGS.dim, 4 * 8)
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "axes are in an older PEFT's order" in refusal(base, adapter)
    shutil.rmtree(adapter)
    shutil.copytree(from_peft[0] / "experts and attention", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "use_dora is True" in refusal(base, adapter)


# the reference's own PEFT directories


def peft_file(t, rank, size):
    """What mixtral_peft adds to one rank's file, by the format's description alone."""
    out = {}
    for n in range(ARGS.n_layers):
        ours, theirs = f"layers.{n}.attention.", f"llma.layers.{n}.attention."
        for name in ("wq", "wk", "wv"):
            out[f"{theirs}{name}.lora_a.weight"] = t[f"{ours}{name}.lora_a"]
            out[f"{theirs}{name}.lora_b.weight"] = t[f"{ours}{name}.lora_b"].chunk(size)[rank]
            out[f"{theirs}{name}.bias"] = t[f"{ours}{name}.bias"].chunk(size)[rank]
        out[f"{theirs}wo.lora_a.weight"] = t[f"{ours}wo.lora_a"].chunk(size, 1)[rank]
        out[f"{theirs}wo.lora_b.weight"] = t[f"{ours}wo.lora_b"]
        out[f"{theirs}wo.bias"] = t[f"{ours}wo.bias"]
        each = 8 // size
        for e in range(rank * each, (rank + 1) * each):
            for name in ("w1", "w2", "w3"):
                stem = f"layers.{n}.feed_forward.experts."
                out[f"llma.{stem}{e}.{name}.lora_a.weight"] = t[f"{stem}{name}_lora_a"][e]
                out[f"llma.{stem}{e}.{name}.lora_b.weight"] = t[f"{stem}{name}_lora_b"][e]
                out[f"llma.{stem}{e}.{name}.bias"] = t[f"{stem}{name}_bias"][e]
    out |= {f"llma.{name}": tensor for name, tensor in t.items() if name.endswith("norm.weight")}
    return {key: tensor.contiguous().clone() for key, tensor in out.items()}


@pytest.mark.parametrize("size", [1, 2])
def test_mixtral_peft_directories(size, base, tmp_path):
    """Adapters alone behind a base, and all in one directory; y = W x + b + B (A x), without alpha."""
    section = TuningSection(lora=LoraSection(rank=4), bias=True, train=("norms",))
    t = trained_tensors(section)
    expected = reference.forward({k: v.double() for k, v in t.items()}, ARGS, torch.tensor(TOKENS))[0]
    config = ARGS.to_dict() | {"lora_rank": 4, "bias_tuning": True, "norm_tuning": True}
    for name in ("alone", "whole"):
        directory = tmp_path / name
        directory.mkdir()
        for rank in range(size):
            tensors = peft_file(t, rank, size) | (rank_file(t, "mixtral", rank, size) if name == "whole" else {})
            torch.save({"model": tensors}, directory / f"consolidated.{rank:02d}-of-{size:02d}.model.pth")
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "meta.json").write_text('{"llama_type": "mixtral_peft"}')
    (tmp_path / "saved").mkdir()
    shutil.move(tmp_path / "alone", tmp_path / "saved/alone")
    for logits in run_ranks(2, reload_all, [base], tmp_path / "saved", 2):
        for ours in logits.values():
            assert_close(ours, expected)
    for logits in run_ranks(2, reload_all, [tmp_path / "whole"], None, 2):
        for ours in logits.values():
            assert_close(ours, expected)


# what does not fit


@pytest.fixture
def adapter(saved, tmp_path):
    shutil.copytree(saved[0] / "lora", tmp_path / "adapter")
    return tmp_path / "adapter"


def change_tensor(adapter, name, change):
    tensors = load_file(adapter / "adapter.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, adapter / "adapter.safetensors")


@pytest.mark.parametrize("name", ["layers.0.feed_forward.experts.w1_lora_a", "layers.1.feed_forward.experts.w2_lora_b"])
def test_permuted_experts_and_axes(name, base, adapter):
    change_tensor(adapter, name, lambda t: t.flip(0))
    assert f"{name} is not what was saved" in refusal(base, adapter)
    change_tensor(adapter, name, lambda t: t.flip(0).mT)
    assert name in refusal(base, adapter)


def test_another_rank_than_the_manifest_says(base, adapter):
    manifest = json.loads((adapter / "adapter.json").read_text())
    manifest["adapters"]["layers.0.attention.wq.weight"]["rank"] = 4
    assert "asks for [4, 32]" in save_manifest(adapter, manifest, base)
    manifest["axes"]["lora_a"] = "in, rank"
    assert "the tensors' axes are" in save_manifest(adapter, manifest, base)


def test_a_foreign_base(base, adapter, tmp_path):
    """Trained elsewhere, or with its experts in another order; not: rounded to bf16, or in another format."""
    for name, change in (
        ("experts", lambda key, t: t.flip(0) if key.endswith("mlp.experts.down_proj") else t),
        ("trained", lambda key, t: t * 1.01),
    ):
        model = MixtralForCausalLM.from_pretrained(base)
        model.load_state_dict({key: change(key, t) for key, t in model.state_dict().items()})
        model.save_pretrained(tmp_path / name)
        assert "belongs to another base" in refusal(tmp_path / name, adapter)
        assert cli("merge", tmp_path / name, adapter, tmp_path / f"{name}-forced", "--force") == 0
    converts(base, tmp_path / "rounded", "--to", "mixtral_sparse", "--mp", 4, "--dtype", "bf16")
    assert cli("inspect", tmp_path / "rounded", adapter) == 0


def run_file(base, home, *lines):
    """A tiny run in this process."""
    records = [{"instruction": f"say {n}", "output": "the list of tokens"} for n in range(8)]
    (home / "records.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (home / "mix.yaml").write_text("META: [{path: records.jsonl}]")
    text = f"""
model: {{checkpoint: {base}}}
data: {{mix: {home}/mix.yaml, max_seq_len: 512, validation: 0}}
parallel: {{precision: fp32}}
optim: {{lr: 1e-2, warmup_epochs: 0}}
train: {{max_steps: 2, batch_size: 4}}
out: {home}/run
"""
    (home / "run.yaml").write_text(text + "\n".join(lines))
    return home / "run.yaml"


def test_parts_of_the_base_alone(base, tmp_path):
    """What trains may be tensors of the base: saved alone, in fp32, they stand behind it; nothing trained before is lost."""
    run = run_file(base, tmp_path, "tuning: {train: [router, norms]}", "save: {only_trainable: true}")
    # a validation before it is saved leaves parameters gathered, in bf16
    codes, _, err = command("finetune", run, "parallel.precision=bf16", "data.validation=0.25")
    assert codes == [0], err
    saved = tmp_path / "run/epoch0"
    tensors = load_file(saved / "adapter.safetensors")
    assert {name.split(".")[-2] for name in tensors} == {"gate", "attention_norm", "ffn_norm", "norm"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert cli("merge", base, saved, tmp_path / "merged") == 0
    assert cli("verify", base, tmp_path / "merged") != 0
    both = f"model.checkpoint=[{base}, {saved}]"
    codes, _, err = command("finetune", run, both, "tuning={lora: {}}", f"out={tmp_path}/lora")
    assert codes == [1] and "this run would not save them" in err, err
    codes, _, err = command("finetune", run, both, "tuning={lora: {}, train: [router, norms]}", f"out={tmp_path}/lora")
    assert codes == [0], err
    assert cli("merge", base, tmp_path / "lora/epoch0", tmp_path / "again") == 0


def test_a_bias_trained_further(base, saved, tmp_path):
    """Biases that stand in the base itself are trained on; what was trained replaces them."""
    home = tmp_path / "home"
    home.mkdir()
    converts(base, saved[0] / "union", home / "peft", "--to", "mixtral")
    (home / "peft/tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    codes, _, err = command("finetune", run_file(home / "peft", home, "tuning: {bias: true}"))
    assert codes == [0], err
    assert cli("inspect", home / "peft", home / "run/epoch0") == 0
    converts(home / "peft", home / "run/epoch0", home / "merged", "--to", "mixtral")
    assert "DIFFERENT" in cli("verify", home / "peft", home / "merged")
    assert "DIFFERENT" in cli("verify", base, home / "peft")


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": None},
        {"adapters": {"layers.0.attention.wq.weight": {"rank": "3", "scaling": 1.0, "bias": False}}},
        {"adapters": {"layers.0.attention.wq.weight": {"rank": 3, "scaling": None, "bias": False}}},
        {"adapters": {"layers.0.attention.wq.weight": {"rank": 3, "scaling": 0.0, "bias": False}}},
        {"adapters": {"norm.weight": {"rank": 3, "scaling": 1.0, "bias": False}}},
        {"base": {"fingerprint": None}},
        {"tensors": None},
        {"tensors": {}},
    ],
)
def test_a_damaged_manifest(change, base, adapter):
    manifest = json.loads((adapter / "adapter.json").read_text()) | change
    assert str(adapter / "adapter.json") in save_manifest(adapter, manifest, base)


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [1]},
        {"lora_alpha": None},
        {"alpha_pattern": []} | {"lora_alpha": "x"},
        {"modules_to_save": ["norm"]},
    ],
)
def test_what_of_peft_is_not_done_here(change, base, from_peft, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(from_peft[0] / "rslora, one layer", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    message = refusal(base, adapter)
    assert str(adapter / "adapter_config.json") in message
    assert ("merge_and_unload" in message) == ("lora_alpha" not in change)


def test_lists_that_make_no_sense(base, adapter):
    assert "name that one before it" in cli("inspect", adapter)
    assert "has an adapter already" in cli("inspect", base, adapter, adapter)
    assert "no adapter in it" in cli("merge", base, base, adapter.with_name("never"))


# the commands, one after the other


def test_finetune_go_on_generate_merge(base, tmp_path):
    """LoRA from a Hugging Face directory on two ranks, in the sparse layout; saved small; taken up again in the other."""
    records = [{"instruction": f"say {n}", "output": "the list of tokens"} for n in range(24)]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (tmp_path / "mix.yaml").write_text("META: [{path: records.jsonl}]")
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{checkpoint: {base}, layout: mixtral_sparse}}
data: {{mix: {tmp_path}/mix.yaml, max_seq_len: 512, validation: 0}}
parallel: {{model_parallel: 2, precision: fp32}}
tuning: {{lora: {{rank: 2}}, train: norms}}
optim: {{lr: 1e-2, warmup_epochs: 0}}
train: {{max_steps: 3, batch_size: 8}}
log: {{every: 1}}
out: {tmp_path}/run
"""
    )
    codes, out, err = command("finetune", tmp_path / "run.yaml", ranks=2)
    assert codes == [0, 0], err
    first = tmp_path / "run/epoch0"
    assert "attention LoRA" in out and (first / "adapter.json").is_file()
    assert sum(p.stat().st_size for p in first.glob("*.safetensors")) < (base / "model.safetensors").stat().st_size / 2
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    go_on = [f"model.checkpoint=[{base}, {first}]", "model.layout=mixtral", f"out={tmp_path}/again", "optim.lr=1e-6"]
    codes, out, err = command("finetune", tmp_path / "run.yaml", *go_on, ranks=2)
    assert codes == [0, 0], err
    row = json.loads((tmp_path / "again/metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] < losses[0] - 0.1
    codes, _, err = command(
        "finetune", tmp_path / "run.yaml", *go_on, "tuning.lora.rank=3", f"out={tmp_path}/other", ranks=2
    )
    assert codes == [1, 1] and "set tuning to go on with the same" in err
    converts(base, tmp_path / "again/epoch0", tmp_path / "merged", "--to", "mixtral", "--mp", 2)
    plain = ["the list", "--raw", "--precision", "fp32", "--max-gen-len", 5]
    answers = [
        command("generate", tmp_path / "merged", *plain)[1],
        command("generate", base, "--adapter", tmp_path / "again/epoch0", *plain, ranks=2)[1],
    ]
    assert answers[0] == answers[1] and answers[0].startswith("> the list")
